"""Calling Redis: which one STORE_URL names, whether it can be trusted, and the scripts in lua/.

Operations of one session that are asked for while a call is under way go together in the next one:
what costs is the call. Each is still one step: a script runs undisturbed.
"""

import asyncio
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import orjson
import redis.asyncio
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError

from gateway.domain.model import UserId
from gateway.errors import StartRefused, StoreUnavailable
from gateway.log import Throttle
from gateway.store.files.journal import Committed
from gateway.store.retry_after import RetryAfter

_AT_ONCE = 64  # operations in one call, which keeps others waiting: some 3 ms
_BYTES_AT_ONCE = 8_388_608
_GROWING = frozenset({"test_write", "transact"})
_SECONDS = 10.0  # for a connection or an answer
_FILES = ("base", "queues", "dead_letters", "transact", "call")

HOME = "~"  # the hash tag of WAHA_SESSION, whose users have no prefix; no session has it
MARK = "gw:moved"  # there while this Redis is filled by a migration, and until a router uses it
LOOKING, UNFINISHED, ARRIVED = b"looking", b"unfinished", b"arrived"

_IDS_OF_A_SESSION = 10**10
_UNTIL = "!"  # no session's name: until when no new session is taken in, Unix seconds
_ID = "#"  # no session's name either: the store's id
_FORMAT = "%"  # the number of the format that the keys have
FORMAT = 2  # see formats.py
# Said by a Redis that is empty, or holds another store, while a router works on this one.
_ANOTHER_STORE = (
    "STOREID it does not hold the store that this router opened: it came back empty, or another"
    " is in its place. Restore it from its append-only file or a back-up; to begin with what it"
    " holds now, restart the routers"
)
_NUMBER = """
if redis.call('HGET', KEYS[1], '#') ~= ARGV[2] then return redis.error_reply(ARGV[3]) end
local number = redis.call('HGET', KEYS[1], ARGV[1])
if number then return number end
local closed = redis.call('HGET', KEYS[1], '!')
if closed and tonumber(closed) > tonumber(redis.call('TIME')[1]) then
  return redis.error_reply('what was here has been migrated, or is being migrated')
end
number = redis.call('HLEN', KEYS[1]) - (closed and 2 or 1)
redis.call('HSET', KEYS[1], ARGV[1], number)
return number
"""

# Errors that concern the server, or us at it, and not the operation: no other would be done.
_OF_THE_SERVER: tuple[type[RedisError], ...] = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.MasterDownError,
    redis.exceptions.AuthenticationError,
    NoPermissionError,
)
_CODES_OF_THE_SERVER = re.compile(  # where redis-py has no class, or a script's text holds it
    r"\b(?:OOM|READONLY|MISCONF|NOREPLICAS|LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY|UNKILLABLE"
    r"|NOAUTH|WRONGPASS|NOPERM|STOREID|max number of clients)\b"
)
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel")

log = logging.getLogger(__name__)

Client = redis.asyncio.Redis | redis.asyncio.RedisCluster


@dataclass(slots=True)
class _Operation:
    name: str
    args: bytes
    body: bytes
    done: asyncio.Future[Any]


def session_of(user: UserId) -> str:
    return user.rpartition("/")[0] or HOME


def first_id(number: int) -> str:
    """Below which there are no ids of deliveries of the session with that number."""
    return str(number * _IDS_OF_A_SESSION)


def padded(id_: int) -> str:
    return f"{id_:016d}"


def _take_some(queue: deque[_Operation]) -> list[_Operation]:
    """For one call, first those that take up memory: once a script has written something else Redis
    lets it write on though its memory is full (that is what the others need, to make room)."""
    some, size = [queue.popleft()], 0
    while queue and len(some) < _AT_ONCE and size < _BYTES_AT_ONCE:
        some.append(queue.popleft())
        size += len(some[-1].body)
    return sorted(some, key=lambda one: one.name not in _GROWING)


