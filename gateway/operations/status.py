"""How the gateway is, component by component: a line each in /ready, a colour each on the page."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from gateway.delivery.worker import DeliveryWorker
from gateway.domain.model import HASHED_SESSION, SESSION_NAME_OF_WAHA, Backlog
from gateway.errors import StoreUnavailable
from gateway.inbound.recovery import Recovery
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha.clock_skew import ClockSkew
from gateway.waha.health_check import HealthCheck
from gateway.waha.schema_drift import SchemaDrift
from gateway.waha.sessions import Sessions

_NAMED = 3  # of several things in one line
_OLD_SECONDS = 60.0  # a message that waits longer than this is worth a look

# What each finding says in a line. The page has words of its own under the same codes.
SENTENCES = {
    "store.ok": "writable",
    "store.refusing": "{why}",
    "store.at_risk": "{why}",
    "mappings_file.ok": "holds every lock",
    "mappings_file.behind": "{why}",
    "backlog.none": "nothing waits",
    "backlog.some": "{waiting} wait or are in flight, the oldest for {seconds:.0f} s",
    "backlog.old": "{waiting} wait or are in flight, the oldest for {seconds:.0f} s",
    "backlog.stray": "messages wait of tenants that tenants.json lacks: {tenants}",
    "backlog.unknown": "unknown, {why}",
    "dead_letters.none": "none",
    "dead_letters.some": "{count} wait for a decision: replay or delete them",
    "unreadable.none": "none",
    "unreadable.some": "{count} of the last 48 h went to nobody: GET /router/unreadable",
    "circuit_breakers.closed": "closed, {in_flight} in flight",
    "circuit_breakers.open": "open, away is {urls}; messages wait",
    "circuit_breakers.one_open": "open, away is {urls}; messages wait",
    "circuit_breakers.failing": "closed, but tenant {tenants} failed {failures} times: {why}",
    "tenants_file.none": "none, every number is a tenant",
    "tenants_file.ok": "{count} tenants",
    "tenants_file.trouble": "{why}",
    "waha.unasked": "not asked yet",
    "waha.ok": "answers",
    "waha.refused": "refuses us: {why}",
    "waha.silent": "has not answered for {seconds:.0f} s: see WAHA_API_URL and the log",
    "clock.unknown": "not compared with WhatsApp's yet",
    "clock.ok": "agrees with WhatsApp's",
    "clock.ahead": "{seconds:.0f} s ahead of WhatsApp's, or all messages are late: use NTP",
    "clock.behind": "{seconds:.0f} s behind WhatsApp's: let this machine keep time by NTP",
    "recovery.unasked": "WAHA was not asked yet what it has",
    "recovery.reconciled": "reconciled up to {at}",
    "recovery.off": "off: RECOVER_HOURS=0",
    "recovery.cannot": "WAHA's engine cannot say what may be missing",
    "recovery.gap": "what came of session {sessions} in the last {seconds:.0f} s is not known yet",
    "waha_sessions.none": "no event since the start",
    "waha_session.ok": "{status}, {heard}",
    "waha_session.quiet": "{status}, {heard}",
    "waha_session.starting": "{status}, {heard}",
    "waha_session.unknown": "{status}, {heard}",
    "waha_session.trouble": "{status}, {heard}",
    "waha_webhook.missing": "{why}, and no event has come since it began: run connect-waha",
    "waha_webhook.unproven": "{why}; if WHATSAPP_HOOK_URL sets one, its first event will show it",
    "session_names.odd": "WAHA's API may not know sessions by such names: {sessions}",
    "webhook_bodies.ok": "have the known form",
    "webhook_bodies.odd": "{what}",
}


class Level(Enum):
    """WARN: messages flow, but a person should see to it. DOWN: they do not flow."""

    OK = 0
    WARN = 1
    DOWN = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """The status of one component.

    code: which of SENTENCES; values: for its braces. session: of which WAHA session.
    """

    code: str
    level: Level = Level.OK
    values: Mapping[str, object] = field(default_factory=dict)
    session: str | None = None

    @property
    def component(self) -> str:
        return self.code.partition(".")[0]

    @property
    def name(self) -> str:
        return f"{self.component} {self.session}" if self.session else self.component


class Status:
    def __init__(
        self,
        store: Store,
        worker: DeliveryWorker,
        tenants: Tenants,
        sessions: Sessions,
        schema_drift: SchemaDrift,
        health_check: HealthCheck,
        recovery: Recovery,
        skew: ClockSkew,
    ) -> None:
        self._store = store
        self._worker = worker
        self._tenants = tenants
        self._sessions = sessions
        self._schema_drift = schema_drift
        self._health_check = health_check
        self._recovery = recovery
        self._skew = skew

    @property
    def accepting(self) -> bool:
        """Whether webhooks can be accepted here."""
        return self._store.health().refusing is None

    def findings(self, backlog: Backlog | StoreUnavailable) -> list[Finding]:
        """A finding for each. backlog: as it was asked of the store."""
        return [
            *self._store_findings(),
            self._backlog_finding(backlog),
            *_dead_letter_findings(backlog),
            *_unreadable_findings(backlog),
            self._breaker_finding(),
            self._tenants_finding(),
            self._waha_finding(),
            *self._session_findings(),
            *self._webhook_findings(),
            self._clock_finding(),
            self._recovery_finding(),
            self._schema_finding(),
        ]

    def _store_findings(self) -> Iterator[Finding]:
        health = self._store.health()
        if health.refusing:
            yield Finding("store.refusing", Level.DOWN, {"why": health.refusing})
        elif health.at_risk:
            yield Finding("store.at_risk", Level.WARN, {"why": health.at_risk})
        else:
            yield Finding("store.ok")
        if health.mappings_behind:
            yield Finding("mappings_file.behind", Level.WARN, {"why": health.mappings_behind})
        elif health.has_file:
            yield Finding("mappings_file.ok")

    def _backlog_finding(self, backlog: Backlog | StoreUnavailable) -> Finding:
        if isinstance(backlog, StoreUnavailable):
            return Finding("backlog.unknown", Level.WARN, {"why": backlog})
        if backlog.oldest is None:
            return Finding("backlog.none")
        if stray := [one for one in backlog.by_tenant if self._tenants.get(one) is None]:
            return Finding("backlog.stray", Level.WARN, {"tenants": _some(stray)})
        values = {"waiting": backlog.waiting, "seconds": age(backlog)}
        if age(backlog) > _OLD_SECONDS:
            return Finding("backlog.old", Level.WARN, values)
        return Finding("backlog.some", values=values)

    def _breaker_finding(self) -> Finding:
        targets = self._worker.targets
        if closed := targets.open_targets():
            urls = {"urls": _some([target.url for target in closed])}
            if targets.shared in closed:
                return Finding("circuit_breakers.open", Level.DOWN, urls)
            return Finding("circuit_breakers.one_open", Level.WARN, urls)
        if failing := self._worker.attempts.failing():
            worst = failing[0]
            tenants = _some([str(one.tenant) for one in failing])
            values = {"tenants": tenants, "failures": worst.failures, "why": worst.reason}
            return Finding("circuit_breakers.failing", Level.WARN, values)
        return Finding("circuit_breakers.closed", values={"in_flight": self._worker.in_flight})

    def _tenants_finding(self) -> Finding:
        if self._tenants.trouble:
            return Finding("tenants_file.trouble", Level.WARN, {"why": self._tenants.trouble})
        listed = self._tenants.listed
        if listed is None:
            return Finding("tenants_file.none")
        return Finding("tenants_file.ok", values={"count": len(listed)})

    def _waha_finding(self) -> Finding:
        if self._health_check.silent_since is not None:
            level = (
                Level.DOWN if self._health_check.ever else Level.WARN
            )  # it may never have been there
            return Finding(
                "waha.silent", level, {"seconds": time.time() - self._health_check.silent_since}
            )
        if self._health_check.refused:
            return Finding("waha.refused", Level.WARN, {"why": self._health_check.refused})
        return Finding("waha.ok" if self._health_check.ever else "waha.unasked")

    def _clock_finding(self) -> Finding:
        ahead = self.seconds_ahead()
        if ahead is None:
            return Finding("clock.unknown")
        if not ahead:
            return Finding("clock.ok")
        code = "clock.ahead" if ahead > 0 else "clock.behind"
        return Finding(code, Level.WARN, {"seconds": abs(ahead)})

    def seconds_ahead(self) -> float | None:
        """Of WhatsApp's clock; negative: behind it; None: not known yet."""
        return self._skew.seconds_ahead()

    def _recovery_finding(self) -> Finding:
        gaps = self.gap_ages()
        if not self._recovery.hours:
            return Finding("recovery.off")
        if not gaps:
            return self._reconciliation_finding()
        values = {"seconds": max(gaps.values()), "sessions": _some(list(gaps))}
        return Finding("recovery.gap", Level.WARN, values)

    def _reconciliation_finding(self) -> Finding:
        up_to = self._recovery.reconciled_up_to()
        if up_to is None:
            return Finding("recovery.cannot" if self._recovery.unsupported else "recovery.unasked")
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(up_to))
        return Finding("recovery.reconciled", values={"at": at})

    def gap_ages(self) -> dict[str, float]:
        """Sessions of which messages may be missing, and for how many seconds they have been."""
        now = time.time()
        return {name: max(0.0, now - since) for name, since in self._recovery.gaps_since().items()}

    def _session_findings(self) -> Iterator[Finding]:
        known = self._sessions.all()
        if not known:
            yield Finding("waha_sessions.none")
        if odd := [name for name in known if not _is_plain(name)]:
            yield Finding("session_names.odd", Level.WARN, {"sessions": _some(odd)})
        now = time.time()
        for name, session in known.items():
            seconds = now - session.last_event
            heard = f"last event {seconds:.0f} s ago" if session.last_event else "no event yet"
            values = {"status": session.status or "sends", "seconds": seconds, "heard": heard}
            if session.in_trouble:
                yield Finding("waha_session.trouble", Level.DOWN, values, name)
            elif session.status == "STARTING":
                yield Finding("waha_session.starting", Level.OK, values, name)
            elif session.status is None or self._health_check.silent_since is not None:
                yield Finding("waha_session.unknown", Level.OK, values, name)
            else:
                code = "waha_session.ok" if session.last_event else "waha_session.quiet"
                yield Finding(code, Level.OK, values, name)

    def _webhook_findings(self) -> Iterator[Finding]:
        for name, why in self._health_check.unhooked().items():
            if self._health_check.was_hooked(name):
                yield Finding("waha_webhook.missing", Level.DOWN, {"why": why}, name)
            else:
                yield Finding("waha_webhook.unproven", Level.WARN, {"why": why}, name)

    def _schema_finding(self) -> Finding:
        if odd := "; ".join(self._schema_drift.odd()):
            return Finding("webhook_bodies.odd", Level.WARN, {"what": odd})
        return Finding("webhook_bodies.ok")


