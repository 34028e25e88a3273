"""One POST to the backend: what it carries, and what each answer means.

A real server plays the backend wherever the wire matters; odd answers come from respx.
"""

import asyncio
import base64
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest
import respx
import standardwebhooks
from aiohttp import web

from gateway.delivery import backend as backend_module
from gateway.delivery.backend import Backend, retry_after, transport
from gateway.domain.model import Delivery, UserId
from gateway.errors import BackendRefused, BackendUnavailable, NotConnected
from tests.conftest import FakeBackend
from tests.messages import tenant, user

NOW = 1_782_900_000.0
URL = "http://backend.test/api/webhook/waha"
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
OLDER = "whsec_" + base64.b64encode(b"76543210fedcba9876543210").decode()


def delivery(**changes: Any) -> Delivery:
    fields: dict[str, Any] = {
        "id": 1,
        "tenant": tenant(2),
        "user": user("971501234567"),
        "alias": None,
        "idempotency_key": "0f" * 16,
        "headers": (("content-type", "application/json"), ("x-webhook-request-id", "3b2o")),
        "body": '{"body":"مرحبا \\ud83d"}'.encode(),
        "attempt": 1,
        "poison_attempts": 0,
        "tried_at": None,
        "age": 0.0,
    }
    return Delivery(**fields | changes)


def backend_at(
    url: str = URL,
    way: httpx.AsyncBaseTransport | None = None,
    *,
    timeout: float = 5,
    secrets: tuple[str, ...] = (),
    clock: Callable[[], float] = lambda: NOW,
) -> Backend:
    way = way or transport(10)
    return Backend(url, timeout=timeout, secrets=secrets, transport=way, clock=clock)


def answering(**answer: Any) -> Backend:
    """A backend whose one answer, or failure, is played by respx."""
    router = respx.MockRouter(assert_all_called=False)
    failure = answer.pop("side_effect", None)
    route = router.post(URL)
    if failure is not None:
        route.mock(side_effect=failure)
    else:
        route.respond(**answer)
    return backend_at(way=httpx.MockTransport(router.async_handler))


@pytest.fixture
async def to(backend: FakeBackend) -> AsyncIterator[Callable[..., Backend]]:
    opened: list[Backend] = []

    def make(**how: Any) -> Backend:
        opened.append(backend_at(backend.url + "/api/webhook/waha", **how))
        return opened[-1]

    yield make
    for one in opened:
        await one.close()


async def test_the_request_is_the_webhooks_own_bytes_and_our_headers(
    backend: FakeBackend, to: Callable[..., Backend]
) -> None:
    await to().post(delivery(alias=UserId("158764321000005@lid"), attempt=3))

    (received,) = backend.received
    assert received.path == "/api/webhook/waha"
    assert received.body == delivery().body
    headers = received.headers
    assert headers["x-tenant-id"] == "2"
    assert headers["x-user-id"] == "971501234567"
    assert headers["x-user-alias"] == "158764321000005@lid"
    assert headers["idempotency-key"] == "0f" * 16
    assert headers["x-delivery-attempt"] == "3"
    assert headers["content-type"] == "application/json"
    assert headers["x-webhook-request-id"] == "3b2o"
    assert not any(name.lower().startswith("webhook-") for name in headers), (
        "unsigned without a secret"
    )


async def test_a_user_of_another_session_goes_by_the_bare_number(
    backend: FakeBackend, to: Callable[..., Backend]
) -> None:
    await to().post(delivery(user=user("sales/971501234567")))
    assert backend.received[0].user == "971501234567"
    assert "X-User-Alias" not in backend.received[0].headers


async def test_the_signature_is_standard_webhooks_and_covers_the_tenant(
    backend: FakeBackend, to: Callable[..., Backend]
) -> None:
    await to(secrets=(SECRET, OLDER)).post(delivery())
    headers = backend.received[0].headers
    assert headers["webhook-id"] == "2_" + "0f" * 16
    assert headers["webhook-timestamp"] == "1782900000"
    signed = f"{headers['webhook-id']}.1782900000.".encode() + delivery().body
    expected = [
        "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        for key in (b"0123456789abcdef01234567", b"76543210fedcba9876543210")
    ]
    assert headers["webhook-signature"].split() == expected


async def test_the_library_of_standard_webhooks_takes_the_signature(
    backend: FakeBackend, to: Callable[..., Backend]
) -> None:
    await to(secrets=(SECRET, OLDER), clock=time.time).post(delivery())
    (received,) = backend.received
    headers = {name.lower(): value for name, value in received.headers.items()}
    for secret in (SECRET, OLDER):
        standardwebhooks.Webhook(secret).verify(received.body, headers)
    other = "whsec_" + base64.b64encode(b"another key of 24 bytes!").decode()
    for secret, body, id_ in (
        (other, received.body, headers["webhook-id"]),
        (SECRET, received.body + b" ", headers["webhook-id"]),
        (SECRET, received.body, "3" + headers["webhook-id"][1:]),
    ):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(secret).verify(body, headers | {"webhook-id": id_})


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_is_success(status: int) -> None:
    await answering(status_code=status).post(delivery())  # raises nothing


