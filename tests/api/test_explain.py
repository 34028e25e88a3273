"""POST /router/explain: what would become of a webhook, and why; and nothing comes of it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.store import Limits
from gateway.waha import signature
from tests.clients import HOOK, client_of
from tests.messages import ALI, LID, OMAR, SARA, example, webhook

EXPLAIN = "/router/explain"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as opened:
        yield opened


def now_webhook(text: str, user: str = ALI, **how: Any) -> bytes:
    return webhook(text, user, **{"sent": time.time()} | how)


def explain(client: TestClient, body: bytes, **headers: str) -> tuple[Any, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reported = client.post(EXPLAIN, content=body, headers=named)
    assert reported.status_code == 200, reported.text
    content = reported.json()
    assert list(content) == ["answer", "rules"]
    return content["answer"], content["rules"]


def test_every_way_is_explained_as_it_then_goes(client: TestClient) -> None:
    client.post(HOOK, content=now_webhook("start_realty_2"))
    client.post(HOOK, content=now_webhook("start_realty_3", SARA, other_id=LID))
    old = time.time() - 5000
    for body, rule, says in (
        (now_webhook("hello"), "link", "none: no start_realty_N as a word of its own"),
        (now_webhook("hello"), "delivery", f"to tenant 2: X-Tenant-ID: 2, X-User-ID: {ALI}"),
        (now_webhook("hello"), "lock", "tenant 2, since 20"),
        (now_webhook("", hasMedia=True), "link", "none: there is no text or caption that counts"),
        (now_webhook(""), "content", "none that can be read yet"),
        (now_webhook("x", _data={"type": "call_log"}), "content", "a notice of WhatsApp's"),
        (now_webhook("see start_realty_9"), "link", "names tenant 9, but the text of a user"),
        (now_webhook("see start_realty_2"), "link", "names tenant 2 inside the text"),
        (now_webhook("start_realty_2"), "link", "names tenant 2, where the user is already"),
        (now_webhook("start_realty_4"), "link", "names tenant 4: moves the user there from 2"),
        (now_webhook("start_realty_5", sent=old), "link", "names tenant 5, but was sent before"),
        (now_webhook("by lid", LID), "user", f"{SARA}: the LID's phone, by an earlier event"),
        (now_webhook("hello", OMAR), "lock", "none, and there never was one"),
        (now_webhook("hello", OMAR), "held", "kept for 900 s"),
        (now_webhook("hi", "158764321000099@lid"), "user", "158764321000099@lid: its phone is not"),
        (now_webhook("start_realty_7", OMAR), "link", "names tenant 7: locks the user there"),
        (now_webhook("x", "1@g.us"), "chat", "a group: no single user"),
        (now_webhook("x", "status@broadcast"), "chat", "a status (story)"),
        (now_webhook("x", own=True, event="message.any"), "own", "sent by the gateway's own"),
        (now_webhook("x", event="message.ack"), "event", "message.ack: is not in FORWARD_EVENTS="),
        (b'{"event":"message","payload":{}}', "chat", "it names none"),
        (b'{"event":"message","engine":"GOWS"}', "form", "no usable `payload`"),
        (example(30), "chat", "it names none, or it concerns no person"),
    ):
        answer, rules = explain(client, body)
        assert rules[rule].startswith(says), rules
        assert client.post(HOOK, content=body).json() == answer
        if answer["status"] in ("routed", "unknown_user"):
            answer, rules = explain(client, body)
            assert answer["status"] == "duplicate"
            assert rules["seen"] == (
                "seen before (session, fromMe and message id): nothing more happens"
            )


def test_help_is_explained(client: TestClient) -> None:
    _, rules = explain(client, now_webhook("hello"))
    assert rules["help"] == "would be sent in a moment, if there is still no lock then"
    client.post(HOOK, content=now_webhook("hello"))
    _, rules = explain(client, now_webhook("hello"))
    assert rules["help"] == "none: one was sent within HELP_COOLDOWN, or waits already"
    _, rules = explain(client, now_webhook("hello", SARA, sent=time.time() - 900))
    assert rules["help"] == "none: the message is older than 10 minutes"


def test_what_was_held_and_would_follow_is_counted(client: TestClient) -> None:
    client.post(HOOK, content=now_webhook("hello"))
    _, rules = explain(client, now_webhook("start_realty_2", sent=time.time() - 60))
    assert rules["held"] == "1 held messages of the user would follow it"


def test_a_policy_that_keeps_the_first_lock_is_named(tmp_path: Path) -> None:
    with client_of(tmp_path, lock_policy="first_link") as client:
        client.post(HOOK, content=now_webhook("start_realty_2"))
        _, rules = explain(client, now_webhook("start_realty_4"))
        assert "LOCK_POLICY=first_link keeps the first" in rules["link"]


def test_a_refusal_is_explained(tmp_path: Path) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503)

    limits = Limits(max_backlog=1, min_free_disk_bytes=0)
    with client_of(tmp_path, limits=limits, handler=away) as client:
        client.post(HOOK, content=now_webhook("start_realty_2"))
        answer, rules = explain(client, now_webhook("hello"))
        assert "MAX_BACKLOG=1" in rules["store"]
        assert answer == client.post(HOOK, content=now_webhook("hello")).json()


def test_the_signature_is_explained(tmp_path: Path) -> None:
    with client_of(tmp_path, webhook_hmac_key="the key") as client:
        body = now_webhook("hello")
        answer, rules = explain(client, body)
        assert rules["signature"].startswith("401: X-Webhook-Hmac is missing")
        assert answer == client.post(HOOK, content=body).json()
        signed = signature.sign(body, b"the key")
        _, rules = explain(
            client, body, x_webhook_hmac=signed, x_webhook_hmac_algorithm=signature.ALGORITHM
        )
        assert rules["signature"] == "as WEBHOOK_HMAC_KEY demands"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "none is demanded; only this machine may call"),
        ({"waha_api_key": "key"}, "none is demanded; from elsewhere WAHA_API_KEY must come"),
    ],
)
def test_what_a_webhook_needs_is_explained(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with client_of(tmp_path, **settings) as client:
        assert explain(client, now_webhook("hello"))[1]["signature"].startswith(says)


def test_a_store_that_refuses_is_explained_of_a_copy_too(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        body = now_webhook("start_realty_2")
        client.post(HOOK, content=body)
    with client_of(tmp_path, limits=Limits(min_free_disk_bytes=2**62)) as client:
        answer, rules = explain(client, body)
        assert "MB are needed" in rules["store"]
        assert answer == client.post(HOOK, content=body).json()


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 400), (b"{", 400), (b"{}", 400), (b"x" * 9000, 413)]
)
def test_what_is_no_event_is_refused_as_the_webhook_does(
    tmp_path: Path, body: bytes, status: int
) -> None:
    with client_of(tmp_path, max_body_bytes=8000) as client:
        reported, answer = client.post(EXPLAIN, content=body), client.post(HOOK, content=body)
        assert (reported.status_code, reported.json()) == (status, answer.json())


def test_nothing_comes_of_it(client: TestClient, tmp_path: Path) -> None:
    before = (tmp_path / "data" / "router_mappings.json").read_bytes()
    for _ in range(3):
        explain(client, now_webhook("start_realty_2", other_id=LID))
        explain(client, now_webhook("hello", SARA))
    assert client.get("/router/stats").json()["total_locked_users"] == 0
    assert client.get("/router/pending").json()["waiting"] == 0
    assert "no event since the start" in client.get("/ready").text
    assert (tmp_path / "data" / "router_mappings.json").read_bytes() == before


def test_it_is_for_the_operator_only(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key="boss") as client:
        assert client.post(EXPLAIN, content=now_webhook("hello")).status_code == 401
        reported = client.post(EXPLAIN, content=now_webhook("hello"), headers={"X-Api-Key": "boss"})
        assert json.loads(reported.text)["answer"]["status"] == "unknown_user"


def test_half_an_emoji_is_explained_too(tmp_path: Path) -> None:
    body = b'{"event":"\\ud83d","payload":{}}'
    with client_of(tmp_path, forward_events=frozenset({"*"})) as client:
        answer, rules = explain(client, body)
        assert answer == client.post(HOOK, content=body).json()
        assert rules["event"].startswith("\ud83d: is in")
