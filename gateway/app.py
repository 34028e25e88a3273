"""create_app(): the components, and the routes that lead to them."""

import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable

import httpx
from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import HTTPException, RequestValidationError
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import VERSION
from gateway.api import admin, answers, bodies, health
from gateway.api.access import Access
from gateway.api.brake import Brake
from gateway.api.explain import explain_router
from gateway.api.guard import Guard
from gateway.api.inputs import Users
from gateway.api.recovery import recovery_router
from gateway.api.refusals import Refusals
from gateway.api.tenants import links_router, tenants_router
from gateway.api.users import locks_router, users_router
from gateway.api.webhook import WebhookEndpoint
from gateway.delivery import backend
from gateway.errors import BodyEncoded, GatewayError
from gateway.inbound import sources
from gateway.lifecycle import Components, running
from gateway.page.documents import documents
from gateway.page.layout import Layout
from gateway.page.login import PageAccess
from gateway.page.views import Page
from gateway.settings import EVENTS_OF_NOBODY, Settings
from gateway.store import Limits

log = logging.getLogger(__name__)


class Gateway(FastAPI):
    """FastAPI, but a webhook does not pass its middleware: half of what an answer costs."""

    webhook: WebhookEndpoint | None = None  # while the store is open

    guard: Guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.webhook and scope.get("path") in sources.PATHS and scope.get("method") == "POST":
            await self.webhook(scope, receive, send)
        elif scope["type"] == "http":
            await self.guard.serve(super().__call__, self.router.routes, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    settings: Settings,
    *,
    transport: Callable[[int], httpx.AsyncBaseTransport] = backend.transport,
    limits: Limits | None = None,
) -> FastAPI:
    """The gateway as an ASGI application; it opens its store when it starts, and raises
    StartRefused there if that cannot be trusted.

    transport: makes the way to the backend, given how many connections it may hold.
    limits: for tests that need other ones than the settings give.
    """
    access, brake, refusals = Access(settings), Brake(), Refusals()
    of_webhooks = bodies.Limit(settings.max_body_bytes, "MAX_BODY_BYTES")

    def shut_down(reason: str) -> None:
        if app.state.suspect is None:  # a second signal would cut the orderly end short
            app.state.suspect = reason
            signal.raise_signal(signal.SIGTERM)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        routes_before = list(app.router.routes)
        async with running(
            settings, transport=transport, limits=limits, shut_down=shut_down
        ) as components:
            app.state.worker = components.worker
            webhook = WebhookEndpoint(
                components.ingest, access, refusals, brake, components.metrics, of_webhooks
            )
            page = Page(
                components, layout=Layout(PageAccess(access), brake, refusals), settings=settings
            )
            app.router.routes.extend(page.routes())
            app.router.routes.extend(
                Route(path, webhook, methods=["POST"]) for path in sources.PATHS
            )
            app.include_router(explain_router(components.ingest, access, of_webhooks))
            _open(app, components, settings)
            app.webhook = webhook
            _greet(settings, components)
            try:
                yield
            finally:
                app.router.routes[:] = routes_before  # those that know a closed store go with it
                app.webhook = None
        log.info("Gateway stopped", extra={"event": "stop"})

    app = Gateway(
        title="WhatsApp gateway router",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.guard = Guard(access, brake, refusals, of_webhooks=of_webhooks)
    app.state.suspect = None

    _add_refusals(app, refusals)
    _add_documents(app)
    return app


def _add_refusals(app: FastAPI, refusals: Refusals) -> None:
    """What is answered where no route can."""

    @app.exception_handler(GatewayError)
    async def refused(request: Request, exc: GatewayError) -> Response:
        return refusals.answer(request, exc)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, exc: HTTPException) -> Response:
        if request.scope.get("route") is None or exc.status_code == 405:
            refusals.wrong_path(request, exc.status_code)
        return await http_exception_handler(request, exc)

    @app.exception_handler(400)
    async def undecodable(request: Request, exc: HTTPException) -> Response:
        return encoded(request) or await http_exception_handler(request, exc)

    def encoded(request: Request) -> Response | None:
        """The answer to a body that cannot be read because it is compressed; None if it is not."""
        try:
            bodies.check_encoding(request)
        except BodyEncoded as exc:
            return refusals.answer(request, exc)
        return None

    @app.exception_handler(RequestValidationError)
    async def unusable(request: Request, exc: RequestValidationError) -> Response:
        if answer := encoded(request):
            return answer
        return answers.of_input(exc.errors(), request.headers.get("content-type"))


def _open(app: Gateway, components: Components, settings: Settings) -> None:
    """Add the routes that need nothing but the components."""
    store, actions, tenants = components.store, components.actions, components.tenants
    home = settings.waha_session
    users = Users(home_session=home, gateway_phone=settings.gateway_phone)
    for one in (
        health.health_router(store),
        health.ready_router(
            store, components.worker, components.status, components.metrics, settings
        ),
        admin.router(store),
        admin.dead_letters_router(store, actions, users),
        users_router(store, actions, users),
        locks_router(actions, users),
        tenants_router(store, actions, tenants),
        links_router(components.links),
        recovery_router(components.recovery, home_session=home),
    ):
        app.include_router(one)


def _greet(settings: Settings, components: Components) -> None:
    users, tenants = components.store.totals()
    log.info(
        "Gateway %s on %s:%s: %s users locked to %s tenants, backend %s",
        VERSION,
        settings.host,
        settings.port,
        users,
        tenants,
        settings.backend_url,
        extra={"event": "start"},
    )
    _warn_of_access(settings)
    _log_events(settings.forward_events)


def _warn_of_access(settings: Settings) -> None:
    for name in settings.published_keys:
        log.warning(
            "%s is a key that is in public documents: with another HOST than this machine's"
            " the start is refused",
            name,
            extra={"event": "start.published_key"},
        )
    if closed := settings.closed_to_others:
        log.warning("%s", " ".join(closed), extra={"event": "start.shut"})
    if settings.listens_on_loopback and not settings.admin_api_key.get_secret_value():
        # nginx 1.29.7 and later passes a call on as HTTP/1.1 and adds nothing that shows it.
        log.info(
            "Without ADMIN_API_KEY any caller on this machine may administer; set it and"
            " WEBHOOK_HMAC_KEY behind a reverse proxy",
            extra={"event": "start.no_key"},
        )


def _log_events(forwarded: frozenset[str]) -> None:
    for_nobody = EVENTS_OF_NOBODY if "*" in forwarded else EVENTS_OF_NOBODY & forwarded
    if for_nobody:
        log.log(
            logging.INFO if "*" in forwarded else logging.WARNING,
            "Not forwarded, whatever FORWARD_EVENTS says, for they concern no single user: %s. The"
            " state of WAHA's sessions is in /ready, /metrics and the log",
            ", ".join(sorted(for_nobody)),
            extra={"event": "start.events"},
        )


def _add_documents(app: FastAPI) -> None:
    """/openapi.json, and for people /docs: without a script, which FastAPI's loads from elsewhere
    into the origin that administers."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> answers.Json:
        return answers.Json(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return documents(app.openapi())
