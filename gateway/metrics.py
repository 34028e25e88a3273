"""Every Prometheus series, declared once. Labels of a handful of values, never a user."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

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
    """WAHA's docs 2026.7, "Sessions"; whoever may post could make up others without end."""
    return status if status in _STATUSES else "OTHER"


class Metrics:
    """One set of series; each app has its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
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
            "Of these, events of which a part is missing or of an unknown shape, by that part",
            ["event", "part"],
            registry=self._registry,
        )
        self._session_status = Gauge(
            "gateway_waha_session_status",
            "1 for the status that WAHA last told of a session, 0 for those it had before",
            ["session", "status"],
            registry=self._registry,
        )
        self._session_up = Gauge(
            "gateway_waha_session_up",
            "Whether the last status that WAHA told of a session is WORKING",
            ["session"],
            registry=self._registry,
        )
        self._session_event = Gauge(
            "gateway_waha_session_last_event_timestamp_seconds",
            "When an event of a session last came, Unix time",
            ["session"],
            registry=self._registry,
        )
        self._lookups = Counter(
            "gateway_lid_lookups",
            "Questions to WAHA which phone a LID is, by outcome",
            ["outcome"],
            registry=self._registry,
        )
        self._help = Counter(
            "gateway_help_messages",
            "Help messages to users without a lock, by outcome",
            ["outcome"],
            registry=self._registry,
        )

        self._stall = Gauge(
            "gateway_event_loop_longest_stall_seconds",
            "The longest time of the last minute or two in which no webhook could be answered",
            registry=self._registry,
        )

    def watch_stalls(self, longest: Callable[[], float]) -> None:
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

    def lookup(self, outcome: str) -> None:
        """outcome: found, unknown, refused or failed."""
        self._lookups.labels(outcome).inc()

    def help(self, outcome: str) -> None:
        """outcome: queued, sent, perhaps, not_needed, refused, failed or too_late."""
        self._help.labels(outcome).inc()

    def series(self) -> list[tuple[str, str]]:
        """Name, as it is scraped, and labels of each, in the order of their declaration."""
        return [
            (one._name + "_total" * isinstance(one, Counter), ",".join(one._labelnames))
            for one in vars(self).values()
            if isinstance(one, Counter | Gauge)
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """What a series stands at now."""
        return self._registry.get_sample_value(name, labels)

    def text(self) -> bytes:
        """As Prometheus scrapes it."""
        return generate_latest(self._registry)
