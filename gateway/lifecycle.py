"""Every component built, started, and closed in reverse order."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields

import httpx

from gateway import VERSION
from gateway.delivery.targets import Targets
from gateway.delivery.worker import DeliveryWorker
from gateway.domain.model import Address
from gateway.errors import StartRefused, StoreUnavailable
from gateway.inbound.ingest import Ingest, Rules
from gateway.inbound.recovery import Recovery
from gateway.metrics import Metrics
from gateway.operations.actions import Actions
from gateway.operations.lock_reports import LockReports
from gateway.operations.loop_lag import LoopLag
from gateway.operations.status import Status
from gateway.operations.traffic import Traffic
from gateway.settings import Settings, split
from gateway.store import Limits, Store, open_store
from gateway.store.files.opening import share_folder
from gateway.tenants.links import Links
from gateway.tenants.registry import FILE_NAME, Tenants
from gateway.waha.client import Waha
from gateway.waha.clock_skew import ClockSkew
from gateway.waha.health_check import HealthCheck, Keys
from gateway.waha.help_messages import HelpMessages
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.media import Media
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.schema_drift import SchemaDrift
from gateway.waha.sessions import Sessions

GRACE_SECONDS = 25.0  # for what is in flight at the end; docker compose is given 30 s


@dataclass(frozen=True, slots=True)
class Components:
    """Everything between HTTP and the store."""

    metrics: Metrics
    loop_lag: LoopLag
    tenants: Tenants
    links: Links
    store: Store
    sessions: Sessions
    lid_lookup: LidLookup
    help_messages: HelpMessages
    worker: DeliveryWorker
    ingest: Ingest
    actions: Actions
    recovery: Recovery
    health_check: HealthCheck
    status: Status
    traffic: Traffic


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    *,
    transport: Callable[[int], httpx.AsyncBaseTransport],
    limits: Limits | None,
    shut_down: Callable[[str], None],
) -> AsyncIterator[Components]:
    """Build, start and, when the block ends, stop and close everything. Raise StartRefused.

    shut_down: called with the reason, once, when the store can be trusted no more.
    """
    suspect = False

    def shut_down_now(reason: str) -> None:
        nonlocal suspect
        suspect = True  # nothing that is in flight could be settled any more
        shut_down(reason)

    async with contextlib.AsyncExitStack() as closing:
        place = settings.store_place
        metrics = Metrics(version=VERSION, store=place.partition(":")[0])
        tenants = Tenants(settings.data_dir / FILE_NAME)
        # The files' store locks the folder for itself.
        if not place.startswith("file:") and (folder := share_folder(settings.data_dir)):
            closing.callback(folder.close)
        store = await open_store(
            place,
            limits or _limits(settings),
            shut_down_now,
            metrics.committed,
            LockReports(metrics).report,
            beside=settings.data_dir if settings.store_url else None,
        )
        closing.push_async_callback(store.close)
        waha = Waha(settings.waha_api_url, settings.waha_api_key.get_secret_value())
        closing.push_async_callback(waha.close)

        built = _build(settings, metrics, tenants, store, waha, transport)
        closing.push_async_callback(_stop, built, lambda: 0.0 if suspect else GRACE_SECONDS)
        await _start(built)
        yield built


async def _start(built: Components) -> None:
    built.loop_lag.start()
    try:
        await built.lid_lookup.start()
        await built.help_messages.start()
        built.tenants.start()
        built.worker.start()
        await built.recovery.start()
    except StoreUnavailable as exc:
        raise StartRefused(f"the store went away while we started: {exc}") from exc
    built.health_check.start()
    built.traffic.start()


async def _stop(built: Components, grace: Callable[[], float]) -> None:
    """Stop in the reverse order of the start, whatever fails; each can be stopped unstarted."""
    async with contextlib.AsyncExitStack() as stopping:
        stopping.callback(built.loop_lag.stop)
        stopping.callback(built.tenants.stop)
        stopping.push_async_callback(built.lid_lookup.stop)
        stopping.push_async_callback(_finish, built, grace)
        stopping.callback(built.traffic.stop)
        stopping.callback(built.health_check.stop)


async def _finish(built: Components, grace: Callable[[], float]) -> None:
    """Let each wait for what is on its way, all at once."""
    await asyncio.gather(
        built.worker.stop(grace()), built.help_messages.stop(), built.recovery.stop()
    )


def _build(
    settings: Settings,
    metrics: Metrics,
    tenants: Tenants,
    store: Store,
    waha: Waha,
    transport: Callable[[int], httpx.AsyncBaseTransport],
) -> Components:
    home = settings.waha_session
    sessions, drift, skew = Sessions(metrics), SchemaDrift(metrics), ClockSkew(store.now)
    own_numbers = OwnNumbers(settings.gateway_phone, tenants, sessions)
    lid_lookup = LidLookup(
        waha,
        store,
        sessions,
        own_numbers,
        metrics,
        home_session=home,
        keep_asking=settings.hold_seconds,
        clock=store.now,
    )
    help_messages = HelpMessages(
        waha,
        store,
        sessions,
        lid_lookup,
        metrics,
        text=settings.help_message.strip(),
        per_minute=settings.help_per_minute,
        home_session=home,
        clock=store.now,
    )
    ingest = Ingest(
        store,
        _rules(settings),
        tenants,
        sessions,
        own_numbers,
        drift,
        lid_lookup,
        help_messages,
        metrics,
        skew,
        clock=store.now,
    )
    worker = DeliveryWorker(
        store,
        _targets(settings, tenants, transport),
        lid_lookup,
        Media(waha, home_session=home),
        metrics,
        max_in_flight=settings.max_in_flight,
        max_age=settings.max_delivery_age,
        clock=store.now,
    )
    recovery = Recovery(waha, store, sessions, ingest, metrics, hours=settings.recover_hours)
    keys = Keys(split(settings.webhook_hmac_key), settings.waha_api_key.get_secret_value())
    health_check = HealthCheck(waha, sessions, metrics, recovery, home_session=home, keys=keys)
    loop_lag = LoopLag()
    metrics.export_stalls(loop_lag.longest_stall)
    return Components(
        metrics=metrics,
        loop_lag=loop_lag,
        tenants=tenants,
        links=Links(tenants, settings),
        store=store,
        sessions=sessions,
        lid_lookup=lid_lookup,
        help_messages=help_messages,
        worker=worker,
        ingest=ingest,
        actions=Actions(store, tenants, own_numbers, lid_lookup, metrics, skew),
        recovery=recovery,
        health_check=health_check,
        status=Status(store, worker, tenants, sessions, drift, health_check, recovery, skew),
        traffic=Traffic(metrics),
    )


def _targets(
    settings: Settings, tenants: Tenants, transport: Callable[[int], httpx.AsyncBaseTransport]
) -> Targets:
    return Targets(
        Address(settings.backend_url, split(settings.backend_signing_secret)),
        tenants,
        timeout=settings.backend_timeout,
        # Probes of tenants' own backends may come on top of MAX_IN_FLIGHT, half of it at most.
        transport=transport(settings.max_in_flight * 3 // 2),
        max_in_flight=settings.max_in_flight,
        max_in_flight_per_tenant=settings.max_in_flight_per_tenant,
    )


def _limits(settings: Settings) -> Limits:
    """Each limit that is a setting, by its name."""
    return Limits(
        **{
            one.name: getattr(settings, one.name)
            for one in fields(Limits)
            if hasattr(settings, one.name)
        }
    )


def _rules(settings: Settings) -> Rules:
    return Rules(
        home_session=settings.waha_session,
        prefix=settings.deep_link_prefix,
        policy=settings.lock_policy,
        forward_events=settings.forward_events,
        hold_seconds=settings.hold_seconds,
    )
