"""What we ask of WAHA, and what its answers mean; the stand-in is a real server."""

import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.errors import WahaError, WahaRefused, WahaSilent, WahaUnavailable
from gateway.waha import client as client_module
from gateway.waha.client import Waha
from tests.clients import NO_WAHA
from tests.messages import ALI, LID


@pytest.fixture
async def client(waha: StandIn) -> AsyncIterator[Waha]:  # the plain one, but with a key
    waha.key = "the key"
    waha.phones[LID.removesuffix("@lid")] = ALI
    made = Waha(waha.url, "the key")
    yield made
    await made.close()


async def test_a_lid_is_looked_up_and_a_text_is_sent(waha: StandIn, client: Waha) -> None:
    assert await client.phone_of("sales", LID) == ALI
    assert await client.phone_of("sales", "158764321000099@lid") is None
    assert waha.asked == [("sales", LID), ("sales", "158764321000099@lid")]
    await client.send_text("sales", f"{ALI}@c.us", "سلام 👋")
    assert waha.sent == [{"session": "sales", "chatId": f"{ALI}@c.us", "text": "سلام 👋"}]


def odd(body: bytes | str, status: int = 200) -> Callable[[], web.Response]:
    data = body.encode() if isinstance(body, str) else body
    return lambda: web.Response(status=status, body=data, content_type="application/json")


@pytest.mark.parametrize(
    ("answer", "phone"),
    [
        ('{"lid":"x","pn":"971501234567:12@s.whatsapp.net"}', ALI),
        ('{"lid":"x","pn":null}', None),
        ('{"lid":"x","pn":971501234567}', None),
        ('{"lid":"x","pn":"12@g.us"}', None),
        ('{"lid":"x","pn":"158764321000005@lid"}', None),
        ('{"pn":["971501234567@c.us"]}', None),
        ("[]", None),
        ("", None),
        ("[" * 50_000, None),
        (b"\xff\xfe", None),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_an_answer_of_any_shape_is_a_phone_or_none(
    waha: StandIn, client: Waha, answer: bytes | str, phone: str | None
) -> None:
    waha.odd_answer = odd(answer)
    assert await client.phone_of("default", LID) == phone


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, WahaSilent),
        (400, WahaRefused),
        (401, WahaRefused),
        (404, WahaRefused),
        (422, WahaUnavailable),
        (429, WahaUnavailable),
        (500, WahaSilent),
        (501, WahaRefused),
        (503, WahaUnavailable),
    ],
)
async def test_a_status_shows_whether_to_ask_again(
    waha: StandIn, client: Waha, status: int, error: type[WahaError]
) -> None:
    waha.odd_answer = odd('{"message":"why\\n not"}', status)
    for call in (client.phone_of("default", LID), client.send_text("default", ALI, "hello")):
        with pytest.raises(error, match=f"{status} .*why") as caught:
            await call
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)


async def test_wahas_own_refusals(waha: StandIn, client: Waha) -> None:
    waha.retry_after, waha.statuses["down"] = 0.0, "SCAN_QR_CODE"
    with pytest.raises(WahaUnavailable, match="422"):
        await client.phone_of("down", LID)
    waha.has_store = False
    with pytest.raises(WahaRefused, match="Enable NOWEB store"):
        await client.phone_of("default", LID)
    stranger = Waha(waha.url, "")
    with pytest.raises(WahaRefused, match="401"):
        await stranger.phone_of("default", LID)
    await stranger.close()


async def test_who_is_away_was_reported_nothing_and_who_is_silent_perhaps(
    waha: StandIn, client: Waha, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Waha(NO_WAHA, "")
    with pytest.raises(WahaUnavailable) as caught:
        await away.send_text("default", ALI, "hello")
    assert type(caught.value) is WahaUnavailable
    await away.close()
    monkeypatch.setattr(client_module, "TIMEOUT_SECONDS", 0.05)
    waha.delay = 5
    with pytest.raises(WahaSilent):
        await client.send_text("default", ALI, "hello")


async def test_an_answer_without_end_is_not_read_to_its_end(
    waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_ANSWER_BYTES", 1000)
    waha.odd_answer = odd(b"[" + b"1," * 4_000_000)
    client = Waha(waha.url, "")
    assert await client.phone_of("default", LID) is None
    await client.close()


@pytest.mark.parametrize("key", ["", "ключ", "a,b"])
async def test_any_key_can_be_sent(waha: StandIn, key: str) -> None:
    seen: list[Any] = []
    client = Waha(waha.url, key)
    client._client.event_hooks["request"] = [_note(seen)]
    await client.phone_of("default", LID)
    assert seen == [key.encode() or None]
    await client.close()


def _note(seen: list[Any]) -> Any:
    async def note(request: Any) -> None:
        raw = {name.lower(): value for name, value in request.headers.raw}
        seen.append(raw.get(b"x-api-key"))

    return note


async def test_who_never_takes_the_connection_was_reported_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It counted as silence, and a help message as perhaps sent, for a week."""
    monkeypatch.setattr(client_module, "_CONNECT_SECONDS", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # until the queue of those not yet accepted is full
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        client = Waha(f"http://127.0.0.1:{full.getsockname()[1]}/api", "")
        with pytest.raises(WahaUnavailable) as caught:
            await client.send_text("default", ALI, "hello")
        assert type(caught.value) is WahaUnavailable
        assert "ConnectTimeout" in str(caught.value)
        await client.close()
        for one in waiting:
            one.close()
