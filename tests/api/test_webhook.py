"""POST /webhook/waha: every row of the table of answers, keys in their order."""

import asyncio
import gzip
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.api import bodies
from gateway.api.access import Access
from gateway.api.brake import Brake
from gateway.api.refusals import Refusals
from gateway.api.webhook import WebhookEndpoint
from gateway.app import create_app
from gateway.inbound.ingest import Ingest
from gateway.metrics import Metrics
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
        '{"status":"unknown_user","action":"sent_help_message","user":"971501234567"}',
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
    "body", [b"", b"{", b"[]", b"{}", b'{"event":7}', b'{"event":"m","session":7}']
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


WHOLE = '{"event":"message","payload":{"from":"971501234567@c.us","body":"start_realty_2"%s}}'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (WHOLE % "", 200),
        (b"\xef\xbb\xbf" + (WHOLE % "").encode(), 200),  # a byte order mark
        ((WHOLE % "").encode("utf-16"), 400),  # RFC 8259: UTF-8
        ((WHOLE % "").encode("utf-16-le"), 400),
        ((WHOLE % "").encode("utf-32"), 400),
        (WHOLE % ',"x":"\\u0000"', 200),
        (WHOLE % ',"x":"\0"', 400),  # a bare control character
        ((WHOLE % "") + "\0", 400),
        (WHOLE % ',"x":"\\ud83d"', 200),  # half an emoji
        (WHOLE % (',"timestamp":' + "9" * 400), 200),
        (WHOLE % ',"timestamp":1e999', 200),
        (WHOLE % ',"timestamp":-1', 200),
        (WHOLE % (',"x":' + "9" * 5000), 400),  # Python reads no longer number
        (WHOLE % ',"x":NaN', 400),
        (WHOLE % ',"x":-Infinity', 400),
        (WHOLE % (',"x":' + "[" * 500 + "]" * 500), 200),
        (WHOLE % (',"x":' + "[" * 200_000 + "]" * 200_000), 400),
        (WHOLE % (',"x":' + '{"a":' * 200_000 + "1" + "}" * 200_000), 400),
        (WHOLE % "" + WHOLE % "", 400),
        ("\n\t " + WHOLE % "" + " \r\n", 200),
        (b'{"event":"\xff"}', 400),
    ],
    ids=lambda value: repr(value)[-40:] if len(repr(value)) < 200 else f"{len(value)} long",
)
def test_odd_json_is_an_event_or_none_and_never_an_error_of_ours(
    client: TestClient, body: str | bytes, status: int
) -> None:
    data = body.encode() if isinstance(body, str) else body
    got, text = post(client, data)
    assert got == status, text
    locks = json.loads(client.get("/router/stats").text)["mappings"]
    assert locks == ({ALI: 2} if status == 200 else {})


def test_of_doubled_keys_the_last_counts_in_either_parser(client: TestClient) -> None:
    twice = '{"event":"x","event":"message","payload":{"from":"%s@c.us","body":"%s","body":"%s"%s}}'
    for user, more in ((ALI, ""), (SARA, ',"x":"\\ud83d"')):
        text = twice % (user, "start_realty_3", "start_realty_2", more)
        assert json.loads(post(client, text.encode())[1])["tenant_id"] == 2


@pytest.mark.parametrize(
    ("settings", "client_address", "headers", "status"),
    [
        ({"host": "0.0.0.0"}, "10.0.0.5", {}, 403),
        ({"waha_api_key": "the-key"}, "10.0.0.5", {"X-Api-Key": "no"}, 401),
        ({"webhook_hmac_key": "the-key"}, "10.0.0.5", {"X-Webhook-Hmac": "no"}, 401),
        ({"max_body_bytes": 1024}, "testclient", {"Content-Length": "2000"}, 413),
    ],
)
def test_a_refused_call_costs_the_store_nothing(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    client_address: str,
    headers: dict[str, str],
    status: int,
) -> None:
    with client_of(tmp_path, **settings) as client:

        async def work(*_: Any, **__: Any) -> None:
            raise AssertionError("the store was asked")

        monkeypatch.setattr(Ingest, "receive", work)
        caller = TestClient(client.app, client=(client_address, 5))
        for _ in range(3):
            answer = caller.post(HOOK, content=now_webhook("start_realty_2"), headers=headers)
            assert answer.status_code == status
        other = TestClient(client.app, client=("testclient", 6))
        other.get("/router/user/none", headers={"X-Forwarded-For": "x"})
    reported = [record for record in caplog.records if "🚫" in record.getMessage()]
    assert len(reported) == 1, "once a minute, not once a call"
    assert (reported[0].event, reported[0].status) == ("refused.webhook", status)  # type: ignore[attr-defined]
    assert client_address in reported[0].getMessage()
    assert re.search("[A-Z]+_[A-Z_]+|the HMAC key in WAHA", reported[0].getMessage()), "what to set"


