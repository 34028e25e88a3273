"""What is decided on a request's head, for every route there is, and how much body is read."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.types import Message

from gateway.api import bodies, brake, guard
from gateway.api.brake import Brake
from gateway.app import Gateway, create_app
from gateway.errors import BadKey, BadSignature, GatewayError, StoreUnavailable, TooManyGuesses
from tests.clients import accepting, settings_of
from tests.conftest import LIMITS

KEY = "k" * 32
CHUNK = b" " * 16_384


class Call:
    """A call of the app by ASGI, whose body never ends."""

    def __init__(self, method: str, path: str, **headers: str) -> None:
        named = {"host": "localhost:8001"} | {n.replace("_", "-"): v for n, v in headers.items()}
        self.read = 0
        self.status = 0
        self.headers: dict[str, str] = {}
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "scheme": "http",
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8001),
            "headers": [(n.encode(), v.encode("latin-1")) for n, v in named.items()],
        }

    async def receive(self) -> Message:
        self.read += len(CHUNK)
        assert self.read < 10_000_000, "it is read without end"
        return {"type": "http.request", "body": CHUNK, "more_body": True}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {n.decode(): v.decode() for n, v in message["headers"]}

    async def made_of(self, app: Gateway) -> "Call":
        await app(self.scope, self.receive, self.send)
        return self


@pytest.fixture
async def app(tmp_path: Path, settings: dict[str, Any]) -> AsyncIterator[Gateway]:
    made = create_app(
        settings_of(tmp_path, **settings),
        transport=lambda _: httpx.MockTransport(accepting),
        limits=LIMITS,
    )
    assert isinstance(made, Gateway)
    async with made.router.lifespan_context(made):
        yield made


def calls_of(app: Gateway) -> list[tuple[str, str]]:
    """Method and path of each route, with something in place of its parameters."""
    found = [
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]
    for route in app.router.routes:
        if isinstance(route, Route):
            found += [(method, route.path) for method in sorted(route.methods or ())]
    return [(method, re.sub(r"{\w+}", "1", path)) for method, path in found]


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({"admin_api_key": KEY}, {}, 401),
        ({"admin_api_key": KEY}, {"authorization": "Basic eDp5"}, 401),
        ({}, {"origin": "http://evil.example"}, 403),
        ({}, {"sec_fetch_site": "cross-site"}, 403),
        ({}, {"x_forwarded_for": "10.0.0.1"}, 403),
    ],
)
async def test_who_may_not_call_is_refused_before_a_byte_of_the_body_is_read(
    app: Gateway, headers: dict[str, str], status: int
) -> None:
    closed = [(method, path) for method, path in calls_of(app) if not guard.is_open(path)]
    closed += [(method, path) for method in ("GET", "HEAD") for path in ("/metrics", "/ready")]
    assert len(closed) > 25
    for method, path in closed:
        call = await Call(method, path, transfer_encoding="chunked", **headers).made_of(app)
        assert (call.status, call.read) == (status, 0), (method, path)
        assert call.headers["connection"] == "close", "the rest of the body is not waited for"


@pytest.mark.parametrize("settings", [{"admin_api_key": KEY}])
async def test_only_these_paths_ask_for_no_key(app: Gateway) -> None:
    opened = {path for _, path in calls_of(app) if guard.is_open(path)}
    assert {path for path in opened if not path.startswith("/router/page/")} == {
        "/health",
        "/webhook/waha",
        "/webhook/waha/",
        "/router",
        "/router/",
    }


@pytest.mark.parametrize("settings", [{"admin_api_key": KEY, "max_body_bytes": 200_000}])
async def test_no_body_is_read_much_further_than_it_may_be_large(app: Gateway) -> None:
    for method, path in calls_of(app):
        most = 200_000 if path == guard.EXPLAIN else guard.LIMIT.most
        if path.startswith("/webhook") or path == guard.EXPLAIN:
            most = 200_000
        call = await Call(method, path, x_api_key=KEY).made_of(app)
        assert call.read <= most + len(CHUNK), (method, path)
        if call.read > 0:
            assert call.status in (413, 403), (method, path, call.status)
        long = Call(method, path, x_api_key=KEY, content_length=str(most + 1))
        assert (await long.made_of(app)).read == 0, (method, path)
        assert long.status in (413, 405, 403, 404), (method, path, long.status)


@pytest.mark.parametrize("settings", [{"admin_api_key": KEY}])
async def test_twenty_who_guess_keep_nobody_waiting_who_knows_the_key(app: Gateway) -> None:
    guessing = [
        asyncio.create_task(Call("GET", "/router/stats", x_api_key=f"guess {n}").made_of(app))
        for n in range(20)
    ]
    await asyncio.sleep(0)
    for _ in range(20):
        async with asyncio.timeout(0.4):
            assert (await Call("GET", "/router/stats", x_api_key=KEY).made_of(app)).status == 200
    assert sum(one.done() for one in guessing) >= 10, "the rest is refused at once"
    for one in guessing:
        one.cancel()


@pytest.fixture
def settings() -> dict[str, Any]:
    return {}


def caller(address: str) -> HTTPConnection:
    return HTTPConnection({"type": "http", "client": (address, 1), "headers": []})


async def outcomes(
    one: Brake, addresses: list[str], error: GatewayError
) -> list[type[GatewayError]]:
    """Of each what it is told, while the others wait."""
    reported = await asyncio.gather(*(one.hold(caller(address), error) for address in addresses))
    return [type(answer) for answer in reported]


@pytest.mark.parametrize(
    ("addresses", "braked"),
    [
        (["10.0.0.1"] * 30, 20),
        ([f"10.0.0.{n}" for n in range(30)], 0),
        (["10.0.0.1"] * 12 + ["10.0.0.2"] * 12, 4),
        ([f"2001:db8::{n:x}" for n in range(30)], 20),  # one network is one guesser
        ([f"2001:db8:0:{n:x}::1" for n in range(30)], 0),
        (["::ffff:10.0.0.1"] * 30, 20),
        (["testclient"] * 11, 1),
    ],
)
async def test_wrong_keys_are_slowed_down_by_address(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], braked: int
) -> None:
    monkeypatch.setattr(brake, "GUESS_SECONDS", 0.0078125)
    # The clock stands, so that all of them come at once.
    reported = await outcomes(Brake(clock=lambda: 5.0), addresses, BadKey("wrong"))
    assert reported.count(TooManyGuesses) == braked
    assert reported.count(BadKey) == len(addresses) - braked


async def test_what_is_no_guess_is_not_slowed_down() -> None:
    async with asyncio.timeout(0.3):
        reported = await outcomes(Brake(), ["10.0.0.1"] * 100, BadSignature("missing"))
    assert set(reported) == {BadSignature}


async def test_the_brake_remembers_no_end_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brake, "_MOST_ADDRESSES", 20)
    monkeypatch.setattr(brake, "GUESS_SECONDS", 0.0078125)
    one = Brake(clock=lambda: 5.0)
    reported = await outcomes(one, [f"10.0.{n}.1" for n in range(100)], BadKey("wrong"))
    assert reported.count(BadKey) == 30, "twenty, and ten of all others together"


def test_bodies_that_nobody_has_verified_share_one_budget() -> None:
    budget = bodies.Unverified(100)
    budget.take("a", 50)
    with pytest.raises(StoreUnavailable):
        budget.take("a", 1)
    budget.take("b", 30)
    budget.take("c", 20)
    with pytest.raises(StoreUnavailable):
        budget.take("d", 1)
    budget.give_back("a", 50)
    budget.take("d", 50)
