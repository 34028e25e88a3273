"""WAHA's sessions, and events of an unknown shape, as operators see them."""

import json
import logging
from typing import Any

import pytest

from gateway.domain.model import Chat
from gateway.metrics import Metrics
from gateway.waha.schema_drift import SchemaDrift
from gateway.waha.sessions import Sessions
from tests.messages import ALI, NOW, example, message, parse, webhook


def status(value: object, session: str = "default", *, at: float = NOW) -> bytes:
    event = json.loads(example(30)) | {"session": session, "timestamp": int(at * 1000)}
    event["payload"]["status"] = value
    return json.dumps(event).encode()


def hear(sessions: Sessions, body: bytes) -> None:
    sessions.hear(parse(body))


def test_a_session_has_the_status_that_waha_reported_last_by_its_own_clock() -> None:
    sessions = Sessions(Metrics())
    hear(sessions, webhook("hello", session="sales"))
    assert sessions.all()["sales"].status is None
    assert sessions.can_send("sales")
    hear(sessions, status("WORKING", "sales", at=NOW - 5))
    hear(sessions, status("SCAN_QR_CODE", "sales", at=NOW - 9))  # it comes late
    assert sessions.all()["sales"].status == "WORKING"
    hear(sessions, status("FAILED", "sales", at=NOW + 10**8))  # from the future: counts as now
    hear(sessions, status("WORKING", "sales", at=NOW))
    assert sessions.can_send("sales")
    hear(sessions, status("FAILED", "sales", at=NOW))
    assert (sessions.can_send("sales"), sessions.can_send("default")) == (False, True)
    assert sessions.all()["sales"].in_trouble


@pytest.mark.parametrize(
    ("value", "trouble"),
    [
        ("WORKING", False),
        ("STARTING", False),
        ("STOPPED", True),
        ("SCAN_QR_CODE", True),
        ("PASSKEY_REQUIRED", True),
        ("FAILED", True),
        ("BRAND_NEW", True),
    ],
)
def test_which_status_is_a_trouble(
    value: str, trouble: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sessions = Sessions(Metrics())
    for _ in range(2):
        hear(sessions, status(value))
    assert sessions.all()["default"].in_trouble is trouble
    (line,) = caplog.records
    assert line.getMessage() == f"📱 WAHA session default is {value}"
    assert (line.levelno == logging.WARNING) is trouble


def test_a_message_proves_that_a_session_works_whatever_was_reported_last() -> None:
    """Of several routers one is told STARTING, and another WORKING."""
    sessions = Sessions(Metrics())
    reported: list[str] = []
    sessions.on_status(lambda _, status: reported.append(status))
    hear(sessions, status("STARTING", at=NOW - 9))
    hear(sessions, webhook("hello"))
    assert sessions.can_send("default")
    assert reported == ["STARTING", "WORKING"]


def test_what_waha_answers_counts_unless_an_event_overtook_the_answer() -> None:
    sessions = Sessions(Metrics())
    sessions.asked("default", "SCAN_QR_CODE", frozenset(), NOW - 5)
    assert sessions.all()["default"].in_trouble
    hear(sessions, status("WORKING", at=NOW - 60))  # by a clock that is behind ours
    assert sessions.can_send("default")
    sessions.asked("default", "SCAN_QR_CODE", frozenset(), NOW - 1)
    assert sessions.can_send("default"), "the event came after the question"
    sessions.asked("default", "FAILED", frozenset(), NOW + 1)
    assert not sessions.can_send("default")


def test_a_clock_that_was_ahead_silences_nothing() -> None:
    sessions = Sessions(Metrics())
    sessions.asked("default", "WORKING", frozenset(), NOW + 86_400)
    hear(sessions, status("FAILED"))
    assert not sessions.can_send("default")
    sessions.all()["default"].reported_at = NOW + 3600  # an event that came by it
    sessions.asked("default", "WORKING", frozenset(), NOW)
    assert sessions.can_send("default")


def test_refused_messages_of_made_up_sessions_fill_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.waha.sessions._MOST", 2)
    sessions = Sessions(Metrics())
    refused: list[str] = []
    sessions.on_refused(lambda name, _: refused.append(name))
    for name in ("a", "b", "c", "d"):
        inbound = message("hello", session=name)
        sessions.hear(inbound)
        sessions.not_stored(inbound)
        sessions.not_stored(message("mine", session=name, own=True))
    assert refused == ["a", "b"]


def test_the_gauges_of_a_session() -> None:
    metrics = Metrics()
    sessions = Sessions(metrics)
    hear(sessions, status("SCAN_QR_CODE", at=NOW - 1))
    hear(sessions, status("WORKING"))
    text = metrics.text().decode()
    assert 'gateway_waha_session_status{session="default",status="SCAN_QR_CODE"} 0.0' in text
    assert 'gateway_waha_session_status{session="default",status="WORKING"} 1.0' in text
    assert 'gateway_waha_session_up{session="default"} 1.0' in text
    name = "gateway_waha_session_last_event_timestamp_seconds"
    assert metrics.value(name, session="default") == NOW


def test_the_own_number_is_remembered_for_events_that_do_not_name_it() -> None:
    sessions = Sessions(Metrics())
    hear(sessions, webhook("hello"))
    assert sessions.own_ids == {"971501230000", "230000000000001@lid"}
    without_lid = json.loads(webhook("hello")) | {"me": {"id": "971501230000@c.us", "lid": None}}
    hear(sessions, json.dumps(without_lid).encode())
    assert sessions.own_ids == {"971501230000", "230000000000001@lid"}
    anonymous = json.loads(webhook("start_realty_2", "971501230000")) | {"me": None}
    sessions.hear(parse(json.dumps(anonymous).encode()))
    assert sessions.own_ids == {"971501230000", "230000000000001@lid"}


def test_the_numbers_of_two_sessions_are_no_users_to_each_other() -> None:
    sessions = Sessions(Metrics())
    for session, number in (("default", "971501230000"), ("sales", "971501230001")):
        event = json.loads(webhook("hello", session=session)) | {"me": {"id": f"{number}@c.us"}}
        hear(sessions, json.dumps(event).encode())
    assert sessions.own_ids == {"971501230000", "971501230001"}
    for number in sorted(sessions.own_ids):
        body = webhook("start_realty_2", number, session="third")
        chat = parse(body, own_ids=sessions.own_ids).chat
        assert chat is Chat.OWN_NUMBER
    moved = json.loads(webhook("hello")) | {"me": {"id": "971501230009@c.us"}}
    hear(sessions, json.dumps(moved).encode())
    assert sessions.own_ids == {"971501230009", "971501230001"}, "the old number is somebody's now"


def test_made_up_sessions_do_not_fill_the_memory() -> None:
    sessions = Sessions(Metrics())
    for number in range(1100):
        hear(sessions, webhook("hello", session=f"s{number}"))
    assert len(sessions.all()) == 1000
    assert sessions.can_send("s1099")


def changed(event: str = "message", **payload: Any) -> bytes:
    """An event of which an engine renamed or retyped a part; None removes it."""
    body = json.loads(webhook("hello", event=event))
    for name, value in payload.items():
        body["payload"][name] = value
        if value is ...:
            del body["payload"][name]
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (webhook("hello"), None),
        (changed(id=...), "id"),
        (changed(id={"_serialized": f"false_{ALI}@c.us_A"}), None),
        (changed(id={"id": "A"}), "id"),
        (changed(id="3EB0"), "id"),
        (changed(id=f"false_{ALI}@user_A"), "chat"),
        (changed(id="false_0@c.us_A"), None),
        (changed(id="false_867051314767696@meta.ai_A"), None),
        (changed(id="false_120363@g.us_A"), None),
        (changed(fromMe=...), "fromMe"),
        (changed(fromMe="false"), "fromMe"),
        (changed(body={"text": "hello"}), "body"),
        (changed(body=...), None),
        (changed(body=None), None),
        (changed(timestamp=...), "timestamp"),
        (changed(timestamp="soon"), "timestamp"),
        (changed("message.reaction", id=...), "id"),
        (changed("presence.update", id=...), "chat"),
        (changed("call.received", **{"from": ...}), "chat"),
        (changed("label.chat.added", chatId=f"{ALI}@c.us"), None),
        (changed("label.chat.added"), "chat"),
        (changed("group.v2.join"), None),
        (changed("brand.new", id=...), None),
        (status("WORKING"), None),
        (status(None), "status"),
        (status({"value": "WORKING"}), "status"),
        (b'{"event":"message","session":"default","engine":"GOWS","payload":[]}', "payload"),
        (b'{"event":"message","payload":{"from":"971501234567@c.us"}}', None),
    ],
)
def test_which_part_of_an_event_is_odd(body: bytes, part: str | None) -> None:
    assert parse(body).odd_part == part


