"""What is said and counted of each event of a lock."""

import logging

import pytest

from gateway.domain.lock_events import Kind, LockEvent, Why
from gateway.domain.model import Moment, Note, TenantId
from gateway.metrics import Metrics
from gateway.operations.lock_reports import LockReports
from tests.messages import ALI, LID, NOW, user


def event(
    kind: Kind | Note, why: Why | None, before: int | None, to: int | None, other: str | None = None
) -> LockEvent:
    def tenant(number: int | None) -> TenantId | None:
        return None if number is None else TenantId(number)

    them = user(other) if other else None
    changed = Moment.of(NOW)
    return LockEvent(
        NOW, user(ALI), kind, tenant(before), tenant(to), changed, why, other=them, request_id="r1"
    )


@pytest.mark.parametrize(
    ("happened", "sentence"),
    [
        (event(Kind.LOCKED, Why.LINK, None, 2), f"🔒 LOCKED: User {ALI} → Tenant 2"),
        (event(Kind.MOVED, Why.LINK, 2, 3), f"🔒 LOCKED: User {ALI} → Tenant 3"),
        (
            event(Kind.MOVED, Why.OPERATOR, 2, 3),
            f"✋ An operator locked {ALI} to Tenant 3 (before: 2)",
        ),
        (
            event(Kind.UNLOCKED, Why.OPERATOR, 3, None),
            f"✋ An operator unlocked {ALI} from Tenant 3",
        ),
        (
            event(Kind.MERGED, Why.MERGED_FROM, None, 3, LID),
            f"🪪 {LID} and {ALI} are one user, of Tenant 3",
        ),
        (
            event(Kind.UNLOCKED, Why.MERGED_FROM, 3, None, LID),
            f"🪪 {LID} and {ALI} are one user, without a lock",
        ),
    ],
)
def test_an_event_is_one_line_and_one_count(
    happened: LockEvent, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    LockReports(metrics).report(happened)
    (line,) = caplog.records
    assert line.getMessage() == sentence
    fields = {"event": "lock.changed", "kind": happened.kind.value, "request_id": "r1"}
    fields |= {"tenant": happened.to_tenant, "previous": happened.from_tenant}
    assert {name: getattr(line, name) for name in fields} == fields
    why = happened.why.value if happened.why else ""
    labels = {"kind": happened.kind.value, "why": why}
    assert metrics.value("gateway_lock_changes_total", **labels) == 1


@pytest.mark.parametrize(
    "happened",
    [
        event(Note.STALE, Why.LINK, 2, 3),
        event(Kind.MERGED, Why.MERGED_INTO, 2, None, LID),
        event(Kind.ERASED, Why.OPERATOR, None, None),
    ],
)
def test_what_changed_no_lock_or_names_nobody_is_no_line(
    happened: LockEvent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    metrics = Metrics()
    LockReports(metrics).report(happened)
    assert caplog.records == []
    notes = metrics.value("gateway_links_without_effect_total", note="stale")
    assert notes == (happened.kind is Note.STALE)
    erased = {"kind": "erased", "why": "operator"}
    assert metrics.value("gateway_lock_changes_total", **erased) == (happened.kind is Kind.ERASED)
