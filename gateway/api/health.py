"""/health for load balancers, /ready for people."""

import asyncio
import itertools
import shutil
import time
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.responses import Response

from gateway.api.answers import Json
from gateway.delivery import Courier
from gateway.errors import StoreUnavailable
from gateway.metrics import CONTENT_TYPE, Figures, Metrics
from gateway.model import Backlog
from gateway.sessions import Sessions
from gateway.settings import Settings
from gateway.shapes import Shapes
from gateway.store import Store
from gateway.tenants import Tenants

SERVICE = "whatsapp-gateway-router"
_NAMED = 3  # of several things in one line
_OLD_SECONDS = 60.0  # a message that waits longer than this is worth a look


def health_router(store: Store) -> APIRouter:
    api = APIRouter(tags=["health"])

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
    store: Store,
    courier: Courier,
    tenants: Tenants,
    sessions: Sessions,
    shapes: Shapes,
    metrics: Metrics,
    settings: Settings,
) -> APIRouter:
    api = APIRouter(tags=["health"])

    @api.get("/ready")
    async def ready() -> Json:
        """A line for each part, `ok` or `degraded`. 503 only when it cannot accept webhooks."""
        health = store.health()
        parts = {
            "store": _part(health.refusing, "writable"),
            **(
                {"mappings_file": _part(health.mappings_behind, "holds every lock")}
                if health.has_file
                else {}
            ),
            "backlog": await _backlog(store, tenants),
            "backend_gate": _gates(courier),
            "tenants_file": _tenants(tenants),
            **_sessions(sessions),
            "webhook_bodies": _part("; ".join(shapes.odd()), "have the known form"),
        }
        state = "unavailable" if health.refusing else "ready"
        if state == "ready" and any(line.startswith("degraded") for line in parts.values()):
            state = "degraded"
        return Json({"status": state, **parts}, 503 if health.refusing else 200, lines=True)

    @api.get("/metrics", include_in_schema=False)  # it answers no JSON
    async def metrics_() -> Response:
        """For Prometheus."""
        metrics.show(await _figures(store, courier, settings))
        # In a thread: with hundreds of sessions it takes a while.
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    return api


async def _figures(store: Store, courier: Courier, settings: Settings) -> Figures:
    """What is not counted as it happens."""
    health, (users, homes), targets = store.health(), store.totals(), courier.targets
    try:
        backlog: Backlog | None = await store.backlog()
    except StoreUnavailable:
        backlog = None
    return Figures(
        waiting=backlog.waiting if backlog else None,
        oldest_seconds=_age(backlog) if backlog else None,
        held=backlog.held if backlog else None,
        dead_letters=backlog.dead if backlog else None,
        in_flight=courier.in_flight,
        gates_closed=len(targets.closed()),
        shared_gate_open=not targets.shared.gate.closed,
        locked_users=users,
        locked_tenants=homes,
        store_up=health.refusing is None,
        mappings_lag=health.mappings_lag if health.has_file else None,
        disk_free=shutil.disk_usage(settings.data_dir).free if health.has_file else None,
        waiting_by_tenant=dict(
            itertools.islice(backlog.by_tenant.items() if backlog else (), settings.metrics_tenants)
        ),
    )


def _age(backlog: Backlog) -> float:
    return 0.0 if backlog.oldest is None else max(0.0, time.time() - backlog.oldest)


def _part(trouble: str | None, well: str) -> str:
    return f"degraded: {trouble}" if trouble else f"ok: {well}"


def _gates(courier: Courier) -> str:
    if closed := courier.targets.closed():
        away = _some([target.url for target in closed])
        return f"degraded: closed, away is {away}; messages wait"
    return f"ok: open, {courier.in_flight} in flight"


def _some(things: Sequence[object]) -> str:
    """The first few of them."""
    more = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return ", ".join(map(str, things[:_NAMED])) + more


def _tenants(tenants: Tenants) -> str:
    listed = tenants.listed
    well = "none, every number is a tenant" if listed is None else f"{len(listed)} tenants"
    return _part(tenants.trouble, well)


async def _backlog(store: Store, tenants: Tenants) -> str:
    try:
        backlog = await store.backlog()
    except StoreUnavailable as exc:
        return f"degraded: unknown, {exc}"
    if backlog.oldest is None:
        return "ok: nothing waits"
    if stray := [tenant for tenant in backlog.by_tenant if tenants.get(tenant) is None]:
        return f"degraded: messages wait of tenants that tenants.json lacks: {_some(stray)}"
    age = _age(backlog)
    state = "degraded" if age > _OLD_SECONDS else "ok"
    return f"{state}: {backlog.waiting} wait or are in flight, the oldest for {age:.0f} s"


def _sessions(sessions: Sessions) -> dict[str, str]:
    """A line for each session."""
    known = sessions.all()
    if not known:
        return {"waha_sessions": "ok: no event since the start"}
    now = time.time()
    return {
        f"waha_session {name}": f"{'degraded' if session.in_trouble else 'ok'}:"
        f" {session.status or 'sends'}, last event {now - session.last_event:.0f} s ago"
        for name, session in known.items()
    }
