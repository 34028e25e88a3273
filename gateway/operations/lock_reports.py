"""Each change of a lock as a line of the log and a count, from the one event that it is.

A tenant's move is one order for many users: operations/actions.py reports it as a whole.
"""

import logging

from gateway.domain.lock_events import COUNTED, Kind, LockEvent, Why
from gateway.domain.model import Note
from gateway.log import shown
from gateway.metrics import Metrics

log = logging.getLogger(__name__)


class LockReports:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def report(self, event: LockEvent) -> None:
        if isinstance(event.kind, Note):
            self._metrics.link_without_effect(event.kind.value)
            return
        if event.why is None or (event.kind, event.why) not in COUNTED:
            return
        self._metrics.lock_changed(event.kind.value, event.why.value)
        if event.kind is not Kind.ERASED:  # of whom no line must speak
            sentence, facts = _sentence(event)
            log.info(sentence, *facts, extra=_fields(event))


def _sentence(event: LockEvent) -> tuple[str, tuple[object, ...]]:
    user, tenant, before = shown(event.user), event.to_tenant, event.from_tenant
    if event.why is Why.MERGED_FROM and event.other:
        owner = "without a lock" if tenant is None else f"of Tenant {tenant}"
        return "🪪 %s and %s are one user, %s", (shown(event.other), user, owner)
    if event.why is Why.OPERATOR and tenant is None:
        return "✋ An operator unlocked %s from Tenant %s", (user, before)
    if event.why is Why.OPERATOR:
        return "✋ An operator locked %s to Tenant %s (before: %s)", (user, tenant, before)
    if tenant is None:
        return "🔓 User %s has no lock any more (before: Tenant %s)", (user, before)
    return "🔒 LOCKED: User %s → Tenant %s", (user, tenant)


def _fields(event: LockEvent) -> dict[str, object]:
    return {
        "event": "lock.changed",
        "kind": event.kind.value,
        "why": event.why.value if event.why else None,
        "who": event.who,
        "user": shown(event.user),
        "other": shown(event.other) if event.other else None,
        "tenant": event.to_tenant,
        "previous": event.from_tenant,
        "request_id": event.request_id,
    }
