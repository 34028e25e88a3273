"""FORWARD_EVENTS: every event of WAHA's, by the chat it belongs to, only for users with a lock."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.model import MESSAGE_EVENTS
from gateway.settings import EVENTS_OF_NOBODY, WAHA_EVENTS
from tests.clients import HOOK, client_of
from tests.messages import ALI, SARA, webhook

LINK = "start_realty_9"
OF_A_PERSON = sorted(WAHA_EVENTS - EVENTS_OF_NOBODY - MESSAGE_EVENTS)


def body_of(event: str, user: str) -> bytes:
    """An event about the chat with user, where WAHA's docs have the chat; with a link as text."""
    chat, message_id = f"{user}@c.us", f"false_{user}@c.us_3EB0{time.monotonic_ns()}"
    payload: dict[str, Any] = {"body": LINK, "fromMe": False, "timestamp": time.time()}
    match event.split("."):
        case ["message", "revoked"]:
            payload |= {"after": None, "before": {"id": message_id}}
        case ["message" | "event", *_]:
            payload |= {"id": message_id, "from": "971501230000@c.us"}
        case ["poll", *_]:
            payload |= {"vote": {"id": message_id, "from": "971509999999@c.us", "to": "me"}}
        case ["presence" | "chat", *_]:
            payload |= {"id": chat}
        case ["call", *_]:
            payload |= {"id": "CALL1", "from": chat, "isGroup": False}
        case ["label", "chat", _]:
            payload |= {"chatId": chat, "id": "3"}
        case _:
            payload |= {"id": "3", "group": {"id": "120363@g.us"}, "status": "WORKING"}
    envelope = {"id": f"evt_{time.monotonic_ns()}", "event": event, "payload": payload}
    return json.dumps(envelope | {"session": "default", "engine": "GOWS"}).encode()


@pytest.mark.parametrize("forwarded", ["*", None])
def test_every_event_of_a_person_follows_the_lock_and_never_binds(
    tmp_path: Path, forwarded: str | None
) -> None:
    """By name or by the star."""
    names = frozenset({"*"} if forwarded else {"message", *OF_A_PERSON})
    with client_of(tmp_path, forward_events=names) as client:
        client.post(HOOK, content=webhook("start_realty_2", ALI, sent=time.time()))
        for event in OF_A_PERSON:
            assert client.post(HOOK, content=body_of(event, ALI)).json() == {
                "status": "routed",
                "action": "existing_session",
                "user": ALI,
                "tenant_id": 2,
            }, event
            assert client.post(HOOK, content=body_of(event, SARA)).json() == {
                "status": "unknown_user",
                "action": "none",
                "user": SARA,
            }, event
        assert client.get("/router/stats").json()["mappings"] == {ALI: 2}


def test_what_is_not_named_goes_nowhere(tmp_path: Path) -> None:
    with client_of(tmp_path, forward_events=frozenset({"message", "message.ack"})) as client:
        client.post(HOOK, content=webhook("start_realty_2", ALI, sent=time.time()))
        for event in OF_A_PERSON:
            routed = client.post(HOOK, content=body_of(event, ALI)).json()["status"] == "routed"
            assert routed is (event == "message.ack"), event


def test_what_concerns_no_person_goes_to_nobody_and_the_start_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = frozenset({"message", *EVENTS_OF_NOBODY})
    with client_of(tmp_path, forward_events=names) as client:
        client.post(HOOK, content=webhook("start_realty_2", ALI, sent=time.time()))
        for event in sorted(EVENTS_OF_NOBODY):
            answer = client.post(HOOK, content=body_of(event, ALI)).json()
            assert answer["reason"] == ("group" if event.startswith("group.") else "no_user")
        assert client.get("/ready").json()["waha_session default"].startswith("ok: WORKING")
    (reported,) = [one for one in caplog.messages if "whatever FORWARD_EVENTS says" in one]
    assert all(event in reported for event in EVENTS_OF_NOBODY)


@pytest.mark.parametrize("event", ["session.status", "state.change", "engine.event"])
def test_no_id_in_its_payload_makes_it_somebodys(tmp_path: Path, event: str) -> None:
    with client_of(tmp_path, forward_events=frozenset({"*"})) as client:
        client.post(HOOK, content=webhook("start_realty_2", ALI, sent=time.time()))
        body = json.dumps({"event": event, "payload": {"id": f"false_{ALI}@c.us_A"}})
        assert client.post(HOOK, content=body).json()["reason"] == "no_user"


def test_own_messages_are_forwarded_by_chat_if_they_are_named(tmp_path: Path) -> None:
    own: dict[str, Any] = {"own": True, "event": "message.any", "sent": time.time()}
    for names, status in (({"message"}, "ignored"), ({"message.any"}, "routed")):
        with client_of(tmp_path / status, forward_events=frozenset(names)) as client:
            client.post(HOOK, content=webhook("start_realty_2", ALI, sent=time.time()))
            for text in ("our answer", LINK):
                answer = client.post(HOOK, content=webhook(text, ALI, **own)).json()
                assert (answer["status"], answer.get("tenant_id", 2)) == (status, 2)
            assert client.get("/router/stats").json()["mappings"] == {ALI: 2}
