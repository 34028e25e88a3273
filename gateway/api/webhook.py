"""POST /webhook/waha: what WAHA calls.

A raw ASGI endpoint, because this is the hot path and needs the body's own bytes. WAHA repeats
whatever is not answered with 2xx, fifteen times, so what is merely unwanted gets 200.
"""

from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from gateway.api import bodies
from gateway.api.access import Access
from gateway.api.answers import Json
from gateway.api.refusals import Refusals
from gateway.errors import GatewayError
from gateway.ingest import Ignored, Ingest
from gateway.model import Accepted, AskForLink, Bind, unscoped


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
            body = await bodies.read(connection, receive, self._max_body_bytes)
            self._access.check_signature(connection, body)
            answer = answer_of(await self._ingest.receive(body, connection.headers))
        except GatewayError as exc:
            answer = self._refusals.answer(connection, exc)
        await answer(scope, receive, send)


def answer_of(outcome: Accepted | Ignored) -> Json:
    """What WAHA is told; the keys in this order."""
    if isinstance(outcome, Ignored):
        return Json({"status": "ignored", "reason": outcome.reason})
    user, decision = unscoped(outcome.user), outcome.decision
    if decision is None:
        return Json({"status": "duplicate", "user": user})
    if isinstance(decision, AskForLink):
        action = "sent_help_message" if outcome.help_waits else "none"
        return Json({"status": "unknown_user", "action": action, "user": user})
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
