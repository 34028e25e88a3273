"""POST /webhook/waha: every row of the table of answers, keys in their order."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.api import webhook as webhook_module
from gateway.api.access import Access
from gateway.api.refusals import Refusals
from gateway.api.webhook import WebhookEndpoint
from gateway.app import create_app
from gateway.ingest import Ingest
from gateway.store import Limits
from gateway.waha import signature
from tests.clients import HOOK, accepting, client_of, settings_of
from tests.conftest import LIMITS
from tests.messages import ALI, LID, SARA, example, webhook


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as opened:
        yield opened


def post(client: TestClient, body: bytes, path: str = HOOK, **headers: str) -> tuple[int, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post(path, content=body, headers=named)
    return answer.status_code, answer.text


def now_webhook(text: str, user: str = ALI, **how: Any) -> bytes:
    return webhook(text, user, sent=time.time(), **how)


def test_a_link_a_follow_up_and_a_move(client: TestClient) -> None:
    assert post(client, now_webhook("start_realty_2")) == (
        200,
        '{"status":"routed","action":"new_session_locked","user":"971501234567","tenant_id":2}',
    )
    routed = '{"status":"routed","action":"existing_session","user":"971501234567","tenant_id":%d}'
    assert post(client, now_webhook("hello")) == (200, routed % 2)
    assert post(client, now_webhook("start_realty_2")) == (200, routed % 2)
    assert post(client, now_webhook("start_realty_9")) == (
        200,
        '{"status":"routed","action":"new_session_locked","user":"971501234567","tenant_id":9,'
        '"previous_tenant_id":2}',
    )
    assert post(client, now_webhook("hello")) == (200, routed % 9)


def test_no_lock_and_no_link(client: TestClient) -> None:
    assert post(client, now_webhook("hello")) == (
        200,
        '{"status":"unknown_user","action":"none","user":"971501234567"}',
    )
    assert json.loads(post(client, now_webhook("hello", LID))[1])["user"] == LID


def test_seen_before(client: TestClient) -> None:
    body = now_webhook("start_realty_2")
    post(client, body)
    assert post(client, body) == (200, '{"status":"duplicate","user":"971501234567"}')


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (14, "from_me"),
        (10, "group"),
        (12, "status"),
        (13, "newsletter"),
        (23, "event_not_forwarded"),
        (30, "event_not_forwarded"),
    ],
)
def test_not_for_routing(client: TestClient, number: int, reason: str) -> None:
    answer = f'{{"status":"ignored","reason":"{reason}"}}'
    assert post(client, example(number)) == (200, answer)


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("12345678@broadcast", "broadcast"),
        ("971501230000", "own_number"),
        ("971557357753", "own_number"),
        ("0@c.us", "no_user"),
    ],
)
def test_chats_that_are_no_persons(client: TestClient, user: str, reason: str) -> None:
    answer = f'{{"status":"ignored","reason":"{reason}"}}'
    assert post(client, now_webhook("start_realty_2", user)) == (200, answer)


@pytest.mark.parametrize("payload", ["null", "[]", '"x"', "{}", '{"id":7,"from":null}'])
def test_a_message_of_nobody_is_not_asked_for_again(client: TestClient, payload: str) -> None:
    body = f'{{"event":"message","payload":{payload}}}'.encode()
    assert post(client, body) == (200, '{"status":"ignored","reason":"no_user"}')


def test_a_trailing_slash_is_served_and_nothing_redirects(client: TestClient) -> None:
    assert post(client, now_webhook("hello"), HOOK + "/")[0] == 200
    assert client.get("/health/").status_code == 404
    assert client.get(HOOK).status_code == 405


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"event":7}', b'{"event":"m","session":"/"}']
)
def test_what_is_no_event_is_named(client: TestClient, body: bytes) -> None:
    status, text = post(client, body)
    assert status == 400
    assert list(json.loads(text)) == ["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "x"])
def test_a_body_that_parses_is_accepted_whatever_its_type_says(
    client: TestClient, content_type: str
) -> None:
    assert post(client, now_webhook("hello"), content_type=content_type)[0] == 200


def test_a_body_over_the_limit(tmp_path: Path) -> None:
    with client_of(tmp_path, max_body_bytes=2000) as client:
        status, text = post(client, now_webhook("x" * 2000))
        assert (status, json.loads(text)) == (
            413,
            {"detail": "the body is larger than MAX_BODY_BYTES=2000"},
        )
        body = now_webhook("hello")
        chunks = (chunk for chunk in [body, b" " * 2000])
        assert client.post(HOOK, content=chunks).status_code == 413
        assert client.post(HOOK, content=(c for c in [body[:10], body[10:]])).status_code == 200


def test_a_bad_signature(tmp_path: Path) -> None:
    with client_of(tmp_path, webhook_hmac_key="new,old", waha_api_key="key") as client:
        body = now_webhook("start_realty_2")
        status, text = post(client, body, x_api_key="key")
        assert (status, list(json.loads(text))) == (401, ["detail"])
        assert post(client, body, x_webhook_hmac="0" * 128)[0] == 401
        assert post(client, b"{", x_webhook_hmac="0" * 128)[0] == 401, "before it is parsed"
        signed = signature.sign(body, b"old")
        assert post(client, body, x_webhook_hmac=signed, x_webhook_hmac_algorithm="md5")[0] == 401
        twice = [("X-Webhook-Hmac", signed), ("X-Webhook-Hmac", signed)]
        assert client.post(HOOK, content=body, headers=twice).status_code == 401
        assert post(client, body, x_webhook_hmac=signed)[0] == 200
        assert json.loads(client.get(f"/router/user/{ALI}").text)["locked_to_tenant"] == 2


def test_a_store_that_cannot_write(tmp_path: Path) -> None:
    with client_of(tmp_path, limits=Limits(min_free_disk_bytes=2**62)) as client:
        answer = client.post(HOOK, content=now_webhook("start_realty_2"))
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "2"
        assert "MB are needed" in answer.json()["detail"]
        assert client.get("/health").status_code == 503
        assert client.get("/health").json()["status"] == "unhealthy"
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
        assert ready.json()["store"].startswith("degraded: ")


def test_a_full_backlog_of_one_tenant(tmp_path: Path) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    limits = Limits(max_backlog_per_tenant=1, min_free_disk_bytes=0)
    with client_of(tmp_path, limits=limits, handler=away) as client:
        assert post(client, now_webhook("start_realty_2"))[0] == 200
        answer = client.post(HOOK, content=now_webhook("more"))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        assert post(client, now_webhook("start_realty_3", SARA))[0] == 200
        assert client.get("/health").status_code == 200


def test_an_app_can_be_started_again(tmp_path: Path) -> None:

    app = create_app(
        settings_of(tmp_path), transport=lambda _: httpx.MockTransport(accepting), limits=LIMITS
    )
    for action in ("new_session_locked", "existing_session"):
        with TestClient(app) as client:
            answer = client.post(HOOK, content=now_webhook("start_realty_2")).json()
            assert answer["action"] == action
            assert len(client.get("/openapi.json").json()["paths"]) == 10


def test_an_own_message_that_goes_nowhere_still_shows_whose_lid_it_is(
    client: TestClient,
) -> None:
    post(client, now_webhook("start_realty_2"))
    own = now_webhook("our answer", LID, own=True, event="message.any", other_id=ALI)
    assert json.loads(post(client, own)[1])["reason"] == "from_me"
    assert json.loads(post(client, now_webhook("by lid", LID))[1])["user"] == ALI


class Caller:
    """An ASGI caller whose body comes as told."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if not self.messages:
            await asyncio.sleep(3600)
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def call(self, endpoint: WebhookEndpoint) -> int:
        scope: dict[str, Any] = {
            "type": "http",
            "headers": [],
            "client": ("testclient", 1),
            "server": None,
        }
        await endpoint(scope, self.receive, self.send)
        status: int = self.sent[0]["status"]
        return status


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"type": "http.request", "body": b"{", "more_body": True}],
    ],
)
async def test_a_body_that_does_not_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(webhook_module, "_BODY_SECONDS", 0.01)
    caller = Caller(*messages)
    endpoint = WebhookEndpoint(cast(Ingest, None), Access(settings_of(tmp_path)), Refusals(), 1000)
    assert await caller.call(endpoint) == 400
    assert (b"connection", b"close") in caller.sent[0]["headers"]


async def test_a_caller_who_hangs_up_is_no_message(tmp_path: Path) -> None:
    caller = Caller(
        {"type": "http.request", "body": b'{"event":"m"}', "more_body": True},
        {"type": "http.disconnect"},
    )
    endpoint = WebhookEndpoint(cast(Ingest, None), Access(settings_of(tmp_path)), Refusals(), 1000)
    assert await caller.call(endpoint) == 400
