"""The parts of the gateway that know nothing of HTTP in: made, started, and ended in the reverse
order of their making, whatever happens in between."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

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
from gateway.waha.schema_drift import SchemaDrift
from gateway.waha.sessions import Sessions

GRACE_SECONDS = 25.0  # for what is in flight at the end; docker compose is given 30 s


@dataclass(frozen=True, slots=True)
class Components:
    """What the HTTP side needs of them."""

    metrics: Metrics
    tenants: Tenants
    links: Links
    store: Store
    sessions: Sessions
    worker: DeliveryWorker
    ingest: Ingest
    operator: Actions
    recovery: Recovery
    state: Status
    hour: Traffic


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    *,
    transport: Callable[[int], httpx.AsyncBaseTransport],
    limits: Limits | None,
    leave: Callable[[str], None],
) -> AsyncIterator[Components]:
    """All of them, at work until the block ends. Raise StartRefused.

    leave: called with the reason, once, when the store can be trusted no more.
    """
    suspect = False

    def leave_now(reason: str) -> None:
        nonlocal suspect
        suspect = True  # nothing that is in flight could be settled any more
        leave(reason)

    async with contextlib.AsyncExitStack() as ends:
        tenants = Tenants(settings.data_dir / FILE_NAME)
        place = settings.store_place
        metrics, loop_lag = Metrics(version=VERSION, store=place.partition(":")[0]), LoopLag()
        metrics.export_stalls(loop_lag.longest_stall)
        # The files' store locks the folder for itself.
        folder = None if place.startswith("file:") else share_folder(settings.data_dir)
        if folder:
            ends.callback(folder.close)
        store = await open_store(
            place,
            limits or _limits(settings),
            leave_now,
            metrics.committed,
            beside=settings.data_dir if settings.store_url else None,
        )
        ends.push_async_callback(store.close)
        waha = Waha(settings.waha_api_url, settings.waha_api_key.get_secret_value())
        ends.push_async_callback(waha.close)
        sessions, schema_drift, skew = Sessions(metrics), SchemaDrift(metrics), ClockSkew(store.now)
        lid_lookup = LidLookup(
            waha,
            store,
            sessions,
            metrics,
            home_session=settings.waha_session,
            gateway_phone=settings.gateway_phone,
            keep_asking=settings.hold_seconds,
            clock=store.now,
        )
        helper = HelpMessages(
            waha,
            store,
            sessions,
            lid_lookup,
            metrics,
            text=settings.help_message.strip(),
            per_minute=settings.help_per_minute,
            home_session=settings.waha_session,
            clock=store.now,
        )
        targets = Targets(
            Address(settings.backend_url, split(settings.backend_signing_secret)),
            tenants,
            timeout=settings.backend_timeout,
            # Probes of tenants' own backends may come on top of MAX_IN_FLIGHT, half of it at most.
            transport=transport(settings.max_in_flight * 3 // 2),
            max_in_flight=settings.max_in_flight,
            max_in_flight_per_tenant=settings.max_in_flight_per_tenant,
        )
        worker = DeliveryWorker(
            store,
            targets,
            lid_lookup,
            Media(waha, home_session=settings.waha_session),
            metrics,
            max_in_flight=settings.max_in_flight,
            max_age=settings.max_delivery_age,
            clock=store.now,
        )
        operator = Actions(
            store,
            tenants,
            sessions,
            lid_lookup,
            metrics,
            skew,
            gateway_phone=settings.gateway_phone,
        )
        ingest = Ingest(
            store,
            _rules(settings),
            tenants,
            sessions,
            schema_drift,
            lid_lookup,
            helper,
            metrics,
            skew,
            clock=store.now,
        )
        recovery = Recovery(waha, store, sessions, ingest, metrics, hours=settings.recover_hours)
        watch = HealthCheck(
            waha,
            sessions,
            metrics,
            recovery,
            home_session=settings.waha_session,
            keys=Keys(split(settings.webhook_hmac_key), settings.waha_api_key.get_secret_value()),
        )
        state = Status(store, worker, tenants, sessions, schema_drift, watch, recovery, skew)
        hour = Traffic(metrics)

        async def stop_at_once() -> None:
            """Each may wait for what is on its way."""
            grace = 0.0 if suspect else GRACE_SECONDS
            await asyncio.gather(worker.stop(grace), helper.stop(), recovery.stop())

        # Each can be stopped before it was started.
        ends.callback(loop_lag.stop)
        ends.callback(tenants.stop)
        ends.push_async_callback(lid_lookup.stop)
        ends.push_async_callback(stop_at_once)
        ends.callback(hour.stop)
        ends.callback(watch.stop)
        loop_lag.start()
        try:
            await lid_lookup.start()
            await helper.start()
            tenants.start()
            worker.start()
            await recovery.start()
        except StoreUnavailable as exc:
            raise StartRefused(f"the store went away while we started: {exc}") from exc
        watch.start()
        hour.start()
        yield Components(
            metrics,
            tenants,
            Links(tenants, settings),
            store,
            sessions,
            worker,
            ingest,
            operator,
            recovery,
            state,
            hour,
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