@pytest.mark.parametrize("number", range(1, 41))
def test_no_example_of_wahas_is_odd(number: int) -> None:
    assert parse(example(number)).odd_part is None


def test_odd_events_are_counted_by_name_shown_for_an_hour_and_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now, metrics = [0.0], Metrics()
    schema_drift = SchemaDrift(metrics, lambda: now[0])
    for _ in range(3):
        schema_drift.see(parse(webhook("hello")))
        schema_drift.see(parse(changed(id=...)))
    schema_drift.see(parse(changed("brand.new", id=...)))
    assert schema_drift.odd() == ["3 of 6 message events without a usable id"]
    assert len(caplog.records) == 1
    text = metrics.text().decode()
    assert 'gateway_webhook_events_total{chat="person",event="message"} 6.0' in text
    assert 'gateway_webhook_events_total{chat="no_user",event="other"} 1.0' in text
    assert 'gateway_webhook_odd_events_total{event="message",part="id"} 3.0' in text
    now[0] = 1900.0
    schema_drift.see(parse(webhook("hello")))
    assert schema_drift.odd() == ["3 of 7 message events without a usable id"]
    now[0] = 3700.0
    assert schema_drift.odd() == []
    schema_drift.see(parse(changed(id=...)))
    now[0] = 99_000.0
    assert schema_drift.odd() == []


def test_a_message_without_its_id_is_routed_by_where_it_came_from() -> None:
    assert parse(changed(id=...)).phone == message("hello").phone


def test_made_up_statuses_make_no_series_without_end() -> None:
    metrics = Metrics()
    sessions = Sessions(metrics)
    for number in range(50):
        word = "X" * (number % 30 + 1) + "_"
        hear(sessions, status(word, at=NOW - 100 + number))
    assert metrics.text().decode().count("gateway_waha_session_status{") == 1
    assert metrics.value("gateway_waha_session_status", session="default", status="OTHER") == 1
