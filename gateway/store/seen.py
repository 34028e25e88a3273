"""Keys of the events of the last 48 hours, and up to 96, so that none is accepted twice."""

import hashlib
import sqlite3

from gateway.model import SeenKey, UserId

Ids = tuple[UserId | None, UserId | None]  # phone and LID of a person, as far as known


class SeenKeys:
    """Keys of the events of the last 48 hours, and up to 96.

    Three tables take turns of 48 hours: one is written, that and the one before are read, and the
    third is emptied little by little, so that no commit ever waits for a big deletion.
    """

    PERIOD_SECONDS = 48 * 3600
    _PURGE = 2000  # rows in one go

    def __init__(self) -> None:
        self._period = 0

    def find(self, tx: sqlite3.Connection, key: SeenKey, ids: Ids, now: float) -> tuple[bool, bool]:
        """Whether this very event was seen; whether another person's event has the same key."""
        phone, lid = map(_hash, ids)
        collision = False
        for table in (self._table(now), self._table(now, -1)):
            for row in tx.execute(f"SELECT phone, lid FROM {table} WHERE key = ?", (key.digest,)):
                if not key.twins or _same_person(row, (phone, lid)):
                    return True, False
                collision = True
        return False, collision

    def add(self, tx: sqlite3.Connection, key: SeenKey, ids: Ids, now: float) -> None:
        tx.execute(
            f"INSERT OR IGNORE INTO {self._table(now)} VALUES (?, ?, ?)",
            (key.digest, *map(_hash, ids)),
        )

    def purge(self, tx: sqlite3.Connection, now: float) -> None:
        table = self._table(now, +1)
        tx.execute(
            f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} LIMIT {self._PURGE})"
        )

    def _table(self, now: float, turn: int = 0) -> str:
        # A clock that goes back must not empty the table that is being written.
        self._period = max(self._period, int(now // self.PERIOD_SECONDS))
        return f"seen_{(self._period + turn) % 3}"


def _hash(user: UserId | None) -> int:
    if user is None:
        return 0
    return int.from_bytes(
        hashlib.blake2b(user.encode(), digest_size=8).digest(), "big", signed=True
    )


def _same_person(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """By phone, else by LID; a phone and a LID of which nothing else is known may be one person."""
    for mine, yours in zip(one, other, strict=True):
        if mine and mine == yours:
            return True
    return not any(mine and yours for mine, yours in zip(one, other, strict=True))
