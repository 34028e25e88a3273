"""Media that must still be there when a message is delivered.

WAHA deletes a file 180 s after it has fetched it (WHATSAPP_FILES_LIFETIME), and a message may wait
longer than that; of a recovered message the file was never fetched. So WAHA is asked to fetch it
again, which gives the same address (WAHA's source 2026.4.1, MediaManager.ts). A message never waits
for that for longer than WAIT_SECONDS; what is gone is marked with `X-Media-Expired: true`.
"""

import asyncio
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from gateway.errors import WahaError, WahaRefused
from gateway.log import Throttle, masked
from gateway.model import MESSAGE_EVENTS, Delivery, session_of
from gateway.waha.client import Waha

WAIT_SECONDS = 10.0
_LIFETIME_SECONDS = 170.0  # a little less than WAHA's 180: the backend must fetch it, too
_REST_SECONDS = 30.0  # of a session that did not answer: others must not wait for it
_AT_ONCE = 8
_MAX_REMEMBERED = 10_000  # deliveries whose media were fetched
_NOT_FOUND = 404
_HAS_MEDIA = re.compile(rb'"hasMedia"\s*:\s*true')
_EXPIRED = ("x-media-expired", "true")

log = logging.getLogger(__name__)


class Media:
    def __init__(
        self,
        waha: Waha,
        *,
        home_session: str,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waha = waha
        self._home_session = home_session
        self._clock = clock
        self._monotonic = monotonic
        self._few = asyncio.Semaphore(_AT_ONCE)
        self._fetched: OrderedDict[int, tuple[float, Delivery]] = OrderedDict()  # by delivery
        self._rests_until: dict[str, float] = {}  # by session
        self._complaints = Throttle()

    async def made_fresh(self, delivery: Delivery) -> Delivery:
        """Return delivery with its media there again, or marked as gone; as it is if it has none,
        if they are there, or if WAHA does not say."""
        if not self._may_be_gone(delivery):
            return delivery
        fetched_at, fresh = self._fetched.get(delivery.id, (0.0, delivery))
        if self._monotonic() - fetched_at > _LIFETIME_SECONDS or fetched_at == 0.0:
            fresh = await self._fetch(delivery)
        return replace(delivery, body=fresh.body, headers=fresh.headers)

    def _may_be_gone(self, delivery: Delivery) -> bool:
        is_late = self._clock() - delivery.event_time > _LIFETIME_SECONDS
        return (is_late or _is_recovered(delivery)) and _HAS_MEDIA.search(delivery.body) is not None

    async def _fetch(self, delivery: Delivery) -> Delivery:
        envelope = _envelope_of(delivery.body)
        message_id = envelope["payload"].get("id") if envelope else None
        session = session_of(delivery.user, self._home_session)
        if (
            envelope is None
            or not isinstance(message_id, str)
            or not self._is_worth_asking(delivery, envelope, session)
        ):
            return delivery
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._few:
                message = await self._waha.message(session, message_id)
        except WahaRefused as exc:
            if exc.status != _NOT_FOUND:
                self._complain(session, exc)
                return delivery
            message = {}
        except (WahaError, TimeoutError) as exc:
            self._rests_until[session] = self._monotonic() + _REST_SECONDS
            self._complain(session, exc)
            return delivery
        fresh = _with_media(delivery, envelope, message.get("media"))
        self._fetched[delivery.id] = self._monotonic(), fresh
        while len(self._fetched) > _MAX_REMEMBERED:
            self._fetched.popitem(last=False)
        return fresh

    def _is_worth_asking(self, delivery: Delivery, envelope: dict[str, Any], session: str) -> bool:
        # Without an address WAHA was told to fetch none (WHATSAPP_DOWNLOAD_MEDIA).
        has_address = bool(_address_of(envelope["payload"].get("media")))
        rests = self._rests_until.get(session, 0.0) > self._monotonic()
        return (has_address or _is_recovered(delivery)) and not rests

    def _complain(self, session: str, exc: Exception) -> None:
        if self._complaints.passes(session):
            log.warning(
                "WAHA did not fetch media of session %s again (said once a minute): %s",
                session,
                masked(str(exc) or type(exc).__name__),
                extra={"event": "media.failed", "session": session},
            )


def _is_recovered(delivery: Delivery) -> bool:
    return any(name == "x-recovered" for name, _ in delivery.headers)


def _envelope_of(body: bytes) -> dict[str, Any] | None:
    """The event of a message; None if body is none."""
    try:
        envelope = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(envelope, dict) or envelope.get("event") not in MESSAGE_EVENTS:
        return None
    return envelope if isinstance(envelope.get("payload"), dict) else None


def _address_of(media: Any) -> str | None:
    url = media.get("url") if isinstance(media, dict) else None
    return url if isinstance(url, str) and url else None


def _with_media(delivery: Delivery, envelope: dict[str, Any], media: Any) -> Delivery:
    if _address_of(media) is None:
        return replace(delivery, headers=(*delivery.headers, _EXPIRED))
    if not _is_recovered(delivery):
        return delivery  # its own bytes have the address
    envelope["payload"]["media"] = media
    try:
        body = orjson.dumps(envelope)
    except TypeError:  # half an emoji
        body = json.dumps(envelope).encode()
    return replace(delivery, body=body)
