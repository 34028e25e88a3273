"""Keys of the events of the last 48 hours, and up to 96, so that none is accepted twice."""

import hashlib
import sqlite3
from collections.abc import Sequence
from enum import Enum, auto

from gateway.domain.model import DedupKey, UserId

CHUNK = 2000  # deleted in one transaction: 2.4 ms of a table of two million

Ids = tuple[int, int]  # hashes of a person's phone and LID, 0 where it is not known


def hashed(phone: UserId | None, lid: UserId | None) -> Ids:
    return _hash(phone), _hash(lid)


class Found(Enum):
    """Whose event had a key."""

    NOTHING = auto()
    ITSELF = auto()  # this very event
    ANOTHERS = auto()  # another person's: ids are chosen by the sender's phone
    NOBODYS = auto()  # perhaps this very event, under an id that went to no tenant


class DedupKeys:
    """Keys of the events of the last 48 hours, and up to 96.

    Three tables take turns of 48 hours: one is written, that and the one before are read, and the
    third is emptied little by little, so that no commit ever waits for a big deletion.
    """

    PERIOD_SECONDS = 48 * 3600

    def __init__(self, tx: sqlite3.Connection) -> None:
        found = tx.execute("SELECT value FROM meta WHERE name = 'seen_period'").fetchone()
        self._period: int = found[0] if found else 0

    def find(self, tx: sqlite3.Connection, key: DedupKey, ids: Ids, now: float) -> Found:
        """What is known of key."""
        found = Found.NOTHING
        part = "SELECT phone, lid, routed FROM {} WHERE key = ?"
        both = f"{part.format(self.table(now))} UNION ALL {part.format(self.table(now, -1))}"
        for *row, routed in tx.execute(both, (key.digest, key.digest)):
            match _same_person(row, ids) if key.twins else True:
                case True:
                    return Found.ITSELF
                case None if routed:
                    return Found.ITSELF
                case False:
                    found = Found.ANOTHERS
                case None if found is Found.NOTHING:
                    found = Found.NOBODYS
        return found

    def add(
        self, tx: sqlite3.Connection, key: DedupKey, ids: Ids, now: float, *, routed: bool
    ) -> None:
        tx.execute(
            f"INSERT OR IGNORE INTO {self.table(now)} VALUES (?, ?, ?, ?)",
            (key.digest, *ids, routed),
        )

    def purge(self, tx: sqlite3.Connection, now: float) -> int:
        """Delete CHUNK rows of the oldest table, or a few more; how many."""
        table = self.table(now, +1)
        # Kept for the next start: with a clock that has gone back it would empty the newest table.
        tx.execute(
            "INSERT INTO meta VALUES ('seen_period', ?) ON CONFLICT (name)"
            " DO UPDATE SET value = excluded.value WHERE value != excluded.value",
            (self._period,),
        )
        return tx.execute(
            f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} LIMIT {CHUNK})"
        ).rowcount

    def table(self, now: float, turn: int = 0) -> str:
        # A clock that goes back must not empty the table that is being written.
        current = int(now // self.PERIOD_SECONDS)
        # One that was far ahead must not stop the tables' turns for as long: three turns make none.
        self._period -= max(0, self._period - current) // 3 * 3
        self._period = max(self._period, current)
        return f"seen_{(self._period + turn) % 3}"


def _hash(user: UserId | None) -> int:
    if user is None:
        return 0
    # As in accept.lua: keys move from one store to the other.
    return int.from_bytes(
        hashlib.sha1(user.encode(), usedforsecurity=False).digest()[:8], "big", signed=True
    )


def _same_person(one: Sequence[int], other: Sequence[int]) -> bool | None:
    """By phone, else by LID; None for a phone and a LID of which nothing else is known.

    Those count as one person, unless the first copy went to nobody: then the second may be the one
    that shows whose it is, and a message must not be lost for a guess.
    """
    for mine, yours in zip(one, other, strict=True):
        if mine and mine == yours:
            return True
    if any(mine and yours for mine, yours in zip(one, other, strict=True)):
        return False
    return None
