"""Migration: all that a store holds is put into another one, while no router runs on either.

What travels are rows of the tables in schema.sql by their columns, the dedup keys as one table
`seen` (keys are in hex), and `lock`: user and tenant, which a folder keeps in
router_mappings.json. A None is an empty value.

Until all has arrived and been counted, the new store refuses routers and may be filled anew; from
then on the old one does.
"""

import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from redis.exceptions import RedisError

from gateway.errors import StartRefused, StoreUnavailable
from gateway.store.migration.files import FileContents
from gateway.store.migration.redis import RedisContents
from gateway.store.redis.scripts import SCHEMES

Row = dict[str, Any]
TABLES = (
    "lock",
    "alias",
    "history",
    "person",
    "tenant",
    "heard",
    "dead_letter",
    "held",
    "unreadable",
    "delivery",
    "seen",
)
Show = Callable[[str, int], None]


class Contents(Protocol):
    """Of one store, which is ours until close()."""

    place: str  # to be shown to people: without a password

    async def counts(self) -> dict[str, int]:
        """How many rows each table has; of `tenant` see count_of()."""

    def rows(self, table: str) -> AsyncIterator[list[Row]]:
        """Each once, some at a time, in the order in which they are to be put down."""

    async def empty(self) -> None:
        """Ready to be filled; StartRefused if there is anything that no migration has brought."""

    async def put(self, table: str, rows: list[Row]) -> None: ...

    async def arrived(self) -> None:
        """All is there, and durable: routers may come."""

    async def left(self, place: str) -> None:
        """All is at place: no router may use it here any longer."""

    async def reopen(self) -> None:
        """Whatever left() said: routers may come again."""

    async def close(self) -> None: ...


async def reopen(url: str) -> None:
    """Let routers use again what has been migrated away; StartRefused if one does."""
    contents = await _open(url, as_source=True)
    try:
        await contents.reopen()
    finally:
        await contents.close()


def count_of(table: str, rows: list[Row]) -> int:
    """How many they are; of `tenant` how many messages were delivered, since a tenant may have one
    row for each session."""
    return sum(row["delivered"] for row in rows) if table == "tenant" else len(rows)


async def migrate(
    source: str,
    target: str,
    *,
    begin: Callable[[Mapping[str, int]], None] = lambda _: None,
    show: Show = lambda _table, _rows: None,
) -> dict[str, int]:
    """Carry all from one STORE_URL to the other; how many rows of each table have arrived.

    begin is called with how many there are, show with each table's name and how many rows more of
    it were put down. Raise StartRefused if a store is in use or not empty, or if not all arrived;
    then the old one is as it was.
    """
    try:
        return await _migrate(source, target, begin, show)
    except (RedisError, sqlite3.Error, OSError, StoreUnavailable) as exc:
        raise StartRefused(
            f"the migration broke off ({exc}): what was migrated is still there; run it again"
        ) from exc


async def _migrate(
    source: str,
    target: str,
    begin: Callable[[Mapping[str, int]], None],
    show: Show,
) -> dict[str, int]:
    old = await _open(source, as_source=True)
    try:
        new = await _open(target, as_source=False)
        try:
            await new.empty()
            begin(await old.counts())
            read: Counter[str] = Counter()  # not what was there before: dedup keys end meanwhile
            for table in TABLES:
                async for rows in old.rows(table):
                    await new.put(table, rows)
                    read[table] += count_of(table, rows)
                    show(table, len(rows))
            found = await new.counts()
            if missing := [name for name in TABLES if found[name] != read[name]]:
                counts = ", ".join(f"{found[name]} of {read[name]} {name}" for name in missing)
                raise StartRefused(
                    f"{new.place}: {counts} arrived: what was migrated is still there; run it again"
                )
            # In this order: if we die in between neither is open, and the migration is done again.
            await old.left(new.place)
            await new.arrived()
        finally:
            await new.close()
    finally:
        await old.close()
    return found


async def _open(url: str, *, as_source: bool) -> Contents:
    scheme, _, place = url.partition(":")
    if scheme == "file":
        return FileContents.open(Path(place), as_source=as_source)
    if scheme in SCHEMES:
        return await RedisContents.open(url, as_source=as_source)
    raise StartRefused(f"{scheme}:…: must begin with file: or be a Redis as in STORE_URL")
