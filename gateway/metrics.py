"""Every Prometheus series, declared once. Labels of a handful of values, never a user."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from gateway.domain.lock_events import COUNTED

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
disable_created_metrics()  # type: ignore[no-untyped-call]  # or each counter has a second series


_STATUSES = frozenset(
    [
        "STOPPED",
        "STARTING",
        "SCAN_QR_CODE",
        "PASSKEY_REQUIRED",
        "PASSKEY_CONFIRMATION_REQUIRED",
        "WORKING",
        "FAILED",
    ]
)


def _bounded(status: str) -> str:
    """WAHA's docs 2026.7, "Sessions"; a caller could make up others without end."""
    return status if status in _STATUSES else "OTHER"


_WEBHOOK = "locked moved routed unknown_user duplicate ignored bad unauthorized unavailable"
_HOLDS_A_MESSAGE = frozenset({"locked", "moved", "routed", "unknown_user"})
_NOTES = "confirmed stale quoted refused"
_DELIVERIES = "delivered retry dead_letter requeue"
_ACK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
_DELIVERY = (0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_END_TO_END = (0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
_COMMIT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 10.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is asked for at each scrape; None: not to be known now."""

    waiting: int | None
    oldest_seconds: float | None  # age of the oldest that waits; 0 if none does
    held: int | None
    dead_letters: int | None
    unreadable: int | None
    in_flight: int
    breakers_open: int
    shared_breaker_open: bool
    locked_users: int
    locked_tenants: int
    store_up: bool
    store_at_risk: bool
    mappings_lag: float | None  # None: there is no such file
    disk_free: int | None  # bytes; None: the store is no folder
    waiting_by_tenant: Mapping[int, int]  # the largest few
    gaps: Mapping[str, float]  # seconds, by session
    seconds_ahead: float | None  # our clock, of WhatsApp's


class Metrics:
    """One set of series; each app has its own."""

    def __init__(self, *, version: str = "", store: str = "file") -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._build = Gauge(
            "gateway_build_info",
            "1; which version this is, on which Python and store",
            ["version", "python", "store"],
            registry=self._registry,
        )
        self._build.labels(version, platform.python_version(), store).set(1)
        self.messages_in = 0  # accepted or recovered messages, for operations/traffic.py
        self.messages_delivered = 0
        self._declare_webhooks()
        self._declare_deliveries()
        self._declare_store()
        self._declare_waha()
        self._declare_process()

    def _declare_webhooks(self) -> None:
        """What comes in, and what becomes of it."""
        self._webhooks = self._counter(
            "gateway_webhooks", "Webhooks by outcome", "outcome", _WEBHOOK
        )
        self._webhook_counters: dict[str, Counter] = {}
        self._ack = self._histogram(
            "gateway_webhook_ack_seconds", "From a webhook's head to its answer", _ACK
        )
        self._lock_changes = Counter(
            "gateway_lock_changes",
            "Changes of users' locks, by what became of them and what made it happen",
            ["kind", "why"],
            registry=self._registry,
        )
        for kind, why in COUNTED:
            self._lock_changes.labels(kind.value, why.value)
        self._idle_links = self._counter(
            "gateway_links_without_effect",
            "Deep links that changed no lock, by why",
            "note",
            _NOTES,
        )

    def _declare_deliveries(self) -> None:
        """What goes out."""
        self._deliveries = self._counter(
            "gateway_deliveries", "Attempts at deliveries, by outcome", "outcome", _DELIVERIES
        )
        self._delivery_seconds = self._histogram(
            "gateway_delivery_seconds", "From an attempt's beginning to its end", _DELIVERY
        )
        self._end_to_end = self._histogram(
            "gateway_end_to_end_seconds", "From WAHA's event to the backend's 2xx", _END_TO_END
        )

    def _declare_store(self) -> None:
        """What the store holds, and how it is."""
        self._commits = self._histogram(
            "gateway_store_commit_seconds", "A durable write of the store", _COMMIT
        )
        self._batches = self._histogram(
            "gateway_store_batch_size", "Operations that shared a durable write", _BATCH
        )
        self._waiting = self._gauge("gateway_waiting_messages", "That wait or are in flight")
        self._oldest = self._gauge(
            "gateway_oldest_waiting_seconds", "Age of the oldest that waits; 0 if none does"
        )
        self._waiting_of = Gauge(
            "gateway_tenant_waiting_messages",
            "Of the tenants with the most, METRICS_TENANTS of them",
            ["tenant"],
            registry=self._registry,
        )
        self._held = self._gauge("gateway_held_messages", "Kept for a link to come")
        self._dead = self._gauge("gateway_dead_letters", "Given up on, kept for a person to see")
        self._unreadable = self._gauge(
            "gateway_unreadable_messages", "Of the last 48 h, that went to nobody"
        )
        self._in_flight = self._gauge("gateway_in_flight", "At backends now, of this router")
        self._breakers = self._gauge(
            "gateway_backend_breakers_open", "Circuit breakers that are open, one per backend URL"
        )
        self._breaker = self._gauge(
            "gateway_backend_breaker_open", "Whether the common backend's circuit breaker is open"
        )
        self._users = self._gauge("gateway_locked_users", "Users with a lock")
        self._tenants = self._gauge("gateway_locked_tenants", "Tenants with a locked user")
        self._store_up = self._gauge("gateway_store_up", "Whether webhooks can be accepted")
        self._at_risk = self._gauge(
            "gateway_store_at_risk", "Whether what is kept may be lost: a Redis that drops keys"
        )
        self._lag = self._gauge(
            "gateway_mappings_file_lag_seconds", "Age of the oldest lock change not in the file"
        )
        self._disk = self._gauge("gateway_disk_free_bytes", "On the disk of DATA_DIR")

    def _declare_waha(self) -> None:
        """WAHA: its events, its sessions, and what it was asked."""
        self._events = Counter(
            "gateway_webhook_events",
            "WAHA events, by name and kind of chat",
            ["event", "chat"],
            registry=self._registry,
        )
        # One series of it each, for the hot path: finding one by its labels costs more than adding.
        self._event_counters: dict[tuple[str, str], Counter] = {}
        self._odd_events = Counter(
            "gateway_webhook_odd_events",
            "Of these, events with a field that is missing or of an unknown form, by field",
            ["event", "part"],
            registry=self._registry,
        )
        self._session_status = Gauge(
            "gateway_waha_session_status",
            "1 for the status that WAHA reported last of a session, 0 for those it had before",
            ["session", "status"],
            registry=self._registry,
        )
        self._session_up = Gauge(
            "gateway_waha_session_up",
            "Whether the last status that WAHA reported of a session is WORKING",
            ["session"],
            registry=self._registry,
        )
        self._session_hook = Gauge(
            "gateway_waha_session_webhook",
            "Whether a session has a webhook to us, by its config or by an event",
            ["session"],
            registry=self._registry,
        )
        self._session_event = Gauge(
            "gateway_waha_session_last_event_timestamp_seconds",
            "When an event of a session last came, Unix time",
            ["session"],
            registry=self._registry,
        )
        self._lookups = self._counter(
            "gateway_lid_lookups",
            "Questions to WAHA which phone a LID is, by outcome",
            "outcome",
            "found unknown refused failed",
        )
        self._help = self._counter(
            "gateway_help_messages",
            "Help messages to users without a lock, by outcome",
            "outcome",
            "queued sent perhaps not_needed refused failed too_late",
        )
        self._recovered = self._counter(
            "gateway_recovered_messages",
            "Messages that WAHA was asked for, by what became of them",
            "outcome",
            "routed unknown_user duplicate ignored",
        )
        self._reconciled = Counter(
            "gateway_reconciled_messages",
            "Messages for which WAHA had sent no webhook, though nothing was amiss",
            registry=self._registry,
        )
        self._missing = Gauge(
            "gateway_recovery_gap_seconds",
            "Age of a gap: what came of a session since then is not known; no series without one",
            ["session"],
            registry=self._registry,
        )
        self._waha = self._gauge("gateway_waha_up", "Whether WAHA answered when last asked")
        self._waha.set(float("nan"))
        self._skew = self._gauge(
            "gateway_clock_ahead_seconds",
            "Our clock, of WhatsApp's; negative: behind; NaN: unknown",
        )

    def _declare_process(self) -> None:
        """This process."""
        self._stall = Gauge(
            "gateway_event_loop_longest_stall_seconds",
            "The longest time of the last minute or two in which no webhook could be answered",
            registry=self._registry,
        )

    def _counter(self, name: str, reported: str, label: str, values: str) -> Counter:
        """values: all there are. Each is there from the start: Prometheus sees no increase of what
        begins with a 1."""
        counter = Counter(name, reported, [label], registry=self._registry)
        for value in values.split():
            counter.labels(value)
        return counter

    def _gauge(self, name: str, reported: str) -> Gauge:
        return Gauge(name, reported, registry=self._registry)

    def _histogram(self, name: str, reported: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, reported, buckets=buckets, registry=self._registry)

    def webhook(self, outcome: str, seconds: float) -> None:
        """A webhook was answered. outcome: locked, moved, routed, unknown_user, duplicate, ignored,
        bad, unauthorized or unavailable."""
        counter = self._webhook_counters.get(outcome)
        if counter is None:
            counter = self._webhook_counters[outcome] = self._webhooks.labels(outcome)
        counter.inc()
        self.messages_in += outcome in _HOLDS_A_MESSAGE
        self._ack.observe(seconds)

    def lock_changed(self, kind: str, why: str, count: int = 1) -> None:
        """kind, why: of a lock_events.LockEvent."""
        self._lock_changes.labels(kind, why).inc(count)

    def link_without_effect(self, note: str) -> None:
        """note: model.Note."""
        self._idle_links.labels(note).inc()

    def attempted(self, outcome: str, seconds: float) -> None:
        """An attempt at a delivery ended. outcome: delivered, retry, dead_letter or requeue."""
        self._deliveries.labels(outcome).inc()
        self.messages_delivered += outcome == "delivered"
        self._delivery_seconds.observe(seconds)

    def delivered_after(self, seconds: float) -> None:
        """A backend took a message so long after WAHA's event."""
        self._end_to_end.observe(max(0.0, seconds))

    def committed(self, seconds: float, operations: int) -> None:
        self._commits.observe(seconds)
        self._batches.observe(operations)

    def show(self, figures: Figures) -> None:
        nan = float("nan")
        for gauge, value in (
            (self._waiting, figures.waiting),
            (self._oldest, figures.oldest_seconds),
            (self._held, figures.held),
            (self._dead, figures.dead_letters),
            (self._unreadable, figures.unreadable),
            (self._in_flight, figures.in_flight),
            (self._breakers, figures.breakers_open),
            (self._breaker, figures.shared_breaker_open),
            (self._users, figures.locked_users),
            (self._tenants, figures.locked_tenants),
            (self._store_up, figures.store_up),
            (self._at_risk, figures.store_at_risk),
            (self._lag, figures.mappings_lag),
            (self._disk, figures.disk_free),
            (self._skew, figures.seconds_ahead),
        ):
            gauge.set(nan if value is None else value)
        self._waiting_of.clear()
        for tenant, count in figures.waiting_by_tenant.items():
            self._waiting_of.labels(str(tenant)).set(count)
        self._missing.clear()
        for session, seconds in figures.gaps.items():
            self._missing.labels(session).set(seconds)

    def export_stalls(self, longest: Callable[[], float]) -> None:
        """longest: asked at each scrape, seconds."""
        self._stall.set_function(longest)

    def event(self, name: str, chat: str, odd_part: str | None) -> None:
        """A webhook came. name: bounded by the caller."""
        counter = self._event_counters.get((name, chat))
        if counter is None:
            counter = self._event_counters[name, chat] = self._events.labels(name, chat)
        counter.inc()
        if odd_part:
            self._odd_events.labels(name, odd_part).inc()

    def session_seen(self, session: str, last_event: Callable[[], float]) -> None:
        """A session is new. last_event: asked at each scrape, Unix seconds."""
        self._session_event.labels(session).set_function(last_event)

    def session_status(self, session: str, before: str | None, now: str) -> None:
        if before:
            self._session_status.labels(session, _bounded(before)).set(0)
        self._session_status.labels(session, _bounded(now)).set(1)
        self._session_up.labels(session).set(now == "WORKING")

    def session_hooked(self, session: str, hooked: bool) -> None:
        self._session_hook.labels(session).set(hooked)

    def session_hook_unknown(self, session: str) -> None:
        self._session_hook.remove_by_labels({"session": session})

    def session_gone(self, session: str) -> None:
        """WAHA has no such session any more."""
        for gauge in (
            self._session_status,
            self._session_up,
            self._session_hook,
            self._session_event,
        ):
            gauge.remove_by_labels({"session": session})  # some may not be there

    def waha_up(self, up: bool) -> None:
        self._waha.set(up)

    def lookup(self, outcome: str) -> None:
        """outcome: found, unknown, refused or failed."""
        self._lookups.labels(outcome).inc()

    def help(self, outcome: str) -> None:
        """outcome: queued, sent, perhaps, not_needed, refused, failed or too_late."""
        self._help.labels(outcome).inc()

    def recovered(self, outcome: str, count: int = 1) -> None:
        """outcome: routed, duplicate, unknown_user or ignored."""
        self._recovered.labels(outcome).inc(count)
        self.messages_in += count * (outcome in _HOLDS_A_MESSAGE)

    def reconciled(self, count: int) -> None:
        """So many messages were found for which WAHA had sent no webhook."""
        self._reconciled.inc(count)

    def series(self) -> list[tuple[str, str]]:
        """Name, as it is scraped, and labels of each, in the order of their declaration."""
        return [
            (one._name + "_total" * isinstance(one, Counter), ",".join(one._labelnames))
            for one in vars(self).values()
            if isinstance(one, Counter | Gauge | Histogram)
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """The value of a series now."""
        return self._registry.get_sample_value(name, labels)

    def text(self) -> bytes:
        """As Prometheus scrapes it."""
        return generate_latest(self._registry)
