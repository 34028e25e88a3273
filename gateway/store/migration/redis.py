"""A Redis that is one end of a migration. Its keys are described in redis/lua/."""

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from gateway.domain.dedup import Copy, PersonHash
from gateway.domain.model import UserId
from gateway.domain.person import Known, Pair, PairIds
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store import person_record
from gateway.store.redis import formats, history, unreadable
from gateway.store.redis.commands import Commands
from gateway.store.redis.facts import Facts, copies
from gateway.store.redis.scripts import (
    ARRIVED,
    FORMAT,
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
_NUMBERS = {
    "id": int, "at": float, "from_tenant": int, "to_tenant": int, "changed_second": int,
    "changed_fraction": float, "tenant": int, "event_time": float, "arrived": float, "due": float,
    "attempts": int, "poison_attempts": int, "tried_at": float, "age": float, "died_at": float,
    "status": int, "sent_second": int, "sent_fraction": float,
    "delivered": int, "first_seen": float,
    "last_seen": float,
}  # fmt: skip
_OF_TENANTS = ("delivered", "first_seen", "last_seen")
_BYTES_AT_ONCE = 4_194_304


class RedisContents:
    """See migrate.Contents."""

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
        address = urlsplit(url)  # login and query may hold passwords
        self.place = f"{address.scheme}:"
        if address.netloc:
            self.place += f"//{address.netloc.rpartition('@')[2]}"
        self.place += address.path
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
        await self._bring_up()
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

    async def _bring_up(self) -> None:
        if self._numbers and not await self._client.get(_closed(HOME)):
            await self._scripts.adopt_store()
            await formats.bring_up(self._scripts)
        elif self._numbers and await self._scripts.format_number() != FORMAT:
            raise StartRefused(
                f"{self.place}: has been migrated away by an older router: run that one's migrate"
                " --reopen, and start a router of this version on it once"
            )

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
        if await self._scripts.has_live_lease():
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
                ("person", "person"),
                ("held", "held_body"),
                ("heard", "heard"),
            ):
                found[table] += await self._client.hlen(key + name)
            for table, name in (
                ("dead_letter", "dead_letters"),
                ("delivery", "ids"),
                ("unreadable", "unreadable"),
            ):
                found[table] += await self._client.zcard(key + name)
            found["tenant"] += sum(map(int, await self._client.hvals(key + "delivered")))
        for table in ("history", "seen"):
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
            times = await self._client.hmget(key + "linked_at", [lid for lid, _ in some])
            for (lid, phone), linked_at in zip(some, times, strict=True):
                yield {"lid": lid, "phone": phone, "linked_at": float(linked_at)}

    async def _heard(self, key: str) -> AsyncIterator[Row]:
        async for session, at in self._pairs(key + "heard"):
            yield {"session": session, "at": float(at)}

    async def _people(self, key: str) -> AsyncIterator[Row]:
        async for some in _chunks(self._pairs(key + "person")):
            users = [user for user, _ in some]
            times = await self._client.zmscore(key + "person_updated", users)
            for (user, record), updated in zip(some, times, strict=True):
                since = person_record.help_waits_since(person_record.unpack(record))
                yield {
                    "user": user,
                    "record": record,
                    "help_waits_since": since,
                    "updated_at": float(updated),
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
                for row in sorted(map(json.loads, one), key=lambda row: int(row[0])):
                    yield _typed(zip(history.COLUMNS, row, strict=True))

    async def _tenants(self, key: str) -> AsyncIterator[Row]:
        all_ = [await self._client.hgetall(key + name) for name in _OF_TENANTS]
        for tenant in sorted(set().union(*all_)):
            facts = zip(_OF_TENANTS, (one.get(tenant, b"") for one in all_), strict=True)
            row = _typed((name, value.decode()) for name, value in facts)
            yield row | {"id": int(tenant), "delivered": row["delivered"] or 0}

    async def _held(self, key: str) -> AsyncIterator[Row]:
        users = [user.decode() for user in await self._client.zrange(key + "held_since", 0, -1)]
        held = await self._each("LRANGE", [f"{key}held:{user}" for user in users], 0, -1)
        for user, texts in zip(users, held, strict=True):
            for row in map(json.loads, texts):
                row["sent_second"], row["sent_fraction"] = row.pop("sent")
                row["idempotency_key"] = row.pop("key")
                body = await self._client.hget(key + "held_body", row.pop("body_id"))
                yield _typed(row.items()) | {"user": user, "body": body}

    async def _unreadable(self, key: str) -> AsyncIterator[Row]:
        ids = await self._client.zrange(key + "unreadable", 0, -1)
        keys = [f"{key}u:{id_.decode()}" for id_ in ids]
        for place in range(0, len(keys), _BODIES):
            for fields in await self._each("HGETALL", keys[place : place + _BODIES]):
                row = _typed((n.decode(), v.decode()) for n, v in fields.items() if n != b"body")
                yield row | {"body": fields[b"body"]}

    async def _letters(self, key: str) -> AsyncIterator[Row]:
        async for id_, fields in self._by_id(key, "dead_letters", "x:"):
            yield _message(id_, fields) | {"answer": fields[b"answer"]}

    async def _deliveries(self, key: str) -> AsyncIterator[Row]:
        async for some in _chunks(self._by_id(key, "ids", "d:")):
            rows = [_message(id_, fields) for id_, fields in some]
            queues = [f"{row['tenant']}:{row['user']}" for row in rows]
            heads = await self._each("ZRANGE", [f"{key}queue:{one}" for one in queues], 0, 0)
            dues = await self._client.hmget(key + "queue_due", queues)
            for (id_, _), row, head, due in zip(some, rows, heads, dues, strict=True):
                # The head has what is due of its queue.
                yield row | {"due": float(due) if due and head == [id_] else None}

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
                # None: it is too old.
                for copy in copies(reported.decode() if reported else ""):
                    yield {
                        "key": one.removeprefix(key + "seen:"),
                        "phone": copy.person.phone,
                        "lid": copy.person.lid,
                        "routed": int(copy.routed),
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
        self._numbers = {}
        self._highest: dict[str, int] = {}  # ids of the history, by session
        await self._add_session(HOME)

    async def put(self, table: str, rows: list[Row]) -> None:
        by_session: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if table == "seen":  # of which session is hidden in its key
                for session in self._numbers:
                    by_session[session].append(row)
            else:
                user = row.get("user") or row.get("lid")
                by_session[session_of(UserId(user)) if user else HOME].append(row)
        await asyncio.gather(*(self._put(table, *some) for some in by_session.items()))

    async def _put(self, table: str, session: str, rows: list[Row]) -> None:
        if session not in self._numbers:
            await self._add_session(session)
        if table == "unreadable":
            for row in rows:
                texts = {name: _as_text(value) for name, value in row.items() if name != "body"}
                await unreadable.put(self._scripts, session, texts, row["body"])
            return
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if sum(len(one.get("body", b"")) for one in batch) > _BYTES_AT_ONCE:
                await self._put_some(table, session, batch)
                batch = []
        await self._put_some(table, session, batch)

    async def _put_some(self, table: str, session: str, rows: list[Row]) -> None:
        into = _Rows()
        for row in rows:
            _WRITERS[table](into, row)
        if table == "history" and rows:
            highest = max([self._highest.get(session, 0), *(row["id"] for row in rows)])
            self._highest[session] = highest
            into.all.append(["HSET", "numbers", "history_id", str(highest)])
        await self._scripts.transact(session, into.all, bytes(into.bodies))

    async def _add_session(self, session: str) -> None:
        number = self._numbers[session] = await self._scripts.number_of(session)
        await self._scripts.transact(session, [["HSET", "numbers", "base", first_id(number)]])

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
    "person": RedisContents._people,
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


def _typed(pairs: Iterable[tuple[str, str]]) -> Row:
    return {name: _NUMBERS.get(name, str)(value) if value != "" else None for name, value in pairs}


def _message(id_: bytes, fields: dict[bytes, bytes]) -> Row:
    binary = (b"body", b"answer")
    row = _typed(
        (name.decode(), value.decode()) for name, value in fields.items() if name not in binary
    )
    row["idempotency_key"] = row.pop("key")
    return row | {"id": int(id_), "body": fields[b"body"]}


class _Rows(Commands):
    """The commands that add rows."""

    def __init__(self) -> None:
        super().__init__(Facts(Known({}, {})), time.time())

    def lock(self, row: Row) -> None:
        self.set_lock(row["user"], row["tenant"])

    def alias(self, row: Row) -> None:
        lid, phone = row["lid"], row["phone"]
        self.add([PairIds(Pair(lid, None if phone == lid else phone, row["linked_at"]))])

    def history(self, row: Row) -> None:
        values = [_as_text(row[name]) for name in history.COLUMNS]
        self.put_entry(history.entry(json.dumps(values).encode()))

    def person(self, row: Row) -> None:
        user, since = row["user"], row["help_waits_since"]
        self.all.append(["HSET", "person", user, row["record"]])
        self.all.append(["ZADD", "person_updated", repr(row["updated_at"]), user])
        if since is not None:
            self.all.append(["ZADD", "help_waits", repr(since), user])

    def heard(self, row: Row) -> None:
        self.all.append(["HSET", "heard", row["session"], repr(row["at"])])

    def held(self, row: Row) -> None:
        sent = [_as_text(row["sent_second"]), _as_text(row["sent_fraction"])]
        self.add_held(row["user"], sent, _content(row), row["body"])

    def tenant(self, row: Row) -> None:
        """One for each session from which something of the tenant comes."""
        id_ = str(row["id"])
        self.all.append(["count", "delivered", id_, str(row["delivered"])])
        for change, name in (("least", "first_seen"), ("greatest", "last_seen")):
            if row[name] is not None:
                self.all.append([change, name, id_, repr(row[name])])

    def dead_letter(self, row: Row) -> None:
        names = ("tenant", "user", "alias", "attempts", "died_at", "reason", "status")
        fields = _content(row) | {name: _as_text(row[name]) for name in names}
        first, middle = self.put_body(row["answer"])
        _, last = self.put_body(row["body"])
        self.all.append(["add_dead_letter", fields, first, middle, last])

    def delivery(self, row: Row) -> None:
        names = ("attempts", "poison_attempts", "tried_at", "age")
        content = _content(row) | {name: _as_text(row[name]) for name in names}
        if row["due"] is not None:
            content["due"] = repr(row["due"])
        to = [row["user"], _as_text(row["alias"]), str(row["tenant"])]
        self.all.append(["add", *to, content, *self.put_body(row["body"])])

    def seen(self, row: Row) -> None:
        copy = Copy(PersonHash(row["phone"], row["lid"]), bool(row["routed"]))
        self.mark_seen(row["key"], copy)


_WRITERS: dict[str, Callable[[_Rows, Row], None]] = {
    "lock": _Rows.lock,
    "alias": _Rows.alias,
    "history": _Rows.history,
    "person": _Rows.person,
    "heard": _Rows.heard,
    "tenant": _Rows.tenant,
    "dead_letter": _Rows.dead_letter,
    "held": _Rows.held,
    "delivery": _Rows.delivery,
    "seen": _Rows.seen,
}


def _content(row: Row) -> dict[str, str]:
    return {
        "key": row["idempotency_key"],
        **{
            name: _as_text(row[name]) for name in ("event_time", "arrived", "message_id", "headers")
        },
    }


def _as_text(value: str | float | None) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