def test_what_only_the_router_may_say_is_never_passed_on(tmp_path: Path) -> None:
    sent: list[httpx.Request] = []

    def backend(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200)

    forged = {
        "X-Tenant-ID": "9",
        "X-User-ID": "9",
        "X-User-Alias": "9",
        "Idempotency-Key": "forged",
        "X-Delivery-Attempt": "99",
        "webhook-id": "9_forged",
        "webhook-timestamp": "99",
        "webhook-signature": "v1,forged",
        "Authorization": "forged",
        "Cookie": "forged",
        "X-Api-Key": "forged",
        "X-Webhook-Request-Id": "3b2o",
    }
    with client_of(tmp_path, handler=backend) as client:
        client.post(HOOK, content=now_webhook("start_realty_2"), headers=forged)
        for _ in range(400):
            if sent:
                break
            time.sleep(0.005)
    (request,) = sent
    assert request.headers["X-Tenant-ID"] == "2"
    assert request.headers["X-User-ID"] == ALI
    assert request.headers["X-Delivery-Attempt"] == "1"
    assert request.headers["X-Webhook-Request-Id"] == "3b2o"
    for name, value in request.headers.multi_items():
        assert "forged" not in value
        assert (name, value) not in {(n.lower(), v) for n, v in list(forged.items())[:-1]}
    assert not any(name.startswith("webhook-") for name in request.headers)


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
        twice = [("X-Webhook-Hmac", signed), ("X-Webhook-Hmac", "0" * 128)]
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
            assert len(client.get("/openapi.json").json()["paths"]) == 23


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
    monkeypatch.setattr(bodies, "_SECONDS", 0.01)
    caller = Caller(*messages)
    access = Access(settings_of(tmp_path))
    endpoint = WebhookEndpoint(
        cast(Ingest, None), access, Refusals(), Brake(), Metrics(), bodies.Limit(1000)
    )
    assert await caller.call(endpoint) == 400
    assert (b"connection", b"close") in caller.sent[0]["headers"]


async def test_a_caller_who_hangs_up_is_no_message(tmp_path: Path) -> None:
    caller = Caller(
        {"type": "http.request", "body": b'{"event":"m"}', "more_body": True},
        {"type": "http.disconnect"},
    )
    access = Access(settings_of(tmp_path))
    endpoint = WebhookEndpoint(
        cast(Ingest, None), access, Refusals(), Brake(), Metrics(), bodies.Limit(1000)
    )
    assert await caller.call(endpoint) == 400


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "//webhook/waha", 404),
        ("POST", "/webhook", 404),
        ("POST", "/api/webhook/waha", 404),
        ("GET", "/webhook/waha", 405),
        ("GET", "/nothing%0A", 404),
    ],
)
def test_a_wrong_path_is_said_once_a_minute(
    client: TestClient, caplog: pytest.LogCaptureFixture, method: str, path: str, status: int
) -> None:
    for _ in range(3):
        answer = client.request(method, f"http://testserver{path}", content=b"{}")
        assert answer.status_code == status
    (line,) = [one.getMessage() for one in caplog.records if "nothing is there" in one.message]
    assert "The webhook is POST /webhook/waha" in line
    assert "\n" not in line
    caplog.clear()
    assert client.get("/router/dead-letters/7").status_code == 404
    assert "nothing is there" not in caplog.text


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd, gzip", "GZIP"])
def test_a_compressed_body_is_refused_in_words(tmp_path: Path, encoding: str, signed: bool) -> None:
    key: Any = {"webhook_hmac_key": "k"} if signed else {}
    body = gzip.compress(webhook("start_realty_2"))
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    with client_of(tmp_path, **key) as client:
        answer = client.post(HOOK, content=body, headers=headers)
        assert (answer.status_code, "Content-Encoding" in answer.text) == (415, True)
        answer = client.post("/router/lock/971501234567", content=body, headers=headers)
        assert answer.status_code == 415
        plain = webhook("start_realty_2")
        if not signed:
            headers = {"Content-Encoding": "identity"}
            assert client.post(HOOK, content=plain, headers=headers).status_code == 200
