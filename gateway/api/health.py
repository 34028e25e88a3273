"""/health for load balancers, /ready for people, /metrics for Prometheus."""

import asyncio
import itertools
import shutil

from fastapi import APIRouter
from starlette.responses import Response

from gateway.api.answers import Json
from gateway.delivery.worker import DeliveryWorker
from gateway.errors import StoreUnavailable
from gateway.metrics import CONTENT_TYPE, Figures, Metrics
from gateway.operations.status import SENTENCES, Finding, Level, Status, age, backlog_of
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
        is_healthy = store.health().refusing is None
        return Json(
            {
                "status": "healthy" if is_healthy else "unhealthy",
                "service": SERVICE,
                "total_locked_users": users,
                "unique_tenants": tenants,
            },
            200 if is_healthy else 503,
        )

    return api


def ready_router(
    store: Store, worker: DeliveryWorker, status_of: Status, metrics: Metrics, settings: Settings
) -> APIRouter:
    api = APIRouter(tags=["health"])

    @api.head("/ready", include_in_schema=False)
    @api.get("/ready")
    async def ready() -> Json:
        """A line for each part, `ok` or `degraded`. 503 only when it cannot accept webhooks."""
        findings = status_of.findings(await backlog_of(store))
        status = "ready" if all(one.level is Level.OK for one in findings) else "degraded"
        if not status_of.accepting:
            status = "unavailable"
        lines = {one.name: _line(one) for one in findings}
        return Json({"status": status, **lines}, 200 if status_of.accepting else 503, lines=True)

    @api.get("/router/status")
    async def components() -> Json:
        """The same for programs: of each part its status, `OK`, `WARN` or `DOWN`, the code of what
        was found, the WAHA session that it concerns, and the sentence."""
        findings = status_of.findings(await backlog_of(store))
        return Json(
            {
                "components": [
                    {
                        "component": one.component,
                        "session": one.session,
                        "status": one.level.name,
                        "code": one.code,
                        "text": _sentence(one),
                    }
                    for one in findings
                ]
            }
        )

    @api.head("/metrics", include_in_schema=False)
    @api.get("/metrics", include_in_schema=False)  # it answers no JSON
    async def metrics_() -> Response:
        """For Prometheus."""
        metrics.show(await _figures(store, worker, status_of, settings))
        # In a thread: with hundreds of sessions it takes a while.
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    return api


def _line(finding: Finding) -> str:
    return f"{'ok' if finding.level is Level.OK else 'degraded'}: {_sentence(finding)}"


def _sentence(finding: Finding) -> str:
    return SENTENCES[finding.code].format_map(finding.values)


async def _figures(
    store: Store, worker: DeliveryWorker, status_of: Status, settings: Settings
) -> Figures:
    """What is not counted as it happens."""
    health, (users, tenants), targets = store.health(), store.totals(), worker.targets
    asked = await backlog_of(store)
    backlog = None if isinstance(asked, StoreUnavailable) else asked
    return Figures(
        waiting=backlog.waiting if backlog else None,
        oldest_seconds=age(backlog) if backlog else None,
        held=backlog.held if backlog else None,
        dead_letters=backlog.dead if backlog else None,
        unreadable=backlog.unreadable if backlog else None,
        in_flight=worker.in_flight,
        breakers_open=len(targets.open_targets()),
        shared_breaker_open=targets.shared.breaker.is_open,
        locked_users=users,
        locked_tenants=tenants,
        store_up=health.refusing is None,
        store_at_risk=health.at_risk is not None,
        mappings_lag=health.mappings_lag if health.has_file else None,
        disk_free=shutil.disk_usage(settings.data_dir).free if health.has_file else None,
        waiting_by_tenant=dict(
            itertools.islice(backlog.by_tenant.items() if backlog else (), settings.metrics_tenants)
        ),
        gaps=status_of.gap_ages(),
        seconds_ahead=status_of.seconds_ahead(),
    )
