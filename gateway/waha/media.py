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
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gateway.domain.model import HASHED_SESSION, MESSAGE_EVENTS, Delivery, session_of
from gateway.errors import WahaError, WahaRefused
from gateway.log import Throttle, masked
from gateway.waha import events
from gateway.waha.client import Waha

WAIT_SECONDS = 10.0
_LIFETIME_SECONDS = 170.0  # a little less than WAHA's 180: the backend must fetch it, too
_REST_SECONDS = 30.0  # of a session that did not answer: others must not wait for it
_SESSION_AT_ONCE = 8
_MAX_REMEMBERED = 10_000  # messages whose media were fetched
_NOT_FOUND = 404
_MAY_HAVE_MEDIA = re.compile(rb'"hasMedia"\s*:\s*true')
_EXPIRED = ("x-media-expired", "true")

log = logging.getLogger(__name__)

Json = dict[str, Any]


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
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_SESSION_AT_ONCE)
        )
        # By idempotency key: when WAHA was asked (monotonic), and the media; None: they are gone.
        self._answers: OrderedDict[str, tuple[float, Json | None]] = OrderedDict()
        self._not_before: dict[str, float] = {}  # by session, monotonic
        self._complaints = Throttle()

    async def made_fresh(self, delivery: Delivery) -> Delivery:
        """Return delivery with its media there again, or marked as gone; as it is if it has none,
        if they are there, or if WAHA does not say."""
        is_recovered = any(name == "x-recovered" for name, _ in delivery.headers)
        is_late = self._clock() - delivery.event_time > _LIFETIME_SECONDS
        if not (is_late or is_recovered) or not _MAY_HAVE_MEDIA.search(delivery.body):
            return delivery
        envelope = _message_in(delivery.body)
        if envelope is None:
            return delivery
        # Without an address WAHA was set to fetch none (WHATSAPP_DOWNLOAD_MEDIA).
        if not is_recovered and _address_of(envelope["payload"].get("media")) is None:
            return delivery

        answer = self._remembered(delivery) or await self._ask(delivery, envelope["payload"])
        if answer is None:
            return delivery
        _, media = answer
        if media is None:
            return replace(delivery, headers=(*delivery.headers, _EXPIRED))
        # A message that came by webhook has the address in its own bytes.
        return _with_media(delivery, envelope, media) if is_recovered else delivery

    def _remembered(self, delivery: Delivery) -> tuple[float, Json | None] | None:
        known = self._answers.get(delivery.idempotency_key)
        is_fresh = known and self._monotonic() - known[0] < _LIFETIME_SECONDS
        return known if is_fresh else None

    async def _ask(self, delivery: Delivery, payload: Json) -> tuple[float, Json | None] | None:
        """What WAHA says of the message's media; None if it does not."""
        session = session_of(delivery.user, self._home_session)
        rests = self._not_before.get(session, 0.0) > self._monotonic()
        if rests or session.startswith(HASHED_SESSION):
            return None
        asks = False
        try:
            async with asyncio.timeout(WAIT_SECONDS), self._slots[session]:
                asks = True
                message = await self._waha.message(session, str(events.id_of(payload)))
        except WahaRefused as exc:
            if exc.status != _NOT_FOUND:
                self._complain(session, exc)
                return None
            message = {}
        except (WahaError, TimeoutError) as exc:
            if asks:
                self._not_before[session] = self._monotonic() + _REST_SECONDS
                self._complain(session, exc)
            return None
        found = message.get("media")
        answer = self._monotonic(), found if _address_of(found) else None
        self._answers[delivery.idempotency_key] = answer
        while len(self._answers) > _MAX_REMEMBERED:
            self._answers.popitem(last=False)
        return answer

    def _complain(self, session: str, exc: Exception) -> None:
        self._complaints.warn(
            log,
            session,
            "WAHA did not fetch media of session %s again: %s",
            session,
            masked(str(exc) or type(exc).__name__),
            event="media.failed",
            session=session,
        )


def _message_in(body: bytes) -> Json | None:
    """The event of a message with media and an id; None if body is none."""
    try:
        envelope = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(envelope, dict) or envelope.get("event") not in MESSAGE_EVENTS:
        return None
    payload = envelope.get("payload")
    if not isinstance(payload, dict) or payload.get("hasMedia") is not True:
        return None
    return envelope if events.id_of(payload) else None


def _address_of(media: Any) -> str | None:
    url = media.get("url") if isinstance(media, dict) else None
    return url if isinstance(url, str) and url else None


def _with_media(delivery: Delivery, envelope: Json, media: Json) -> Delivery:
    envelope["payload"]["media"] = media
    return replace(delivery, body=events.encoded(envelope))
