"""What is known of persons, and what the rules change, in the texts and lists of the scripts."""

import json
from collections.abc import Iterable
from typing import Any

import orjson

from gateway.domain.dedup import Copy, PersonHash
from gateway.domain.lock_events import Kind
from gateway.domain.model import NEVER, DeliveryContent, Lock, Moment, TenantId, UserId, is_lid
from gateway.domain.person import (
    AddDelivery,
    Change,
    DropHeld,
    ForgetHeld,
    HeldMessage,
    Help,
    Hold,
    Known,
    LockChange,
    MarkSeen,
    Pair,
    PairIds,
    Person,
    RecordEvent,
    ReleaseHeld,
    RenameUser,
    SetHelp,
    SetLock,
)
from gateway.store.redis import history_rows
from gateway.store.redis.history_rows import Cause


def known_from(facts: bytes, seen: bytes) -> Known:
    """facts, seen: as `change` in lua/accept.lua says them."""
    persons: dict[UserId, Person] = {}
    pairs: dict[UserId, Pair] = {}
    for id_, tenant, change, help_, other, linked_at, held, changes in orjson.loads(facts):
        second, fraction, kind = change.split() if change else ("", "", "")
        changed = Moment(int(float(second)), float(fraction)) if change else NEVER
        persons[id_] = Person(
            lock=Lock(TenantId(int(tenant)) if tenant else None, changed),
            is_unlocked=kind == Kind.UNLOCKED.value,
            held=tuple(
                HeldMessage(place, key, moment(sent, part), float(arrived))
                for place, (key, sent, part, arrived) in enumerate(held)
            ),
            lock_changes=tuple(
                LockChange(
                    moment(its_second, its_fraction), int(order), TenantId(int(to)) if to else None
                )
                for its_second, its_fraction, order, to in changes
            ),
            help=_help(help_),
        )
        if is_lid(id_) and other:
            # A LID that lost its phone has itself in its place.
            pairs[id_] = Pair(id_, None if other == id_ else other, float(linked_at))
    return Known(persons, pairs, tuple(_sent(one) for one in seen.decode().split(";") if one))


def packed(changes: Iterable[Change]) -> tuple[list[list[Any]], bytes]:
    """Return the lists that `apply` in lua/accept.lua takes, and all bodies in one."""
    bodies = bytearray()
    return [_packed(one, bodies) for one in changes], bytes(bodies)


def _packed(change: Change, bodies: bytearray) -> list[Any]:
    match change:
        case SetLock(user, tenant):
            return ["set_lock", user, _text(tenant)]
        case RecordEvent(event):
            second, fraction = packed_moment(event.changed) if event.changed else ("", "")
            cause = Cause(event.why.value, event.who, event.other)
            return [
                "record",
                repr(event.at),
                event.user,
                event.kind.value,
                _text(event.from_tenant),
                _text(event.to_tenant),
                second,
                fraction,
                event.message_id or "",
                history_rows.pack(cause),
                event.other or "",
            ]
        case PairIds(pair):
            return ["pair", pair.lid, pair.phone or "", repr(pair.at)]
        case RenameUser(old, new, alias):
            return ["rename", old, new, alias or ""]
        case SetHelp(user, help_):
            queued = repr(help_.queued_at) if help_ else ""
            sent_at = repr(help_.sent_at) if help_ and help_.sent_at is not None else ""
            return ["help", user, queued, sent_at]
        case MarkSeen(key, sent):
            return ["seen", key.digest.hex(), *map(hexed, sent.person), str(int(sent.routed))]
        case AddDelivery(user, alias, tenant, content):
            return ["add", user, alias or "", str(tenant), *_content(content, bodies)]
        case Hold(user, sent_at, content):
            return ["hold", user, packed_moment(sent_at), *_content(content, bodies)]
        case ReleaseHeld(user, held, alias, tenant):
            return ["release", user, held.idempotency_key, alias or "", str(tenant)]
        case DropHeld(user):
            return ["drop_held", user]
        case ForgetHeld(idempotency_key):
            return ["forget_held", idempotency_key]


def _content(content: DeliveryContent, bodies: bytearray) -> tuple[dict[str, str], int, int]:
    """The content without its body, and from where to where that is in bodies, as Lua counts."""
    start = len(bodies)
    bodies += content.body
    facts = {
        "event_time": repr(content.event_time),
        "arrived": repr(content.arrived),
        "key": content.idempotency_key,
        "message_id": content.message_id or "",
        "headers": json.dumps(content.headers),
    }
    return facts, start + 1, len(bodies)


def packed_moment(moment: Moment) -> list[str]:
    return [str(moment.second), repr(moment.fraction)]


def moment(second: str, fraction: str) -> Moment:
    return Moment(int(float(second)), float(fraction))


def hexed(hashed: int) -> str:
    """A hash of domain/dedup.py as Redis has it: 16 hex digits, empty for none."""
    return (hashed % 2**64).to_bytes(8, "big").hex() if hashed else ""


def signed(hashed: str) -> int:
    """The reverse of hexed()."""
    return int.from_bytes(bytes.fromhex(hashed), "big", signed=True) if hashed else 0


def _sent(entry: str) -> Copy:
    phone, lid, routed = entry.split(",")
    return Copy(PersonHash(signed(phone), signed(lid)), routed == "1")


def _help(text: str) -> Help | None:
    if not text:
        return None
    queued, sent = text.split()
    return Help(float(queued), None if sent == "-" else float(sent))


def _text(tenant: TenantId | None) -> str:
    return "" if tenant is None else str(tenant)
