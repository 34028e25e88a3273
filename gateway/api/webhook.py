"""POST /webhook/waha: what WAHA calls.

A raw ASGI endpoint, because this is the hot path and needs the body's own bytes. WAHA repeats
whatever is not answered with 2xx, fifteen times, so what is merely unwanted gets 200.
"""

import time
from typing import Any, Protocol

import orjson
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from gateway.api import bodies
from gateway.api.access import Access
from gateway.api.answers import Json
from gateway.api.brake import Brake
from gateway.api.refusals import Refusals
from gateway.domain.model import Accepted, AskForLink, Bind, Note, unscoped
from gateway.errors import BadBody, BadSignature, GatewayError, NotAllowed, StoreUnavailable
from gateway.inbound.ingest import Ignored, Ingest
from gateway.inbound.sources import parse_of
from gateway.metrics import Metrics

AT_ONCE = "gateway.at_once"  # an extension of ASGI, by which a server may offer what follows


class AtOnce(Protocol):
    """A request in one piece, and its answer in another, without ASGI's messages between."""

    def body(self) -> bytes | None:
        """The whole body; None if it is still arriving."""

    def answer(self, json: bytes) -> bool:
        """Send json with 200; False if it must go by ASGI, and nothing was sent."""


class WebhookEndpoint:
    def __init__(
        self,
        ingest: Ingest,
        access: Access,
        refusals: Refusals,
        brake: Brake,
        metrics: Metrics,
        limit: bodies.Limit,
    ) -> None:
        self._ingest = ingest
        self._access = access
        self._refusals = refusals
        self._metrics = metrics
        self._brake = brake
        self._limit = limit
        self._unverified = bodies.Unverified() if access.wants_signatures else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        connection = HTTPConnection(scope)
        at_once: AtOnce | None = scope.get("extensions", {}).get(AT_ONCE)
        try:
            self._access.check_webhook(connection)
            body = at_once.body() if at_once else None
            if body is None:
                body = await bodies.read(connection, receive, self._limit, self._unverified)
            bodies.check_size(len(body), self._limit)
            outcome = await self._receive(connection, body)
        except GatewayError as exc:
            took = time.perf_counter() - began
            answer = self._refusals.answer(connection, await self._brake.hold(connection, exc))
            await answer(scope, receive, send)
            self._metrics.webhook(_refusal(exc), took)
            return
        content = answer_of(outcome)
        if not (at_once and at_once.answer(orjson.dumps(content))):
            await Json(content)(scope, receive, send)
        self._metrics.webhook(outcome.outcome, time.perf_counter() - began)

    async def _receive(self, connection: HTTPConnection, body: bytes) -> Accepted | Ignored:
        try:
            self._access.check_signature(connection, body)
            path = connection.scope["path"]
            return await self._ingest.receive(body, connection.headers, parse=parse_of(path))
        except (BadBody, BadSignature):
            bodies.check_encoding(connection)  # which would be why; asked only now: it is rare
            raise


def _refusal(exc: GatewayError) -> str:
    if isinstance(exc, StoreUnavailable):
        return "unavailable"
    return "unauthorized" if isinstance(exc, BadSignature | NotAllowed) else "bad"


def answer_of(outcome: Accepted | Ignored) -> dict[str, Any]:
    """What WAHA is answered; the keys in this order."""
    if isinstance(outcome, Ignored):
        return {"status": "ignored", "reason": outcome.reason}
    user, decision = unscoped(outcome.user), outcome.decision
    if decision is None:
        return {"status": "duplicate", "user": user}
    if isinstance(decision, AskForLink):
        action = "sent_help_message" if outcome.help_waits else "none"
        if decision.link and decision.link.note is Note.REFUSED:
            action = "unknown_tenant"
        return {"status": "unknown_user", "action": action, "user": user}
    locked = isinstance(decision, Bind)
    content = {
        "status": "routed",
        "action": "new_session_locked" if locked else "existing_session",
        "user": user,
        "tenant_id": decision.tenant,
    }
    if isinstance(decision, Bind) and decision.previous is not None:
        content["previous_tenant_id"] = decision.previous
    return content