def without_none(args: dict[str, Any]) -> dict[str, Any]:
    """Lua's JSON reads null as something that is true."""
    return {name: value for name, value in args.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Memory:
    """policy: the maxmemory-policy by which a server drops keys; None if none does. dropped: how
    many it has dropped so for want of memory since its start."""

    policy: str | None
    dropped: int


class Scripts:
    """trouble is why Redis does not do what it is asked, None while it does."""

    def __init__(self, client: Client, *, committed: Committed) -> None:
        self.client = client
        self.trouble: str | None = None
        self.retry_after = RetryAfter()
        self._text = _text()
        self._store_id = ""
        self._in_store: set[str] = set()  # sessions
        self._committed = committed
        self.refusing: set[str] = set()  # sessions whose server takes no writes
        self._complaints = Throttle()
        self._sha: str | None = None
        self._queues: dict[str, deque[_Operation]] = {}
        self._senders: dict[str, asyncio.Task[None]] = {}

    async def call(self, command: Awaitable[Any]) -> Any:
        """The command's answer; StoreUnavailable if there is none."""
        try:
            # A task that is cancelled while it waits for an answer must not leave it to the next
            # one on the same connection.
            result = await asyncio.shield(asyncio.ensure_future(command))
        except NoScriptError:
            raise
        except (RedisError, OSError, TimeoutError) as exc:
            raise self._failed(exc) from exc
        return result

    def _note_answers(self, session: str, some: list[_Operation], answers: list[Any]) -> None:
        """What a script that went through shows of the server."""
        errors = [one for one in answers if isinstance(one, Exception)]
        refused = next((one for one in errors if _is_of_the_server(one)), None)
        if refused:
            self._failed(refused)
            self.refusing.add(session)
            return
        if session in self.refusing and any(map(_proves_writing, some, answers)):
            self.refusing.discard(session)
        # What only reads says nothing of a server that takes no writes.
        if self.trouble is not None and not self.refusing:
            log.warning("Redis answers again", extra={"event": "store.healed"})
            self.trouble = None

    def _failed(self, exc: Exception) -> StoreUnavailable:
        if self.trouble is None:
            log.error(
                "Redis does not do what it is asked (%s): webhooks get 503 until it does",
                _reason(exc),
                extra={"event": "store.failed"},
            )
        self.trouble = _reason(exc)
        return self.retry_after.unavailable(f"Redis: {self.trouble}")

    def _failed_alone(self, name: str, exc: Exception) -> StoreUnavailable:
        """One operation of several; what it had written so far stays, as Redis has it."""
        if not _is_of_the_server(exc):
            self._complaints.warn(
                log,
                (name, str(exc)),
                "The operation %s failed in Redis: %s",
                name,
                exc,
                event="store.error",
            )
        return self.retry_after.unavailable(f"Redis: {exc}")

    async def run(self, session: str, op: str, body: bytes = b"", **args: Any) -> Any:
        """What the operation answers; texts as bytes."""
        return await self._ask_for(session, op, orjson.dumps(without_none(args)), body)

    def _ask_for(self, session: str, op: str, packed: bytes, body: bytes) -> asyncio.Future[Any]:
        one = _Operation(op, packed, body, asyncio.get_running_loop().create_future())
        self._queues.setdefault(session, deque()).append(one)
        if session not in self._senders:
            self._senders[session] = asyncio.create_task(self._send(session))
        return one.done

    async def read(self, session: str, *commands: list[Any]) -> list[Any]:
        """The answer to each; keys are without the session's prefix, texts are bytes."""
        if not commands:
            return []
        answers: list[Any] = await self.run(session, "read", reads=list(commands))
        return answers

    async def transact(
        self,
        session: str,
        changes: list[list[Any]] | None,
        bodies: bytes = b"",
        *,
        reads: list[list[Any]] | orjson.Fragment | None = None,
        expected: list[str] | orjson.Fragment | None = None,
        limits: dict[str, int] | None = None,
        makes_room: bool = False,
    ) -> tuple[str, Any]:
        """Apply changes if each of reads is still answered as expected: see lua/transact.lua.

        Return "changed" and the counts of what the changes did; "read" and the answers, in JSON, if
        they were others, or there are no changes; or "full" and why no more can wait. makes_room:
        to be done though Redis' memory is full.
        """
        args: dict[str, Any] = {"reads": reads or []}
        if changes is not None:
            args |= {"changes": changes, "expected": expected}
        if limits is not None:
            args["limits"] = limits
        name = "free" if makes_room else "transact"
        state, found = await self._ask_for(session, name, orjson.dumps(args), bodies)
        if state == b"read":
            found = [one.decode() for one in found]
        return state.decode(), found

    async def sessions(self) -> dict[str, int]:
        """All that are known, each with its number."""
        found = await self.call(self.client.hgetall("gw:sessions"))
        others = (_UNTIL.encode(), _ID.encode(), _FORMAT.encode())
        return {name.decode(): int(number) for name, number in found.items() if name not in others}

    async def store_id(self) -> str | None:
        """Of the store that is there; None if it is empty, or of before there were ids."""
        found = await self.call(self.client.hget("gw:sessions", _ID))
        return None if found is None else str(found.decode())

    async def adopt_store(self) -> str:
        """Work on the store that is there from now on, and on no other; its id. An empty Redis gets
        a new one, and a store of before there were ids gets its id now."""
        found = await self.call(self.client.hget("gw:sessions", _ID))
        if found is None:
            if not await self.sessions():
                await self.set_format_number()
            await self.call(self.client.hsetnx("gw:sessions", _ID, uuid.uuid4().hex))
            found = await self.call(self.client.hget("gw:sessions", _ID))
        self._store_id = found.decode()
        if (number := await self.format_number()) > FORMAT:
            raise StartRefused(
                f"STORE_URL: this Redis has format {number}, and this router knows formats up"
                f" to {FORMAT}: run a newer router on it"
            )
        for session in await self.sessions():
            await self.mark(session)
        return self._store_id

    async def format_number(self) -> int:
        found = await self.call(self.client.hget("gw:sessions", _FORMAT))
        return 1 if found is None else int(found)

    async def set_format_number(self) -> None:
        await self.call(self.client.hset("gw:sessions", _FORMAT, str(FORMAT)))

    async def has_live_lease(self) -> bool:
        """Whether a router uses this Redis, or was killed while it did."""
        async for key in self.client.scan_iter(match="gw:{*}:lease:*", count=1000):
            if await self.call(self.client.exists(key)):
                return True
        return False

    async def mark(self, session: str) -> None:
        """From now on all that is done to the session is done to this store, or fails."""
        key = f"gw:{{{session}}}:store"
        # Not written without need: a router must be able to start though Redis' memory is full.
        found = await self.call(self.client.get(key))
        if found is None:
            await self.call(self.client.set(key, self._store_id, nx=True))
        elif found.decode() != self._store_id:
            raise StoreUnavailable(
                f"Redis: what it holds of WAHA session {session} belongs to another store than its"
                " list of sessions does: a node came back empty. Restore it"
            )
        self._in_store.add(session)

    async def close_registry(self, until: float) -> None:
        """No session becomes known that is not yet, until then (Unix seconds)."""
        await self.call(self.client.hset("gw:sessions", _UNTIL, repr(until)))

    async def number_of(self, session: str) -> int:
        """A new one if it is not known."""
        found = await self.call(
            self.client.eval(_NUMBER, 1, "gw:sessions", session, self._store_id, _ANOTHER_STORE)
        )
        await self.mark(session)
        return int(found)

    async def time(self) -> float:
        """Unix seconds by Redis' clock; of a cluster by one of its nodes'."""
        found: Any = await self.call(self.client.time())
        if isinstance(found, dict):
            found = next(iter(found.values()))
        seconds, microseconds = found
        return int(seconds) + int(microseconds) / 1e6

    async def memory(self) -> "Memory":
        """How the servers deal with a memory that is full."""
        found: dict[str, Any] = await self.call(self.client.info())
        return _memory(list(found.values()) if "redis_version" not in found else [found])

    async def _send(self, session: str) -> None:
        """Call after call until nothing is asked for any more."""
        queue = self._queues[session]
        try:
            while queue:
                some = _take_some(queue)
                try:
                    answers = await self._evaluate(session, some)
                except BaseException as exc:
                    for one in some:
                        if not one.done.done():
                            one.done.set_exception(exc)
                    if not isinstance(exc, Exception):
                        raise
                    continue
                for one, answer in zip(some, answers, strict=True):
                    if one.done.done():  # its caller was cancelled
                        continue
                    if isinstance(answer, Exception):
                        one.done.set_exception(self._failed_alone(one.name, answer))
                    else:
                        one.done.set_result(answer)
        finally:
            del self._senders[session]

    async def _evaluate(self, session: str, some: list[_Operation]) -> list[Any]:
        key = f"gw:{{{session}}}"
        asked = [value for one in some for value in (one.name, one.args, one.body)]
        # Nothing is kept of a session that nobody knows yet, its store's id neither.
        known = "known" if session in self._in_store else ""
        flat = [self._store_id, known, *asked]
        if self._sha is None:
            self._sha = await self.call(self.client.script_load(self._text))
        began = time.perf_counter()
        try:
            answers: list[Any] = await self.call(self.client.evalsha(self._sha, 1, key, *flat))
        except NoScriptError:  # Redis was started again, or its scripts were flushed
            answers = await self.call(self.client.eval(self._text, 1, key, *flat))
        except StoreUnavailable as exc:
            if _is_of_the_server(exc.__cause__ or exc):
                self.refusing.add(session)  # it may be that only writing is refused
            raise
        self._note_answers(session, some, answers)
        self._committed(time.perf_counter() - began, len(some))
        return answers

    async def close(self) -> None:
        if self._senders:
            await asyncio.wait(list(self._senders.values()))
        await self.client.aclose()


async def open_scripts(
    url: str,
    *,
    committed: Committed = lambda _seconds, _operations: None,
) -> Scripts:
    """url: redis://, rediss://, unix:, redis+cluster://<any node>, rediss+cluster://, or
    redis+sentinel://<sentinel>[,<sentinel>…]/<name>[/<database>][?sentinel_password=…].

    Raise StartRefused if Redis cannot be reached or used.
    """
    try:
        client = _client(url)
    except ValueError as exc:  # its text may hold the password
        raise StartRefused(
            f"STORE_URL={url.partition(':')[0]}:…: is no URL of a Redis. Special characters of a"
            " password are written as %2F (/), %23 (#), %40 (@), %3A (:)"
        ) from exc
    try:
        await _check(client)
    except (RedisError, OSError) as exc:
        await client.aclose()
        raise StartRefused(f"STORE_URL: {why_no_start(exc)}") from exc
    except StartRefused:
        await client.aclose()
        raise
    return Scripts(client, committed=committed)


def _client(url: str) -> Client:
    scheme = url.partition(":")[0]
    if scheme in ("redis+cluster", "rediss+cluster"):
        plain = url.replace("+cluster", "", 1)
        return redis.asyncio.RedisCluster.from_url(plain, socket_timeout=_SECONDS)
    if scheme == "redis+sentinel":
        return _behind_sentinels(url)
    return redis.asyncio.Redis.from_url(url, socket_timeout=_SECONDS)


def _behind_sentinels(url: str) -> Client:
    address = urlsplit(url)
    login, _, hosts = address.netloc.rpartition("@")
    user, _, password = login.partition(":")
    name, _, database = address.path.strip("/").partition("/")
    sentinels = []
    for host in hosts.split(","):
        one = urlsplit(f"//{host}")
        sentinels.append((one.hostname or "", one.port or 26379))
    if not name or not all(address for address, _ in sentinels):
        raise ValueError("must be redis+sentinel://host:26379,host:26379/name-of-the-master")
    options: dict[str, Any] = {"socket_timeout": _SECONDS}
    if given := parse_qs(address.query).get("sentinel_password"):
        options["password"] = given[-1]
    master: redis.asyncio.Redis = Sentinel(sentinels, sentinel_kwargs=options).master_for(  # type: ignore[no-untyped-call]
        name,
        db=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
        socket_timeout=_SECONDS,
    )
    return master


async def _check(client: Client) -> None:
    """Raise StartRefused if this Redis would lose what it stores."""
    answer: dict[str, Any] = await client.info()
    for found in [answer] if "redis_version" in answer else answer.values():  # of a cluster by node
        _check_server(found)


def _check_server(found: dict[str, Any]) -> None:
    version = str(found["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < (6, 2):
        raise StartRefused(f"STORE_URL: Redis {version} is too old: 6.2 or newer is needed")
    memory = _memory([found])
    if memory.policy and found.get("maxmemory"):
        raise StartRefused(
            "STORE_URL: Redis drops what it has no room for (maxmemory-policy"
            f" {memory.policy}), locks among it: set noeviction"
        )
    if memory.policy:
        log.warning(
            "Redis would drop locks once a maxmemory is set (maxmemory-policy %s): set noeviction",
            memory.policy,
            extra={"event": "store.evicts"},
        )
    if not found.get("aof_enabled"):
        log.warning(
            "Redis keeps no append-only file: what it got since its last save is lost when it"
            " dies. Set appendonly yes and appendfsync always",
            extra={"event": "store.no_aof"},
        )


def _memory(servers: list[dict[str, Any]]) -> Memory:
    policies = [str(one.get("maxmemory_policy", "noeviction")) for one in servers]
    evicting = [one for one in policies if one != "noeviction"]
    dropped = sum(int(one.get("evicted_keys", 0)) for one in servers)
    return Memory(evicting[0] if evicting else None, dropped)


def _is_of_the_server(exc: BaseException) -> bool:
    return isinstance(exc, _OF_THE_SERVER) or bool(_CODES_OF_THE_SERVER.search(str(exc)))


def _proves_writing(one: _Operation, answer: Any) -> bool:
    """Whether that answer is only given where something new could be written."""
    if isinstance(answer, Exception):
        return False
    return one.name == "test_write" or (one.name == "transact" and answer[0] == b"changed")


def _reason(exc: Exception) -> str:
    """Why it failed, without what only this project's code knows."""
    return str(exc).removeprefix("STOREID ") or type(exc).__name__


def why_no_start(exc: BaseException) -> str:
    """In words that name the cure."""
    text = str(exc).lower()
    if isinstance(exc, NoPermissionError) or "no permissions" in text:
        return f"the Redis user in it lacks a right ({exc}): see docs/scaling.md, Rights"
    if "invalid username-password" in text or "wrongpass" in text or "invalid password" in text:
        return "Redis does not take the user and password in it"
    if isinstance(exc, AuthenticationError) or "already authenticated" in text or "noauth" in text:
        return "Redis asks for a password, and it holds none: redis://:password@host:6379/0"
    return f"Redis does not answer ({exc}): is it running?"


def _text() -> str:
    folder = Path(__file__).parent / "lua"
    texts = [(folder / f"{name}.lua").read_text("utf-8") for name in _FILES]
    texts.insert(1, f'local ANOTHER_STORE = "{_ANOTHER_STORE}"\n')
    return "".join(texts)
