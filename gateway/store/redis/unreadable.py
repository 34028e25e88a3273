"""Messages that went to nobody, in one session's keys.

unreadable: their ids.  u:<id>: one.  unreadable_of:<user>: theirs.
unreadable_key: dedup key of the event -> id.
"""

import json

from gateway.domain.model import InboundMessage, Unreadable, UnreadableReason, UserId
from gateway.store.base import (
    DECRYPTION_SECONDS,
    MAX_UNREADABLE,
    MAX_UNREADABLE_BYTES,
    UNREADABLE_SECONDS,
)
from gateway.store.redis import rows
from gateway.store.redis.facts import Command
from gateway.store.redis.scripts import Scripts

_CHUNK = 500  # looked at in one call
_NEWEST = 100  # that may still be waiting for their content


async def add(
    scripts: Scripts, session: str, message: InboundMessage, reason: UnreadableReason
) -> None:
    row = {
        "key": message.dedup_key.digest.hex() if message.dedup_key else "",
        "arrived": repr(message.arrived),
        "session": message.session,
        "event": message.event,
        "reason": reason.value,
        "user": message.phone or message.lid or "",
        "message_id": message.message_id or "",
    }
    await put(scripts, session, row, message.body)


async def put(scripts: Scripts, session: str, row: dict[str, str], body: bytes) -> None:
    """Add one, unless one of its key is there."""
    key, user = row["key"], row["user"]
    reads: list[Command] = [
        ["HGET", "numbers", "unreadable_id"],
        *([["HGET", "unreadable_key", key]] if key else []),
    ]
    last, *same_key = await scripts.read(session, *reads)
    if any(same_key):
        return
    id_ = int(last or 0) + 1
    changes: list[Command] = [
        ["HSET", "numbers", "unreadable_id", str(id_)],
        ["HSET", f"u:{id_}", *(part for field in row.items() for part in field)],
        ["body", f"u:{id_}", "body", 1, len(body)],
        ["ZADD", "unreadable", str(id_), str(id_)],
    ]
    if key:
        changes.append(["HSET", "unreadable_key", key, str(id_)])
    if user:
        changes.append(["ZADD", f"unreadable_of:{user}", str(id_), str(id_)])
    expected = [json.dumps(last.decode()) if last else "false", *["false"] * len(same_key)]
    state, _ = await scripts.transact(session, changes, body, reads=reads, expected=expected)
    if state == "read":  # another one came meanwhile
        await put(scripts, session, row, body)


async def some(
    scripts: Scripts, session: str, *, limit: int, before: int | None
) -> list[Unreadable]:
    last = "+inf" if before is None else f"({before}"
    (ids,) = await scripts.read(
        session, ["ZREVRANGEBYSCORE", "unreadable", last, "-inf", "LIMIT", "0", str(limit)]
    )
    found = await scripts.read(
        session, *(["HMGET", f"u:{id_.decode()}", *rows.UNREADABLE] for id_ in ids)
    )
    return [rows.unreadable(int(id_), row) for id_, row in zip(ids, found, strict=True) if row[0]]


async def count(scripts: Scripts, session: str, now: float) -> int:
    """Without what came just now and may be decrypted in a moment."""
    total, newest = await scripts.read(
        session, ["ZCARD", "unreadable"], ["ZREVRANGE", "unreadable", "0", str(_NEWEST - 1)]
    )
    facts = await scripts.read(
        session, *(["HMGET", f"u:{id_.decode()}", "arrived", "reason"] for id_ in newest)
    )
    pending = UnreadableReason.NOT_DECRYPTED.value.encode()
    soon = sum(
        arrived is not None and float(arrived) > now - DECRYPTION_SECONDS and reason == pending
        for arrived, reason in facts
    )
    return int(total - soon)


async def sweep(scripts: Scripts, session: str, now: float) -> None:
    """Delete what is too old or too much, and what has come after all."""
    (ids,) = await scripts.read(session, ["ZREVRANGE", "unreadable", "0", "-1"])
    size = 0
    for start in range(0, len(ids), _CHUNK):
        chunk = [id_.decode() for id_ in ids[start : start + _CHUNK]]
        reads: list[Command] = []
        for id_ in chunk:
            reads.append(["HSTRLEN", f"u:{id_}", "body"])
            reads.append(["HMGET", f"u:{id_}", "arrived", "reason", "key"])
        answers = await scripts.read(session, *reads)
        over: list[str] = []
        pending: list[tuple[str, str]] = []
        for place, (id_, (length, facts)) in enumerate(
            zip(chunk, rows.pairs(answers), strict=True), start
        ):
            size += length
            arrived, reason, key = facts
            is_old = arrived is None or float(arrived) <= now - UNREADABLE_SECONDS
            if is_old or place >= MAX_UNREADABLE or size > MAX_UNREADABLE_BYTES:
                over.append(id_)
            elif key and reason == UnreadableReason.NOT_DECRYPTED.value.encode():
                pending.append((id_, key.decode()))
        came = await scripts.read(session, *(["EXISTS", f"seen:{key}"] for _, key in pending))
        over += [id_ for (id_, _), is_there in zip(pending, came, strict=True) if is_there]
        if over:
            changes = await deletion(scripts, session, over)
            await scripts.transact(session, changes, makes_room=True)


async def deletion(scripts: Scripts, session: str, ids: list[str]) -> list[Command]:
    """Return the commands that delete them."""
    fields = await scripts.read(session, *(["HMGET", f"u:{id_}", "key", "user"] for id_ in ids))
    changes: list[Command] = []
    for id_, (key, user) in zip(ids, fields, strict=True):
        changes += [["ZREM", "unreadable", id_], ["DEL", f"u:{id_}"]]
        if key:
            changes.append(["HDEL", "unreadable_key", key.decode()])
        if user:
            changes.append(["ZREM", f"unreadable_of:{user.decode()}", id_])
    return changes


async def ids_of(scripts: Scripts, session: str, user: UserId) -> list[str]:
    (found,) = await scripts.read(session, ["ZRANGE", f"unreadable_of:{user}", "0", "-1"])
    return [id_.decode() for id_ in found]
