"""The format of the keys in Redis: its number, and how an older one is brought up to this one.

1  before formats had a number. Other names for keys (_RENAMED), help messages as "queued sent",
   held messages with their bodies, and the cause of an entry of the history as one text
2  facts.py, history.py and the heads of the files in lua/ say what there is

Every step can be done twice: after a kill in the middle the next start goes on.
"""

import json
import logging
import secrets
import uuid
from typing import Any

import orjson

from gateway.domain.lock_events import Kind, Why
from gateway.domain.person import Help, Person
from gateway.errors import StartRefused
from gateway.store import person_record
from gateway.store.redis.facts import CONTENT, Command
from gateway.store.redis.scripts import FORMAT, Scripts

_UNFINISHED = "gw:upgrade"  # there from the first step to the last
_MUTEX, _MUTEX_SECONDS = "gw:upgrading", 60
_CHUNK = 500

_RENAMED = {
    "fly": "in_flight",
    "flying": "in_flight_of",
    "line_due": "queue_due",
    "letters": "dead_letters",
    "sighted": "linked_at",
}
_RENAMED_GROUPS = {
    "l:": "queue:",
    "lines:": "tenants_of:",
    "letters_of:": "dead_letters_of:",
    "letters_to:": "dead_letters_to:",
}
_SAYS_WAHA = ", says WAHA"
_CAUSES = {
    "operator": Why.OPERATOR,
    "operator, with all of the tenant": Why.TENANT_MOVE,
    "router_mappings.json": Why.IMPORT,
}

log = logging.getLogger(__name__)


async def bring_up(scripts: Scripts) -> None:
    """Bring the keys of an older format up to FORMAT. Raise StartRefused if a router may still
    use them."""
    client = scripts.client
    number = await scripts.format_number()
    if number == FORMAT and not await scripts.call(client.exists(_UNFINISHED)):
        return
    if await scripts.has_live_lease():
        raise StartRefused(
            f"STORE_URL: this Redis has format {number}, and a router of an older version uses it,"
            " or was killed within the last 15 s: stop all routers, start one of this version,"
            " then the others"
        )
    token = uuid.uuid4().hex
    if not await scripts.call(client.set(_MUTEX, token, nx=True, ex=_MUTEX_SECONDS)):
        raise StartRefused(
            f"STORE_URL: another router brings this Redis up to format {FORMAT}, or was killed"
            " while it did: try again in a minute"
        )
    await scripts.call(client.set(_UNFINISHED, str(FORMAT)))
    await scripts.set_format_number()  # older routers refuse it from now on
    for session in await scripts.sessions():
        await _Upgrade(scripts, session).run()
    await scripts.call(client.delete(_UNFINISHED))
    if await scripts.call(client.get(_MUTEX)) == token.encode():
        await scripts.call(client.delete(_MUTEX))
    log.warning(
        "Redis had format %s and has format %s now",
        min(number, FORMAT - 1),
        FORMAT,
        extra={"event": "store.upgraded"},
    )


