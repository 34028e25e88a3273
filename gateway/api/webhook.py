"""POST /webhook/waha: what WAHA calls.

A raw ASGI endpoint, because this is the hot path and needs the body's own bytes. WAHA repeats
whatever is not answered with 2xx, fifteen times, so what is merely unwanted gets 200.
"""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from gateway.api.access import Access
from gateway.api.answers import Json
from gateway.api.refusals import Refusals
from gateway.errors import BadBody, BodyTooLarge, BodyTooSlow, GatewayError
from gateway.ingest import Ignored, Ingest
from gateway.model import Accepted, AskForLink, Bind, unscoped

_BODY_SECONDS = 10.0  # WAHA sends a body at once; who trickles is not WAHA


class WebhookEndpoint:
    def __init__(
        self, ingest: Ingest, access: Access, refusals: Refusals, max_body_bytes: int
    ) -> None:
        self._ingest = ingest
        self._access = access
        self._refusals = refusals
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        try:
            self._access.check_webhook(connection)
            body = await self._body(connection, receive)
            self._access.check_signature(connection, body)
            answer = _answer(await self._ingest.receive(body, connection.headers))
        except GatewayError as exc:
            answer = self._refusals.answer(connection, exc)
        await answer(scope, receive, send)

    async def _body(self, connection: HTTPConnection, receive: Receive) -> bytes:
        # Not all of it: int() refuses 5,000 digits, and 19 are too many already.
        announced = connection.headers.get("content-length", "").lstrip("0")[:19]
        self._check_size(int(announced) if announced.isdecimal() else 0)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                return await self._whole(receive)
        except TimeoutError as exc:
            raise BodyTooSlow(f"the body did not end within {_BODY_SECONDS:g} s") from exc

    async def _whole(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise BadBody("the caller hung up in the middle of the body")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            if not message.get("more_body"):
                return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise BodyTooLarge(f"the body is larger than MAX_BODY_BYTES={self._max_body_bytes}")


def _answer(outcome: Accepted | Ignored) -> Json:
    if isinstance(outcome, Ignored):
        return Json({"status": "ignored", "reason": outcome.reason})
    user, decision = unscoped(outcome.user), outcome.decision
    if decision is None:
        return Json({"status": "duplicate", "user": user})
    if isinstance(decision, AskForLink):
        return Json({"status": "unknown_user", "action": "none", "user": user})
    locked = isinstance(decision, Bind)
    content = {
        "status": "routed",
        "action": "new_session_locked" if locked else "existing_session",
        "user": user,
        "tenant_id": decision.tenant,
    }
    if isinstance(decision, Bind) and decision.previous is not None:
        content["previous_tenant_id"] = decision.previous
    return Json(content)
