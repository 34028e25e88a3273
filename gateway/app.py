"""create_app(): builds every part, closes them in reverse order."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable

import httpx
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import VERSION, backend
from gateway.api import admin, answers, health
from gateway.api.access import Access
from gateway.api.explain import explain_router
from gateway.api.recovery import recovery_router
from gateway.api.refusals import Refusals
from gateway.api.tenants import links_router, tenants_router
from gateway.api.users import users_router
from gateway.api.webhook import WebhookEndpoint
from gateway.delivery import Courier
from gateway.errors import GatewayError
from gateway.help import Helper
from gateway.hour import Hour
from gateway.ingest import Ingest, Rules
from gateway.lids import Lids
from gateway.metrics import Metrics
from gateway.model import Address
from gateway.operator import Operator
from gateway.page.door import Door
from gateway.page.frame import Frame
from gateway.page.views import Page
from gateway.pulse import Pulse
from gateway.recovery import Recovery
from gateway.sessions import Sessions
from gateway.settings import EVENTS_OF_NOBODY, Settings, split
from gateway.shapes import Shapes
from gateway.state import State
from gateway.store import Limits, open_store
from gateway.store.opening import share_folder
from gateway.targets import Targets
from gateway.tenants import FILE_NAME, Tenants
from gateway.waha.client import Waha
from gateway.watch import Watch

WEBHOOK_PATHS = ("/webhook/waha", "/webhook/waha/")  # a redirect would lose WAHA's body
GRACE_SECONDS = 25.0  # for what is in flight at the end; docker compose is given 30 s

log = logging.getLogger(__name__)


class Gateway(FastAPI):
    """FastAPI, but a webhook does not pass its middleware: half of what an answer costs."""

    webhook: WebhookEndpoint | None = None  # while the store is open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.webhook and scope.get("path") in WEBHOOK_PATHS and scope.get("method") == "POST":
            await self.webhook(scope, receive, send)
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
    access = Access(settings)
    refusals = Refusals()

    def leave(reason: str) -> None:
        app.state.distrusted = reason
        signal.raise_signal(signal.SIGTERM)  # the orderly end: answer, finish what is in flight

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tenants = Tenants(settings.data_dir / FILE_NAME)
        place = settings.store_place
        metrics, pulse = Metrics(version=VERSION, store=place.partition(":")[0]), Pulse()
        # The files' store locks the folder for itself.
        shared = None if place.startswith("file:") else share_folder(settings.data_dir)
        store = await open_store(place, limits or _limits(settings), leave, metrics.committed)
        waha = Waha(settings.waha_api_url, settings.waha_api_key.get_secret_value())
        metrics.watch_stalls(pulse.longest_stall)
        sessions, shapes = Sessions(metrics), Shapes(metrics)
        lids = Lids(
            waha,
            store,
            sessions,
            metrics,
            home_session=settings.waha_session,
            gateway_phone=settings.gateway_phone,
            keep_asking=settings.hold_seconds,
        )
        helper = Helper(
            waha,
            store,
            sessions,
            lids,
            metrics,
            text=settings.help_message.strip(),
            per_minute=settings.help_per_minute,
            home_session=settings.waha_session,
        )
        targets = Targets(
            Address(settings.backend_url, split(settings.backend_signing_secret)),
            tenants,
            timeout=settings.backend_timeout,
            transport=transport(settings.max_in_flight),
        )
        courier = Courier(
            store,
            targets,
            lids,
            metrics,
            max_in_flight=settings.max_in_flight,
            max_age=settings.max_delivery_age,
        )
        app.state.courier = courier
        routes_before = list(app.router.routes)
        ingest = Ingest(store, _rules(settings), tenants, sessions, shapes, lids, helper)
        endpoint = WebhookEndpoint(ingest, access, refusals, metrics, settings.max_body_bytes)
        operator = Operator(store, lids, metrics)
        recovery = Recovery(waha, store, sessions, ingest, metrics, hours=settings.recover_hours)
        watch = Watch(waha, sessions, metrics, home_session=settings.waha_session)
        state = State(store, courier, tenants, sessions, shapes, watch, recovery)
        hour = Hour(metrics)
        page = Page(
            store=store,
            operator=operator,
            state=state,
            tenants=tenants,
            sessions=sessions,
            hour=hour,
            frame=Frame(Door(access), refusals),
            settings=settings,
        )
        app.router.routes.extend(page.routes())
        for path in WEBHOOK_PATHS:
            app.router.routes.append(Route(path, endpoint, methods=["POST"]))
        app.webhook = endpoint
        guard = [Depends(_guard(access))]
        app.include_router(health.health_router(store))
        ready = health.ready_router(store, courier, state, metrics, settings)
        app.include_router(ready, dependencies=guard)
        for one in (
            admin.router(store),
            users_router(
                store,
                operator,
                tenants,
                home_session=settings.waha_session,
                gateway_phone=settings.gateway_phone,
            ),
            tenants_router(store, operator, tenants),
            admin.letters_router(store, operator, settings.waha_session),
            links_router(
                tenants, prefix=settings.deep_link_prefix, gateway_phone=settings.gateway_phone
            ),
        ):
            app.include_router(one, dependencies=guard)
        explain = explain_router(ingest, access, settings.max_body_bytes)
        app.include_router(explain, dependencies=guard)
        recover = recovery_router(recovery, home_session=settings.waha_session)
        app.include_router(recover, dependencies=guard)
        pulse.start()
        await lids.start()
        await helper.start()
        tenants.start()
        courier.start()
        await recovery.start()
        watch.start()
        hour.start()
        users, homes = store.totals()
        log.info(
            "Gateway %s on %s:%s: %s users locked to %s tenants, backend %s",
            VERSION,
            settings.host,
            settings.port,
            users,
            homes,
            settings.backend_url,
            extra={"event": "start"},
        )
        _warn_of_open_doors(settings)
        _tell_of_events(settings.forward_events)
        try:
            yield
        finally:
            watch.stop()
            hour.stop()
            await asyncio.gather(courier.stop(GRACE_SECONDS), helper.stop(), recovery.stop())
            await lids.stop()
            tenants.stop()
            pulse.stop()
            await waha.close()
            await store.close()
            if shared:
                shared.close()
            app.router.routes[:] = routes_before  # those that knew the closed store go with it
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
    app.state.distrusted = None

    @app.exception_handler(GatewayError)
    async def refused(request: Request, exc: GatewayError) -> Response:
        return refusals.answer(request, exc)

    @app.exception_handler(RequestValidationError)
    async def unusable(_: Request, exc: RequestValidationError) -> Response:
        return answers.of_input(exc.errors())

    _add_documents(app, access)
    return app


def _warn_of_open_doors(settings: Settings) -> None:
    for name in settings.published_keys:
        log.warning(
            "%s is a key that stands in public documents: with another HOST than this machine's"
            " the start is refused",
            name,
            extra={"event": "start.published_key"},
        )
    if settings.listens_on_loopback and not settings.admin_api_key.get_secret_value():
        # nginx 1.29.7 and later passes a call on as HTTP/1.1 and adds nothing it could be told by.
        log.info(
            "Without ADMIN_API_KEY whoever calls from this machine may administer; set it and"
            " WEBHOOK_HMAC_KEY where a reverse proxy stands in front",
            extra={"event": "start.no_key"},
        )


def _tell_of_events(forwarded: frozenset[str]) -> None:
    for_nobody = EVENTS_OF_NOBODY if "*" in forwarded else EVENTS_OF_NOBODY & forwarded
    if for_nobody:
        log.log(
            logging.INFO if "*" in forwarded else logging.WARNING,
            "Not forwarded, whatever FORWARD_EVENTS says, for they concern no single user: %s. The"
            " state of WAHA's sessions stands in /ready, /metrics and the log",
            ", ".join(sorted(for_nobody)),
            extra={"event": "start.events"},
        )


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_in_flight=settings.max_in_flight,
        max_in_flight_per_tenant=settings.max_in_flight_per_tenant,
        max_backlog=settings.max_backlog,
        max_backlog_per_tenant=settings.max_backlog_per_tenant,
        hold_seconds=settings.hold_seconds,
        help_cooldown=settings.help_cooldown,
    )


def _rules(settings: Settings) -> Rules:
    return Rules(
        home_session=settings.waha_session,
        gateway_phone=settings.gateway_phone,
        prefix=settings.deep_link_prefix,
        policy=settings.lock_policy,
        forward_events=settings.forward_events,
        hold_seconds=settings.hold_seconds,
    )


def _guard(access: Access) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        access.check_admin(request)

    return check


def _add_documents(app: FastAPI, access: Access) -> None:
    """/docs and /openapi.json, behind the same key as what they describe."""
    guard = [Depends(_guard(access))]

    @app.get("/openapi.json", include_in_schema=False, dependencies=guard)
    async def openapi() -> answers.Json:
        return answers.Json(app.openapi())

    @app.get("/docs", include_in_schema=False, dependencies=guard)
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)
