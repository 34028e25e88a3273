"""A data folder that is one end of a migration."""

import itertools
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from gateway.domain.model import TenantId, UserId
from gateway.errors import StartRefused
from gateway.store.files import mappings, opening
from gateway.store.files.dedup import DedupKeys
from gateway.store.files.journal import connect

Row = dict[str, Any]
_CHUNK, _BODIES = 1000, 50  # read in one go; a body may be of megabytes
_WITH_BODY = ("held", "delivery", "dead_letter", "unreadable")
_COLUMNS = {
    "alias": "lid, phone, linked_at",
    "history": "id, at, user, kind, from_tenant, to_tenant, changed_second, changed_fraction,"
    " message_id, why, who, other",
    "person": "user, record, help_waits_since, updated_at",
    "heard": "session, at",
    "tenant": "id, delivered, first_seen, last_seen",
    "dead_letter": "id, tenant, user, alias, event_time, arrived, idempotency_key, message_id,"
    " headers, attempts, died_at, reason, status, answer, body",
    "held": "user, sent_second, sent_fraction, event_time, arrived, idempotency_key, message_id,"
    " headers, body",
    "unreadable": "key, arrived, session, event, reason, user, message_id, body",
    "delivery": "id, tenant, user, alias, event_time, arrived, idempotency_key, message_id,"
    " headers, due, attempts, poison_attempts, tried_at, age, body",
}
# Lines of one user together: so a store that keeps them by user takes them in one go.
_ORDER = {
    "history": "user, id",
    "held": "id",
    "unreadable": "id",
    "delivery": "id",
    "dead_letter": "id",
}
_SEEN = (
    "SELECT lower(hex(key)) AS key, phone, lid, max(routed) AS routed FROM"
    " (SELECT * FROM {} UNION ALL SELECT * FROM {}) GROUP BY key, phone, lid"
)


class FileContents:
    """See migrate.Contents."""

    @classmethod
    def open(cls, folder: Path, *, as_source: bool) -> "FileContents":
        files = (folder / opening.DATABASE_NAME, folder / mappings.FILE_NAME)
        if as_source and not any(file.exists() for file in files):
            raise StartRefused(f"file:{folder}: there is nothing to move")
        mark = opening.mark_of(folder) or ""
        if as_source and mark == opening.UNFINISHED:
            raise StartRefused(f"file:{folder}: a migration to this folder did not finish")
        if not as_source and mark.startswith(opening.LEFT):
            raise StartRefused(
                f"file:{folder}: what is there has been migrated away once: move router.db and"
                f" router_mappings.json elsewhere, and delete {opening.MARK_NAME}"
            )
        opened = opening.open_folder(folder, time.time(), connect, for_migration=True)
        return cls(folder, *opened)

    def __init__(
        self,
        folder: Path,
        lock: opening.FolderLock,
        connection: sqlite3.Connection,
        locks: dict[UserId, TenantId],
    ) -> None:
        self.place = f"file:{folder}"
        self._folder = folder
        self._lock = lock
        self._tx = connection
        self._tx.row_factory = sqlite3.Row
        self._locks = locks
        self._seen = DedupKeys(connection)

    async def counts(self) -> dict[str, int]:
        found = {
            table: self._one(f"SELECT count(*) FROM {table}") for table in _COLUMNS
        }  # fmt: skip
        found["tenant"] = self._one("SELECT coalesce(sum(delivered), 0) FROM tenant")
        found["seen"] = self._one(f"SELECT count(*) FROM ({self._select_seen()})")
        return found | {"lock": len(self._locks)}

    def _one(self, query: str) -> int:
        return int(self._tx.execute(query).fetchone()[0])

    def _select_seen(self) -> str:
        now = time.time()
        return _SEEN.format(self._seen.table(now), self._seen.table(now, -1))

    async def rows(self, table: str) -> AsyncIterator[list[Row]]:
        if table == "lock":
            found: Iterator[Row] = (
                {"user": user, "tenant": tenant} for user, tenant in self._locks.items()
            )
        elif table == "seen":
            found = map(dict, self._tx.execute(self._select_seen()))
        else:
            query = f"SELECT {_COLUMNS[table]} FROM {table} ORDER BY {_ORDER.get(table, '1')}"
            found = map(dict, self._tx.execute(query))
        if table == "unreadable":
            found = ({**row, "key": row["key"].hex() if row["key"] else None} for row in found)
        while some := list(itertools.islice(found, _BODIES if table in _WITH_BODY else _CHUNK)):
            yield some

    async def empty(self) -> None:
        mark = opening.mark_of(self._folder)
        counts = await self.counts()
        if mark is None and (there := {name: n for name, n in counts.items() if n}):
            rows = ", ".join(f"{n} {name}" for name, n in there.items())
            raise StartRefused(
                f"{self.place}: is not empty ({rows}): move router.db and router_mappings.json away"
            )
        opening.set_mark(self._folder, opening.UNFINISHED)
        self._locks.clear()
        self._tx.execute("PRAGMA synchronous = OFF")  # it is synced as a whole when all is there
        self._tx.execute("BEGIN")
        for name in (*_COLUMNS, "dedup_0", "dedup_1", "dedup_2", "lock_redo"):
            self._tx.execute(f"DELETE FROM {name}")
        self._tx.execute("COMMIT")

    async def put(self, table: str, rows: list[Row]) -> None:
        if table == "lock":
            self._locks.update({row["user"]: row["tenant"] for row in rows})
            return
        if table == "seen":
            names, into = ["key", "phone", "lid", "routed"], self._seen.table(time.time())
            rows = [row | {"key": bytes.fromhex(row["key"])} for row in rows]
        else:
            names, into = _COLUMNS[table].split(", "), table
        if table == "unreadable":
            rows = [
                row | {"key": bytes.fromhex(row["key"]) if row["key"] else None} for row in rows
            ]
        marks = ", ".join(f":{name}" for name in names)
        # Of a tenant comes one row for each session.
        again = (
            " ON CONFLICT (id) DO UPDATE SET delivered = delivered + excluded.delivered,"
            " first_seen = min(coalesce(first_seen, excluded.first_seen), excluded.first_seen),"
            " last_seen = max(coalesce(last_seen, excluded.last_seen), excluded.last_seen)"
            if table == "tenant"
            else ""
        )
        self._tx.execute("BEGIN")
        self._tx.executemany(
            f"INSERT INTO {into} ({', '.join(names)}) VALUES ({marks}){again}", rows
        )
        self._tx.execute("COMMIT")

    async def arrived(self) -> None:
        # Ids are never given twice, also not those that only a dead letter has any more.
        self._tx.execute("DELETE FROM sqlite_sequence WHERE name = 'delivery'")
        self._tx.execute(
            "INSERT INTO sqlite_sequence SELECT 'delivery', max(id) FROM"
            " (SELECT id FROM delivery UNION ALL SELECT id FROM dead_letter) HAVING count(*)"
        )
        self._tx.execute("PRAGMA synchronous = FULL")
        self._tx.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        mappings.replace_file(self._folder / mappings.FILE_NAME, mappings.encode(self._locks))
        opening.set_mark(self._folder, opening.ARRIVED)

    async def left(self, place: str) -> None:
        opening.set_mark(self._folder, f"{opening.LEFT}{place}")

    async def reopen(self) -> None:
        (self._folder / opening.MARK_NAME).unlink(missing_ok=True)
        mappings.sync_directory(self._folder)

    async def close(self) -> None:
        self._tx.close()
        self._lock.close()