class _Upgrade:
    """From format 1 to 2, of one session."""

    def __init__(self, scripts: Scripts, session: str) -> None:
        self._scripts = scripts
        self._session = session
        self._prefix = f"gw:{{{session}}}:"

    async def run(self) -> None:
        await self._rename()
        await self._deliveries()
        await self._help()
        await self._held()
        await self._histories()

    async def _names(self, pattern: str) -> list[str]:
        keys: list[str] = []
        async for key in self._scripts.client.scan_iter(
            match=f"{self._prefix}{pattern}", count=1000
        ):
            keys.append(key.decode().removeprefix(self._prefix))
        return sorted(set(keys))

    async def _apply(self, changes: list[Command]) -> None:
        for start in range(0, len(changes), _CHUNK):
            await self._renew_mutex()
            await self._scripts.transact(self._session, changes[start : start + _CHUNK])

    async def _renew_mutex(self) -> None:
        await self._scripts.call(self._scripts.client.expire(_MUTEX, _MUTEX_SECONDS))

    async def _rename(self) -> None:
        there = await self._scripts.read(self._session, *(["EXISTS", old] for old in _RENAMED))
        pairs = [pair for pair, one in zip(_RENAMED.items(), there, strict=True) if one]
        for old, new in _RENAMED_GROUPS.items():
            pairs += [(name, new + name.removeprefix(old)) for name in await self._names(f"{old}*")]
        await self._apply([["RENAME", old, self._prefix + new] for old, new in pairs])

    async def _deliveries(self) -> None:
        (ids,) = await self._scripts.read(self._session, ["ZRANGE", "ids", "0", "-1"])
        keys = [f"d:{id_.decode()}" for id_ in ids]
        for start in range(0, len(keys), _CHUNK):
            some = keys[start : start + _CHUNK]
            found = await self._scripts.read(
                self._session, *(["HGET", key, "own_faults"] for key in some)
            )
            changes: list[Command] = []
            for key, value in zip(some, found, strict=True):
                if value is not None:
                    changes.append(["HSET", key, "poison_attempts", value.decode()])
                    changes.append(["HDEL", key, "own_faults"])
            await self._apply(changes)

    async def _help(self) -> None:
        (found,) = await self._scripts.read(self._session, ["HGETALL", "help"])
        changes: list[Command] = []
        for user, value in zip(found[::2], found[1::2], strict=True):
            queued, sent = value.decode().split()
            help_ = Help(float(queued), None if sent == "-" else float(sent))
            record = person_record.pack(Person(help=help_))
            changes.append(["HSET", "person", user.decode(), str(record)])
            updated = help_.queued_at if help_.sent_at is None else help_.sent_at
            changes.append(["ZADD", "person_updated", repr(updated), user.decode()])
        await self._apply(changes)
        await self._apply([["DEL", "help"]])

    async def _held(self) -> None:
        for name in await self._names("held:*"):
            (texts,) = await self._scripts.read(self._session, ["LRANGE", name, "0", "-1"])
            entries = list(map(_read_json, texts))
            if all("body_id" in entry for entry in entries):
                continue
            user, bodies = name.removeprefix("held:"), b""
            changes: list[Command] = [["DEL", name]]
            for entry in entries:
                id_, body = secrets.token_hex(8), entry["body"].encode("utf-8", "surrogateescape")
                facts = {"sent": entry["sent"]} | {one: entry.get(one, "") for one in CONTENT}
                changes.append(["RPUSH", name, json.dumps(facts | {"body_id": id_})])
                place = [len(bodies) + 1, len(bodies) + len(body)]
                changes.append(["body", "held_body", id_, *place])
                changes.append(["SADD", f"holders:{entry['key']}", user])
                bodies += body
            oldest = min(entries, key=lambda entry: float(entry["arrived"]))["arrived"]
            changes.append(["ZADD", "held_since", oldest, user])
            await self._scripts.transact(self._session, changes, bodies)
            await self._renew_mutex()
        await self._apply([["DEL", "held_key"], ["DEL", "held_until"]])

    async def _histories(self) -> None:
        for name in await self._names("h:*"):
            (texts,) = await self._scripts.read(self._session, ["LRANGE", name, "0", "-1"])
            rows = [orjson.loads(text) for text in texts]
            changes: list[Command] = [
                ["LSET", name, str(place), orjson.dumps(row[:9] + _cause(row)).decode()]
                for place, row in enumerate(rows)
                if len(row) == 10
            ]
            await self._apply(changes)


def _cause(row: list[str]) -> list[str]:
    """Return why, who and other of an entry whose cause is one text."""
    user, kind, text = row[2], row[3], row[9]
    if text in _CAUSES:
        return [_CAUSES[text].value, "", ""]
    who = "waha" if text.endswith(_SAYS_WAHA) else ""
    verb, _, other = text.removesuffix(_SAYS_WAHA).partition(" ")
    if verb in ("is", "was"):
        why = Why.MERGED_INTO if verb == "is" else Why.MERGED_FROM
        return [why.value, who, other]
    # Of a merge with somebody who was erased since nothing is left.
    if user.startswith("erased-") or kind == Kind.MERGED.value:
        return ["", "", ""]
    return [Why.LINK.value, "", ""]


def _read_json(text: bytes) -> dict[str, Any]:
    """What cjson wrote: it leaves bytes as they are, also those that are no UTF-8."""
    found: dict[str, Any] = json.loads(text.decode("utf-8", "surrogateescape"))
    return found