def _dead_letter_findings(backlog: Backlog | StoreUnavailable) -> Iterator[Finding]:
    if isinstance(backlog, StoreUnavailable):
        return
    if backlog.dead:
        yield Finding("dead_letters.some", Level.WARN, {"count": backlog.dead})
    else:
        yield Finding("dead_letters.none")


def _unreadable_findings(backlog: Backlog | StoreUnavailable) -> Iterator[Finding]:
    if isinstance(backlog, StoreUnavailable):
        return
    if backlog.unreadable:
        yield Finding("unreadable.some", Level.WARN, {"count": backlog.unreadable})
    else:
        yield Finding("unreadable.none")


async def backlog_of(store: Store) -> Backlog | StoreUnavailable:
    """What waits, or why that is not to be known."""
    try:
        return await store.backlog()
    except StoreUnavailable as exc:
        return exc


def age(backlog: Backlog) -> float:
    """Seconds for which the oldest has waited; 0 if none does."""
    return 0.0 if backlog.oldest is None else max(0.0, time.time() - backlog.oldest)


def _is_plain(session: str) -> bool:
    """Whether WAHA's API allows the name."""
    allowed = re.fullmatch(SESSION_NAME_OF_WAHA, session) is not None
    return allowed and not session.startswith(HASHED_SESSION)


def _some(things: Sequence[object]) -> str:
    """The first few of them."""
    more = f", … (+{len(things) - _NAMED})" if len(things) > _NAMED else ""
    return ", ".join(map(str, things[:_NAMED])) + more
