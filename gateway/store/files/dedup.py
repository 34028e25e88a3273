"""Keys of the events of the last 48 hours, and up to 96, so that none is accepted twice."""

import sqlite3

from gateway.domain.dedup import Copy, PersonHash
from gateway.domain.model import DedupKey

CHUNK = 2000  # deleted in one transaction: 2.4 ms of a table of two million

_FIND = [
    f"SELECT phone, lid, routed FROM dedup_{turn} WHERE key = ?"
    f" UNION ALL SELECT phone, lid, routed FROM dedup_{(turn - 1) % 3} WHERE key = ?"
    for turn in range(3)
]
_ADD = [f"INSERT OR IGNORE INTO dedup_{turn} VALUES (?, ?, ?, ?)" for turn in range(3)]


class DedupKeys:
    """Keys of the events of the last 48 hours, and up to 96.

    Three tables take turns of 48 hours: one is written, that and the one before are read, and the
    third is emptied little by little, so that no commit ever waits for a big deletion.
    """

    PERIOD_SECONDS = 48 * 3600

    def __init__(self, tx: sqlite3.Connection) -> None:
        found = tx.execute("SELECT value FROM meta WHERE name = 'dedup_period'").fetchone()
        self._period: int = found[0] if found else 0

    def find(self, tx: sqlite3.Connection, key: DedupKey, now: float) -> list[Copy]:
        """Return the messages that came under key before."""
        turn = self._turn(now)
        rows = tx.execute(_FIND[turn], (key.digest, key.digest))
        return [Copy(PersonHash(phone, lid), bool(routed)) for phone, lid, routed in rows]

    def add(self, tx: sqlite3.Connection, key: DedupKey, sent: Copy, now: float) -> None:
        tx.execute(_ADD[self._turn(now)], (key.digest, *sent.person, sent.routed))

    def purge(self, tx: sqlite3.Connection, now: float) -> int:
        """Delete CHUNK rows of the oldest table, or a few more; how many."""
        table = self.table(now, +1)
        # Kept for the next start: with a clock that has gone back it would empty the newest table.
        tx.execute(
            "INSERT INTO meta VALUES ('dedup_period', ?) ON CONFLICT (name)"
            " DO UPDATE SET value = excluded.value WHERE value != excluded.value",
            (self._period,),
        )
        return tx.execute(
            f"DELETE FROM {table} WHERE key IN (SELECT key FROM {table} LIMIT {CHUNK})"
        ).rowcount

    def table(self, now: float, turn: int = 0) -> str:
        """Return the name of the table that is written; turn -1: of the one before."""
        return f"dedup_{(self._turn(now) + turn) % 3}"

    def _turn(self, now: float) -> int:
        """Return the number of the table that is written."""
        # A clock that goes back must not empty the table that is being written.
        current = int(now // self.PERIOD_SECONDS)
        # One that was far ahead must not stop the tables' turns for as long: three turns make none.
        if current != self._period:
            self._period -= max(0, self._period - current) // 3 * 3
            self._period = max(self._period, current)
        return self._period % 3
