"""A Redis that is one end of a migration. Its keys are described in redis/lua/."""

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from gateway.domain.model import UserId
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store.redis import history_rows, packing
from gateway.store.redis.history_rows import Cause
from gateway.store.redis.scripts import (
    ARRIVED,
    HOME,
    LOOKING,
    MARK,
    UNFINISHED,
    Scripts,
    first_id,
    open_scripts,
    session_of,
)

T = TypeVar("T")
Row = dict[str, Any]
_CHUNK, _BODIES = 500, 50  # read in one go; a body may be of megabytes
_FOR_GOOD = -1  # a key's time to live
_CLOSED_SECONDS = (
    60  # while it is migrated; if the migration dies, routers may come again after that
)
_HISTORY = ("id", "at", "user", "kind", "from_tenant", "to_tenant", "changed_second",
            "changed_fraction", "message_id", "why")  # fmt: skip
_NUMBERS = {
    "id": int, "at": float, "from_tenant": int, "to_tenant": int, "changed_second": int,
    "changed_fraction": float, "tenant": int, "event_time": float, "arrived": float, "due": float,
    "attempts": int, "poison_attempts": int, "tried_at": float, "age": float, "died_at": float,
    "status": int, "sent_second": int, "sent_fraction": float, "queued_at": float,
    "sent_at": float, "delivered": int, "first_seen": float,
    "last_seen": float,
}  # fmt: skip
_OF_TENANTS = ("delivered", "first_seen", "last_seen")
_WITH_BODY = ("held", "delivery", "dead_letter", "unreadable")


