"""/health for load balancers, /ready for people, /metrics for Prometheus."""

import asyncio
import itertools
import shutil

from fastapi import APIRouter
from starlette.responses import Response

from gateway.api.answers import Json
from gateway.delivery.worker import Courier
from gateway.errors import StoreUnavailable
from gateway.metrics import CONTENT_TYPE, Figures, Metrics
from gateway.operations.status import SENTENCES, Level, Part, State, age, backlog_of
from gateway.settings import Settings
from gateway.store import Store

SERVICE = "whatsapp-gateway-router"


def health_router(store: Store) -> APIRouter:
    api = APIRouter(tags=["health"])

    @api.head("/health", include_in_schema=False)
    @api.get("/health")
    async def health() -> Json:
        """503 only when this router cannot accept webhooks. Open to all: load balancers ask."""
        users, tenants = store.totals()
        well = store.health().refusing is None
        return Json(
            {
                "status": "healthy" if well else "unhealthy",
                "service": SERVICE,
                "total_locked_users": users,
                "unique_tenants": tenants,
            },
            200 if well else 503,
        )

    return api


def ready_router(
    store: Store, courier: Courier, state: State, metrics: Metrics, settings: Settings
) -> APIRouter:
    api = APIRouter(tags=["health"])

    @api.head("/ready", include_in_schema=False)
    @api.get("/ready")
    async def ready() -> Json:
        """A line for each part, `ok` or `degraded`. 503 only when it cannot accept webhooks."""
        parts = state.parts(await backlog_of(store))
        status = "ready" if all(one.level is Level.WELL for one in parts) else "degraded"
        if not state.accepting:
            status = "unavailable"
        lines = {one.name: _line(one) for one in parts}
        return Json({"status": status, **lines}, 200 if state.accepting else 503, lines=True)

    @api.head("/metrics", include_in_schema=False)
    @api.get("/metrics", include_in_schema=False)  # it answers no JSON
    async def metrics_() -> Response:
        """For Prometheus."""
        metrics.show(await _figures(store, courier, state, settings))
        # In a thread: with hundreds of sessions it takes a while.
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    return api


def _line(part: Part) -> str:
    said = SENTENCES[part.said].format_map(part.values)
    return f"{'ok' if part.level is Level.WELL else 'degraded'}: {said}"


async def _figures(store: Store, courier: Courier, state: State, settings: Settings) -> Figures:
    """What is not counted as it happens."""
    health, (users, tenants), targets = store.health(), store.totals(), courier.targets
    asked = await backlog_of(store)
    backlog = None if isinstance(asked, StoreUnavailable) else asked
    return Figures(
        waiting=backlog.waiting if backlog else None,
        oldest_seconds=age(backlog) if backlog else None,
        held=backlog.held if backlog else None,
        dead_letters=backlog.dead if backlog else None,
        unreadable=backlog.unreadable if backlog else None,
        in_flight=courier.in_flight,
        gates_closed=len(targets.closed()),
        shared_gate_open=not targets.shared.gate.closed,
        locked_users=users,
        locked_tenants=tenants,
        store_up=health.refusing is None,
        store_at_risk=health.at_risk is not None,
        mappings_lag=health.mappings_lag if health.has_file else None,
        disk_free=shutil.disk_usage(settings.data_dir).free if health.has_file else None,
        waiting_by_tenant=dict(
            itertools.islice(backlog.by_tenant.items() if backlog else (), settings.metrics_tenants)
        ),
        gaps=state.gap_ages(),
        seconds_ahead=state.seconds_ahead(),
    )
