"""The history in Redis: one list for each user, h:<user>, of JSON lists, oldest first.

Each is id, at, user, kind, from tenant, to tenant, second and fraction of the change, message id,
why, who, other: texts, empty where there is nothing.
"""

import math
from dataclasses import dataclass, replace

import orjson

from gateway.domain.lock_events import LockEvent, Why, kind_of
from gateway.domain.model import HistoryEntry, Moment, TenantId, UserId
from gateway.store.redis.facts import moment, packed_moment

COLUMNS = ("id", "at", "user", "kind", "from_tenant", "to_tenant", "changed_second",
           "changed_fraction", "message_id", "why", "who", "other")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """text: as it is stored."""

    id: int
    event: LockEvent
    text: str


def rest_of(event: LockEvent) -> str:
    """Return what comes behind the id and its comma."""
    second, fraction = packed_moment(event.changed) if event.changed else ("", "")
    rest = [
        repr(event.at),
        event.user,
        event.kind.value,
        _text(event.from_tenant),
        _text(event.to_tenant),
        second,
        fraction,
        event.message_id or "",
        event.why.value if event.why else "",
        event.who or "",
        event.other or "",
    ]
    return orjson.dumps(rest).decode()[1:]


def text_of(id_: int, event: LockEvent) -> str:
    return f'["{id_}",{rest_of(event)}'


def entry(text: bytes) -> Entry:
    id_, at, user, kind, from_, to, second, fraction, message_id, why, who, other = orjson.loads(
        text
    )
    event = LockEvent(
        float(at),
        user,
        kind_of(kind),
        _tenant(from_),
        _tenant(to),
        moment(second, fraction) if second else None,
        Why(why) if why else None,
        who or None,
        UserId(other) if other else None,
        message_id or None,
    )
    return Entry(int(id_), event, text.decode())


def shown(text: bytes) -> HistoryEntry:
    found = entry(text)
    event = found.event
    return HistoryEntry(
        found.id,
        event.at,
        event.user,
        event.kind.value,
        event.from_tenant,
        event.to_tenant,
        event.message_id,
        event.why.value if event.why else None,
        event.who,
        event.other,
    )


def redated(event: LockEvent, latest: float, back: float, now: float) -> LockEvent:
    """Return event with its own time, if it lies behind latest: the clock was ahead by back."""

    def own(time: float) -> float:
        return min(time - back, now)

    changed = event.changed
    if event.at <= latest and not (changed and changed.second > latest):
        return event
    if changed:
        changed = Moment(math.floor(own(changed.second)), own(changed.fraction))
    return replace(event, at=own(event.at), changed=changed)


def _text(tenant: TenantId | None) -> str:
    return "" if tenant is None else str(tenant)


def _tenant(text: str) -> TenantId | None:
    return TenantId(int(text)) if text else None