class RedisContents:
    """See moving.Contents."""

    @classmethod
    async def open(cls, url: str, *, as_source: bool) -> "RedisContents":
        scripts = await open_scripts(url)
        contents = cls(scripts, url, as_source=as_source)
        try:
            await contents._start()
        except BaseException:
            await contents.close()
            raise
        return contents

    def __init__(self, scripts: Scripts, url: str, *, as_source: bool) -> None:
        parts = urlsplit(url)  # login and query may hold passwords
        self.place = f"{parts.scheme}:"
        if parts.netloc:
            self.place += f"//{parts.netloc.rpartition('@')[2]}"
        self.place += parts.path
        self._scripts = scripts
        self._client: Any = scripts.client  # its answers are bytes, which the types do not say
        self._as_source = as_source
        self._numbers: dict[str, int] = {}
        self._token = f"a migration, {uuid.uuid4().hex}".encode()
        self._was_open = False  # for a time, so that a router may have used it
        self._closing: asyncio.Task[None] | None = None

    async def _start(self) -> None:
        self._numbers = await self._scripts.sessions()
        if not self._as_source:
            return
        if await self._client.get(MARK) == UNFINISHED:
            raise StartRefused(f"{self.place}: a migration to this Redis did not finish")
        if not self._numbers:
            raise StartRefused(f"{self.place}: there is nothing to move")
        # Left before, it is closed for good, and may be carried once more.
        if await self._client.ttl(_closed(HOME)) == _FOR_GOOD:
            await self._refuse_routers()
            return
        if not await self._client.set(_closed(HOME), self._token, nx=True, ex=_CLOSED_SECONDS):
            raise StartRefused(
                f"{self.place}: another migration is under way, or was killed: try again in a"
                " minute"
            )
        self._closing = asyncio.create_task(self._stay_closed())
        await self._close_sessions()
        await self._refuse_routers()

    async def _close_sessions(self) -> None:
        for session in self._numbers:
            await self._client.set(_closed(session), self._token, ex=_CLOSED_SECONDS)
        await self._scripts.close_registry(time.time() + _CLOSED_SECONDS)

    async def _stay_closed(self) -> None:
        while True:
            await asyncio.sleep(_CLOSED_SECONDS / 3)
            try:
                self._was_open |= await self._client.get(_closed(HOME)) != self._token
                await self._close_sessions()
            except (RedisError, OSError):
                pass  # the next time may be soon enough: left() looks

    async def _refuse_routers(self) -> None:
        async for key in self._client.scan_iter(match="gw:{*}:lease:*", count=1000):
            if await self._client.exists(key):
                raise StartRefused(
                    f"{self.place}: a router uses it, or was killed within the last 15 s: stop all"
                    " routers, and try again"
                )

    # what is there

    async def counts(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for session in self._numbers:
            key = f"gw:{{{session}}}:"
            for table, name in (
                ("lock", "lock"),
                ("alias", "phone"),
                ("help", "help"),
                ("heard", "heard"),
            ):
                found[table] += await self._client.hlen(key + name)
            for table, name in (
                ("dead_letter", "letters"),
                ("delivery", "ids"),
                ("unreadable", "unreadable"),
            ):
                found[table] += await self._client.zcard(key + name)
            found["tenant"] += sum(map(int, await self._client.hvals(key + "delivered")))
        for table in ("held", "history", "seen"):
            async for rows in self.rows(table):
                found[table] += len(rows)
        return {table: found[table] for table in _READERS}

    def rows(self, table: str) -> AsyncIterator[list[Row]]:
        return _chunks(self._one_by_one(table))

    async def _one_by_one(self, table: str) -> AsyncIterator[Row]:
        keys: set[tuple[str, int, int]] = set()  # a folder's keys went to every session
        for place, session in enumerate(sorted(self._numbers, key=self._numbers.__getitem__)):
            async for row in _READERS[table](self, f"gw:{{{session}}}:"):
                if table == "history":  # each session has ids of its own
                    row["id"] = row["id"] * len(self._numbers) + place
                if table == "seen" and len(self._numbers) > 1:
                    key_of_person = row["key"], row["phone"], row["lid"]
                    if key_of_person in keys:
                        continue
                    keys.add(key_of_person)
                yield row

    async def _locks(self, key: str) -> AsyncIterator[Row]:
        async for user, tenant in self._pairs(key + "lock"):
            yield {"user": user, "tenant": int(tenant)}

    async def _aliases(self, key: str) -> AsyncIterator[Row]:
        async for some in _chunks(self._pairs(key + "phone")):
            times = await self._client.hmget(key + "sighted", [lid for lid, _ in some])
            for (lid, phone), linked_at in zip(some, times, strict=True):
                yield {"lid": lid, "phone": phone, "linked_at": float(linked_at)}

    async def _heard(self, key: str) -> AsyncIterator[Row]:
        async for session, at in self._pairs(key + "heard"):
            yield {"session": session, "at": float(at)}

    async def _help(self, key: str) -> AsyncIterator[Row]:
        async for user, reported in self._pairs(key + "help"):
            queued, sent = reported.split()
            yield {
                "user": user,
                "queued_at": float(queued),
                "sent_at": None if sent == "-" else float(sent),
            }

    async def _pairs(self, key: str) -> AsyncIterator[tuple[str, str]]:
        reported = set()  # a scan may show one more than once
        async for field, value in self._client.hscan_iter(key, count=1000):
            if field not in reported:
                reported.add(field)
                yield field.decode(), value.decode()

    async def _keys(self, pattern: str) -> AsyncIterator[str]:
        reported = set()
        async for key in self._client.scan_iter(match=pattern, count=1000):
            if key not in reported:
                reported.add(key)
                yield key.decode()

    async def _histories(self, key: str) -> AsyncIterator[Row]:
        async for keys in _chunks(self._keys(key + "h:*")):
            for one in await self._each("LRANGE", keys, 0, -1):
                # An erasure mixes them.
                for line in sorted(map(_read_json, one), key=lambda line: int(line[0])):
                    row = _typed(zip(_HISTORY, line, strict=True))
                    cause = history_rows.unpack(
                        row["why"] or "", user=row["user"], kind=row["kind"]
                    )
                    yield row | cause._asdict()

    async def _tenants(self, key: str) -> AsyncIterator[Row]:
        all_ = [await self._client.hgetall(key + name) for name in _OF_TENANTS]
        for tenant in sorted(set().union(*all_)):
            facts = zip(_OF_TENANTS, (one.get(tenant, b"") for one in all_), strict=True)
            row = _typed((name, value.decode()) for name, value in facts)
            yield row | {"id": int(tenant), "delivered": row["delivered"] or 0}

    async def _held(self, key: str) -> AsyncIterator[Row]:
        users = [user.decode() for user in await self._client.zrange(key + "held_until", 0, -1)]
        held = await self._each("LRANGE", [f"{key}held:{user}" for user in users], 0, -1)
        for user, lines in zip(users, held, strict=True):
            for row in map(_read_json, lines):
                row["sent_second"], row["sent_fraction"] = row.pop("sent")
                row["idempotency_key"] = row.pop("key")
                body = row.pop("body").encode("utf-8", "surrogateescape")
                yield _typed(row.items()) | {"user": user, "body": body}

    async def _unreadable(self, key: str) -> AsyncIterator[Row]:
        ids = await self._client.zrange(key + "unreadable", 0, -1)
        keys = [f"{key}u:{id_.decode()}" for id_ in ids]
        for place in range(0, len(keys), _BODIES):
            for fields in await self._each("HGETALL", keys[place : place + _BODIES]):
                row = _typed((n.decode(), v.decode()) for n, v in fields.items() if n != b"body")
                yield row | {"body": fields[b"body"]}

    async def _letters(self, key: str) -> AsyncIterator[Row]:
        async for id_, fields in self._by_id(key, "letters", "x:"):
            yield _message(id_, fields) | {"answer": fields[b"answer"]}

    async def _deliveries(self, key: str) -> AsyncIterator[Row]:
        async for some in _chunks(self._by_id(key, "ids", "d:")):
            rows = [_message(id_, fields) for id_, fields in some]
            lines = [f"{row['tenant']}:{row['user']}" for row in rows]
            firsts = await self._each("ZRANGE", [f"{key}l:{line}" for line in lines], 0, 0)
            dues = await self._client.hmget(key + "line_due", lines)
            for (id_, _), row, first, due in zip(some, rows, firsts, dues, strict=True):
                # When the line is due stands with its first.
                yield row | {"due": float(due) if due and first == [id_] else None}

    async def _by_id(
        self, key: str, ids: str, prefix: str
    ) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
        at = 0
        while some := await self._client.zrange(key + ids, at, at + _BODIES - 1):
            at += len(some)
            keys = [f"{key}{prefix}{id_.decode()}" for id_ in some]
            for id_, fields in zip(some, await self._each("HGETALL", keys), strict=True):
                yield id_, fields

    async def _each(self, command: str, keys: list[str], *args: Any) -> list[Any]:
        """The answers to the command about each of keys."""
        pipeline = self._client.pipeline(transaction=False)
        for key in keys:
            pipeline.execute_command(command, key, *args)
        answers: list[Any] = await pipeline.execute() if keys else []
        return answers

    async def _seen(self, key: str) -> AsyncIterator[Row]:
        async for keys in _chunks(self._keys(key + "seen:*")):
            for one, reported in zip(keys, await self._each("GET", keys), strict=True):
                for entry in (
                    reported.decode().split(";") if reported else ()
                ):  # None: it is too old
                    phone, lid, routed = entry.split(",")
                    yield {
                        "key": one.removeprefix(key + "seen:"),
                        "phone": packing.signed(phone),
                        "lid": packing.signed(lid),
                        "routed": int(routed),
                    }

    # what is put down

    async def empty(self) -> None:
        before = await self._client.get(MARK)
        if before != UNFINISHED:  # no router begins meanwhile
            await self._client.set(MARK, LOOKING, ex=_CLOSED_SECONDS)
        try:
            await self._refuse_routers()
            if await self._client.get(_closed(HOME)):
                raise StartRefused(
                    f"{self.place}: what is there has been migrated away once: use another"
                    " database, or delete its keys (FLUSHDB)"
                )
            if before not in (UNFINISHED, ARRIVED):
                there = {name: n for name, n in (await self.counts()).items() if n}
                if there:
                    reported = ", ".join(f"{n} {name}" for name, n in there.items())
                    raise StartRefused(
                        f"{self.place}: is not empty ({reported}): use another database"
                    )
            await self._client.set(MARK, UNFINISHED)
            await self._refuse_routers()  # one may have begun: it looks for the mark again, too
        except BaseException:
            # If a router uses it, what arrived by a migration is no migration's any more.
            if before != UNFINISHED:
                await self._client.delete(MARK)
            raise
        async for key in self._client.scan_iter(match="gw:*", count=1000):
            if key != MARK.encode():
                await self._client.unlink(key)
        await self._scripts.adopt_store()
        self._numbers = {HOME: await self._scripts.number_of(HOME)}

    async def put(self, table: str, rows: list[Row]) -> None:
        by_session: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if table == "seen":  # of which session is hidden in its key
                hashes = {name: packing.hexed(row[name]) for name in ("phone", "lid")}
                for session in self._numbers:
                    by_session[session].append(row | hashes)
            else:
                user = row.get("user") or row.get("lid")
                by_session[session_of(UserId(user)) if user else HOME].append(row)
        await asyncio.gather(*(self._put(table, *some) for some in by_session.items()))

    async def _put(self, table: str, session: str, rows: list[Row]) -> None:
        if session not in self._numbers:
            self._numbers[session] = await self._scripts.number_of(session)
        base = first_id(self._numbers[session])
        if table == "history":
            rows = [
                row | {"why": history_rows.pack(Cause(row["why"], row["who"], row["other"]))}
                for row in rows
            ]
        packed = list(map(_packed, rows))
        if table in _WITH_BODY:
            run = self._scripts.run
            await asyncio.gather(
                *(
                    run(session, "bring", body, table=table, rows=[texts], base=base)
                    for texts, body in packed
                )
            )
        else:
            texts = [one for one, _ in packed]
            await self._scripts.run(session, "bring", table=table, rows=texts, base=base)

    async def arrived(self) -> None:
        await self._client.set(MARK, ARRIVED)

    async def left(self, place: str) -> None:
        if self._closing:
            if self._was_open or await self._client.get(_closed(HOME)) != self._token:
                raise StartRefused(
                    f"{self.place}: was not to be reached for a while, and a router may have begun"
                    " there: run the migration again"
                )
            self._closing.cancel()
            self._closing = None
        for session in self._numbers:
            await self._client.set(_closed(session), place)
        await self._scripts.close_registry(math.inf)

    async def reopen(self) -> None:
        for session in self._numbers:
            await self._client.delete(_closed(session))
        await self._scripts.close_registry(0)

    async def close(self) -> None:
        if self._closing:  # it did not leave
            self._closing.cancel()
            with contextlib.suppress(RedisError, OSError, StoreUnavailable):  # or in a minute
                if await self._client.get(_closed(HOME)) == self._token:
                    await self.reopen()
        await self._scripts.close()


_READERS = {
    "lock": RedisContents._locks,
    "alias": RedisContents._aliases,
    "history": RedisContents._histories,
    "help": RedisContents._help,
    "heard": RedisContents._heard,
    "tenant": RedisContents._tenants,
    "dead_letter": RedisContents._letters,
    "held": RedisContents._held,
    "unreadable": RedisContents._unreadable,
    "delivery": RedisContents._deliveries,
    "seen": RedisContents._seen,
}


async def _chunks(items: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    some: list[T] = []
    async for item in items:
        some.append(item)
        if len(some) == _CHUNK:
            yield some
            some = []
    if some:
        yield some


def _closed(session: str) -> str:
    return f"gw:{{{session}}}:closed"


def _read_json(line: bytes) -> Any:
    """What cjson wrote: it leaves bytes as they are, also those that are no UTF-8."""
    return json.loads(line.decode("utf-8", "surrogateescape"))


def _typed(pairs: Iterable[tuple[str, str]]) -> Row:
    return {name: _NUMBERS.get(name, str)(value) if value != "" else None for name, value in pairs}


def _message(id_: bytes, fields: dict[bytes, bytes]) -> Row:
    binary = (b"body", b"answer")
    row = _typed(
        (name.decode(), value.decode()) for name, value in fields.items() if name not in binary
    )
    row["idempotency_key"] = row.pop("key")
    if "own_faults" in row:  # as the key of Redis is called
        row["poison_attempts"] = int(row.pop("own_faults") or 0)
    return row | {"id": int(id_), "body": fields[b"body"]}


def _packed(row: Row) -> tuple[dict[str, str], bytes]:
    """Texts by the names that lua/ has for them, and what is no text."""
    texts = {
        "key" if name == "idempotency_key" else name: _as_text(value)
        for name, value in row.items()
        if name not in ("body", "answer")
    }
    body: bytes = row.get("body", b"")
    if "answer" in row:
        texts["answer"], body = str(len(row["answer"])), row["answer"] + body
    return texts, body


def _as_text(value: str | float | None) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
