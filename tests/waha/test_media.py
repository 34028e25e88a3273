"""Media that outlive their file: fetched again before the delivery, or marked as gone."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.domain.model import Delivery
from gateway.waha import media
from gateway.waha.client import Waha
from gateway.waha.media import Media
from tests.messages import ALI, tenant, user, webhook

LATE = time.time() - 600
GONE = ("x-media-expired", "true")


@pytest.fixture
async def fresh(waha: StandIn) -> AsyncIterator[Media]:
    client = Waha(waha.url, "")
    yield Media(client, home_session="default")
    await client.close()


def image(waha: StandIn, bare_id: str = "3EB0A", **payload: Any) -> bytes:
    """A webhook of an image, as WAHA has it and once sent it."""
    url = f"{waha.url.removesuffix('/api')}/api/files/default/{bare_id}.jpeg"
    shown: Any = {
        "hasMedia": True,
        "media": {"url": url, "mimetype": "image/jpeg", "filename": None},
    }
    body = webhook("look", ALI, bare_id=bare_id, sent=LATE, **shown | payload)
    waha.messages.append(json.loads(body)["payload"] | {"media": None})
    return body


def delivery(body: bytes, *headers: tuple[str, str], at: float = LATE, key: str = "k") -> Delivery:
    return Delivery(
        id=1,
        tenant=tenant(2),
        user=user(ALI),
        alias=None,
        idempotency_key=key,
        headers=headers,
        body=body,
        attempt=1,
        poison_attempts=0,
        tried_at=None,
        age=0.0,
        event_time=at,
    )


async def test_media_of_a_late_message_are_fetched_again_and_its_bytes_stay(
    waha: StandIn, fresh: Media
) -> None:
    late = delivery(image(waha))
    for _ in range(3):  # attempts in a row
        assert await fresh.made_fresh(late) == late
    assert len(waha.downloads) == 1


async def test_what_is_soon_delivered_or_has_no_media_is_not_asked_for(
    waha: StandIn, fresh: Media
) -> None:
    soon = delivery(image(waha), at=time.time() - 60)
    text = delivery(webhook("hello", sent=LATE, hasMedia=False))
    reported_to_fetch_none = delivery(image(waha, "3EB0B", media=None))
    no_message = delivery(b'{"event":"message.ack","payload":{"hasMedia":true}}')
    odd = delivery(b'{"hasMedia":true')
    quotes_one = delivery(
        webhook("hello", sent=LATE, hasMedia=False, replyTo={"hasMedia": True}),
        ("x-recovered", "true"),
    )
    for one in (soon, text, reported_to_fetch_none, no_message, odd, quotes_one):
        assert await fresh.made_fresh(one) == one
    assert waha.downloads == []


async def test_media_of_a_recovered_message_are_fetched_and_put_into_it(
    waha: StandIn, fresh: Media
) -> None:
    body = image(waha, media=None)
    recovered = delivery(body, ("x-recovered", "true"), at=time.time())
    made = await fresh.made_fresh(recovered)
    envelope = json.loads(made.body)
    assert envelope["payload"]["media"]["url"].endswith("/api/files/default/3EB0A.jpeg")
    envelope["payload"]["media"] = None
    assert envelope == json.loads(body)
    assert made.headers == recovered.headers


@pytest.mark.parametrize("why", ["whatsapp dropped it", "the message is gone"])
async def test_what_is_gone_is_marked(waha: StandIn, fresh: Media, why: str) -> None:
    late = delivery(image(waha), ("content-type", "application/json"))
    if why == "whatsapp dropped it":
        waha.lost_media.add("3EB0A")
    else:
        waha.messages.clear()
    made = await fresh.made_fresh(late)
    assert made == replace(late, headers=(*late.headers, GONE))
    assert await fresh.made_fresh(late) == made


@pytest.mark.parametrize("status", [401, 422, 500, 503])
async def test_where_waha_does_not_say_the_message_goes_as_it_is(
    waha: StandIn, fresh: Media, status: int
) -> None:
    late = delivery(image(waha))
    waha.odd_answer = lambda: web.Response(status=status)
    assert await fresh.made_fresh(late) == late


async def test_a_waha_that_hangs_holds_nobody_up_for_long(
    waha: StandIn, fresh: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "WAIT_SECONDS", 0.2)
    many = [delivery(image(waha, f"3EB0{n:04}"), key=f"k{n}") for n in range(50)]
    waha.delay = 30.0
    async with asyncio.timeout(5):
        assert await asyncio.gather(*map(fresh.made_fresh, many)) == many
        assert await fresh.made_fresh(many[0]) == many[0], "the session rests"
    assert waha.downloads == []


async def test_an_answer_is_the_messages_own_whatever_its_delivery_is_called(
    waha: StandIn, fresh: Media
) -> None:
    """A Redis that lost its last moments gives a delivery's number once more."""
    header = ("x-recovered", "true")
    one = delivery(image(waha, "3EB0A", media=None), header, key="k1")
    two = delivery(image(waha, "3EB0B", media=None), header, key="k2")
    assert (one.id, two.id) == (1, 1)
    for asked, bare_id in ((one, "3EB0A"), (two, "3EB0B"), (one, "3EB0A")):
        made = await fresh.made_fresh(asked)
        assert json.loads(made.body)["payload"]["media"]["url"].endswith(f"/{bare_id}.jpeg")
        assert made.user == asked.user
    assert len(waha.downloads) == 2


async def test_an_id_that_is_an_object_is_found(waha: StandIn, fresh: Media) -> None:
    body = json.loads(image(waha))
    body["payload"]["id"] = {"_serialized": body["payload"]["id"]}
    late = delivery(json.dumps(body).encode())
    assert await fresh.made_fresh(late) == late
    assert len(waha.downloads) == 1


async def test_a_session_known_by_its_hash_is_not_asked_for(waha: StandIn, fresh: Media) -> None:
    late = replace(delivery(image(waha)), user=user(f"hash-{'0' * 32}/{ALI}"))
    assert await fresh.made_fresh(late) == late
