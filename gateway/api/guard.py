"""Before any route but the webhook's: who may call, by the request's head, and how much body it may
send. The page, which has a cookie, asks for itself."""

from fastapi import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import bodies
from gateway.api.access import Access
from gateway.api.brake import Brake
from gateway.api.refusals import Refusals
from gateway.errors import BodyTooLarge, GatewayError
from gateway.inbound import sources

LIMIT = bodies.Limit(65_536)  # of every call but those that carry a webhook
EXPLAIN = "/router/explain"  # it carries one
# Open to all, or (the page) with a check of its own, of a cookie.
_OPEN = sources.PATHS | {"/health", "/router", "/router/"}
_PAGE = "/router/page/"


class Guard:
    """of_webhooks: the limit of a body that is a webhook's, wherever it comes."""

    def __init__(
        self, access: Access, brake: Brake, refusals: Refusals, *, of_webhooks: bodies.Limit
    ) -> None:
        self._access = access
        self._brake = brake
        self._refusals = refusals
        self._of_webhooks = of_webhooks

    async def serve(
        self, app: ASGIApp, routes: list[BaseRoute], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Call app, which serves routes, if the caller may; else answer why not."""
        connection = HTTPConnection(scope)
        limit = self._of_webhooks if scope["path"] == EXPLAIN else LIMIT
        try:
            # What no route takes is answered so: somebody may mean the webhook's path.
            if not is_open(scope["path"]) and _is_taken(routes, scope):
                self._access.check_admin(connection)
            bodies.check_announced(connection, limit)
        except GatewayError as exc:
            answer = await self._refusal(connection, exc, limit)
            await answer(scope, receive, send)
            return
        await app(scope, _bounded(receive, limit), send)

    async def _refusal(
        self, connection: HTTPConnection, exc: GatewayError, limit: bodies.Limit
    ) -> Response:
        answer = self._refusals.answer(connection, await self._brake.hold(connection, exc))
        if bodies.may_exceed(connection, limit):
            answer.headers["Connection"] = "close"  # what it would still send is not waited for
        return answer


def is_open(path: str) -> bool:
    """Whether a route of that path is served without ADMIN_API_KEY, or asks for it itself."""
    return path in _OPEN or path.startswith(_PAGE)


def _is_taken(routes: list[BaseRoute], scope: Scope) -> bool:
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)


def _bounded(receive: Receive, limit: bodies.Limit) -> Receive:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        try:
            bodies.check_size(size, limit)
        except BodyTooLarge as exc:  # FastAPI lets no other error through while it reads a body
            raise HTTPException(413, str(exc), headers={"Connection": "close"}) from exc
        return message

    return bounded