@pytest.mark.parametrize("status", [400, 410, 413, 415, 422])
async def test_refusals(status: int) -> None:
    with pytest.raises(BackendRefused) as refused:
        await answering(status_code=status, text="x" * 5000).post(delivery())
    assert refused.value.status == status
    assert refused.value.answer == b"x" * 1024


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404, 408, 429, 500, 502, 503, 599])
async def test_everything_else_is_tried_again(status: int) -> None:
    with pytest.raises(BackendUnavailable) as failed:
        await answering(status_code=status, headers={"Location": "/elsewhere"}).post(delivery())
    assert failed.value.status == status
    assert failed.value.retry_after is None


@pytest.mark.parametrize(
    "failure", [httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("no HTTP"), OSError("gone")]
)
async def test_every_failure_of_the_way_is_ours(failure: Exception) -> None:
    with pytest.raises(BackendUnavailable) as failed:
        await answering(side_effect=failure).post(delivery())
    assert failed.value.status is None
    assert failed.value.__cause__ is failure


async def test_retry_after_is_passed_on() -> None:
    with pytest.raises(BackendUnavailable) as failed:
        await answering(status_code=503, headers={"Retry-After": "7"}).post(delivery())
    assert failed.value.retry_after == 7.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("999999", 3600.0),
        (formatdate(NOW + 60, usegmt=True), 60.0),
        (formatdate(NOW - 60, usegmt=True), 0.0),
        (formatdate(NOW + 86_400, usegmt=True), 3600.0),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("", None),
        (None, None),
        ("٣", 3.0),
        ("Wed, 99 Nov 2026 00:00:00 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Mon, 01 Jan 2020 00:00:00 +9999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, NOW) == seconds


async def test_nobody_listens() -> None:
    unused = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = unused.sockets[0].getsockname()[1]
    unused.close()
    await unused.wait_closed()
    there = backend_at(f"http://127.0.0.1:{port}")
    with pytest.raises(NotConnected):
        await there.post(delivery())
    await there.close()


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


async def odd_server(talk: Talk) -> tuple[asyncio.Server, str]:
    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def says_no_http(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example ESMTP ready\r\n")
    await writer.drain()


async def hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def no_text(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 \xff\xfeok\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def half_a_head(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConte")
    await writer.drain()


@pytest.mark.parametrize("talk", [says_no_http, hangs_up, half_a_head, no_text])
async def test_an_answer_that_is_none(talk: Talk) -> None:
    server, url = await odd_server(talk)
    there = backend_at(url)
    with pytest.raises(BackendUnavailable) as failed:
        await there.post(delivery())
    assert not isinstance(failed.value, NotConnected)
    await there.close()
    server.close()


async def test_an_answer_that_does_not_begin_is_not_waited_for() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    server, url = await odd_server(silent)
    there = backend_at(url, timeout=0.1)
    with pytest.raises(BackendUnavailable, match=r"no answer within 0\.1 s"):
        await there.post(delivery())
    await there.close()
    server.close()


async def test_an_answer_without_end_counts_by_its_status_and_is_dropped() -> None:
    hung_up = asyncio.Event()

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
        except ConnectionError:
            hung_up.set()
            raise

    server, url = await odd_server(endless)
    there = backend_at(url)
    began = time.monotonic()
    await there.post(delivery())
    assert time.monotonic() - began < 5, "it is not read to its end"
    await asyncio.wait_for(hung_up.wait(), 5)
    await there.close()
    server.close()


async def test_an_answer_that_trickles_without_end_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "_ANSWER_SECONDS", 0.1)
    hung_up = asyncio.Event()

    async def trickles(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"1\r\nx\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            hung_up.set()
            raise

    server, url = await odd_server(trickles)
    there = backend_at(url)
    with pytest.raises(BackendUnavailable) as failed:
        await there.post(delivery())
    assert failed.value.status == 503
    assert failed.value.answer.startswith(b"xx")
    await asyncio.wait_for(hung_up.wait(), 5)
    await there.close()
    server.close()


async def test_a_connection_that_the_backend_closed_silently_is_not_used_again() -> None:
    answered = 0

    async def answers_once(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        answered += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()  # and closes, though it said nothing of that

    server, url = await odd_server(answers_once)
    there = backend_at(url)
    for _ in range(3):
        await there.post(delivery())
        await asyncio.sleep(0.05)  # the end of the connection is on its way
    assert answered == 3
    await there.close()
    server.close()


async def test_cookies_of_the_backend_are_dropped(
    backend: FakeBackend, to: Callable[..., Backend]
) -> None:
    backend.answer = lambda _: web.Response(headers={"Set-Cookie": "tenant=2; Path=/"})
    there = to()
    await there.post(delivery())
    await there.post(delivery())
    assert "Cookie" not in backend.received[1].headers


async def test_a_redirect_is_not_followed(backend: FakeBackend, to: Callable[..., Backend]) -> None:
    backend.answer = lambda _: web.Response(status=307, headers={"Location": "/elsewhere"})
    with pytest.raises(BackendUnavailable):
        await to().post(delivery())
    assert [one.path for one in backend.received] == ["/api/webhook/waha"]


async def test_on_the_wire_it_is_one_plain_request_of_known_length(backend: FakeBackend) -> None:
    """Chunked, it could not be read by every backend; a second Host is an error."""
    to = Backend(backend.url, timeout=5, secrets=(), transport=transport(1))
    await to.post(delivery(body=b"x" * 70_000))
    await to.close()
    (got,) = backend.received
    assert got.body == b"x" * 70_000
    assert got.headers["Content-Length"] == "70000"
    names = [name.lower() for name in got.headers]
    assert "transfer-encoding" not in names
    assert len(names) == len(set(names))
