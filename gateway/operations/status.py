"""How the gateway is, part by part: what /ready says in a line each, and the page in colours."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from gateway.delivery.worker import Courier
from gateway.domain.model import HASHED_SESSION, SESSION_NAME_OF_WAHA, Backlog
from gateway.errors import StoreUnavailable
from gateway.inbound.recovery import Recovery
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha.clock_skew import ClockSkew
from gateway.waha.health_check import Watch
from gateway.waha.schema_drift import Shapes
from gateway.waha.sessions import Sessions

_NAMED = 3  # of several things in one line
_OLD_SECONDS = 60.0  # a message that waits longer than this is worth a look

# What each finding says in a line. Others' words for the same stand under the same names.
SENTENCES = {
    "store.well": "writable",
    "store.refusing": "{why}",
    "store.at_risk": "{why}",
    "mappings_file.well": "holds every lock",
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
    "backend_gate.open": "open, {in_flight} in flight",
    "backend_gate.closed": "closed, away is {urls}; messages wait",
    "backend_gate.one_closed": "closed, away is {urls}; messages wait",
    "backend_gate.failing": "open, but tenant {tenants} failed {failures} times in a row: {why}",
    "tenants_file.none": "none, every number is a tenant",
    "tenants_file.well": "{count} tenants",
    "tenants_file.trouble": "{why}",
    "waha.unasked": "not asked yet",
    "waha.well": "answers",
    "waha.refused": "refuses us: {why}",
    "waha.silent": "has not answered for {seconds:.0f} s: see WAHA_API_URL and the log",
    "clock.unknown": "not compared with WhatsApp's yet",
    "clock.well": "agrees with WhatsApp's",
    "clock.ahead": "{seconds:.0f} s ahead of WhatsApp's, or all messages are late: use NTP",
    "clock.behind": "{seconds:.0f} s behind WhatsApp's: let this machine keep time by NTP",
    "recovery.unasked": "WAHA was not asked yet what it has",
    "recovery.reconciled": "reconciled up to {at}",
    "recovery.off": "off: RECOVER_HOURS=0",
    "recovery.cannot": "WAHA's engine cannot tell what may be missing",
    "recovery.gap": "what came of session {sessions} in the last {seconds:.0f} s is not known yet",
    "waha_sessions.none": "no event since the start",
    "waha_session.well": "{status}, {heard}",
    "waha_session.quiet": "{status}, {heard}",
    "waha_session.starting": "{status}, {heard}",
    "waha_session.unknown": "{status}, {heard}",
    "waha_session.trouble": "{status}, {heard}",
    "waha_webhook.missing": "{why}, and no event has come since it began: run connect-waha",
    "waha_webhook.unproven": "{why}; if WHATSAPP_HOOK_URL sets one, its first event will show it",
    "session_names.odd": "WAHA's API may not know sessions by such names: {sessions}",
    "webhook_bodies.well": "have the known form",
    "webhook_bodies.odd": "{what}",
}


class Level(Enum):
    """LOOK: messages flow, but a person should see to it. DOWN: they do not flow."""

    WELL = 0
    LOOK = 1
    DOWN = 2


@dataclass(frozen=True, slots=True)
class Part:
    """said: which of the sentences; values: what stands in its braces. session: of which one."""

    said: str
    level: Level = Level.WELL
    values: Mapping[str, object] = field(default_factory=dict)
    session: str | None = None

    @property
    def name(self) -> str:
        kind = self.said.partition(".")[0]
        return f"{kind} {self.session}" if self.session else kind


class State:
    def __init__(
        self,
        store: Store,
        courier: Courier,
        tenants: Tenants,
        sessions: Sessions,
        shapes: Shapes,
        watch: Watch,
        recovery: Recovery,
        skew: ClockSkew,
    ) -> None:
        self._store = store
        self._courier = courier
        self._tenants = tenants
        self._sessions = sessions
        self._shapes = shapes
        self._watch = watch
        self._recovery = recovery
        self._skew = skew

    @property
    def accepting(self) -> bool:
        """Whether webhooks can be accepted here."""
        return self._store.health().refusing is None

    def parts(self, backlog: Backlog | StoreUnavailable) -> list[Part]:
        """A finding for each. backlog: as it was asked of the store."""
        return [
            *self._of_the_store(),
            self._of_the_backlog(backlog),
            *_of_the_letters(backlog),
            *_of_the_unreadable(backlog),
            self._of_the_gates(),
            self._of_the_tenants(),
            self._of_waha(),
            *self._of_the_sessions(),
            *self._of_the_webhooks(),
            self._of_the_clock(),
            self._of_the_gaps(),
            self._of_the_bodies(),
        ]

    def _of_the_store(self) -> Iterator[Part]:
        health = self._store.health()
        if health.refusing:
            yield Part("store.refusing", Level.DOWN, {"why": health.refusing})
        elif health.at_risk:
            yield Part("store.at_risk", Level.LOOK, {"why": health.at_risk})
        else:
            yield Part("store.well")
        if health.mappings_behind:
            yield Part("mappings_file.behind", Level.LOOK, {"why": health.mappings_behind})
        elif health.has_file:
            yield Part("mappings_file.well")

    def _of_the_backlog(self, backlog: Backlog | StoreUnavailable) -> Part:
        if isinstance(backlog, StoreUnavailable):
            return Part("backlog.unknown", Level.LOOK, {"why": backlog})
        if backlog.oldest is None:
            return Part("backlog.none")
        if stray := [one for one in backlog.by_tenant if self._tenants.get(one) is None]:
            return Part("backlog.stray", Level.LOOK, {"tenants": _some(stray)})
        values = {"waiting": backlog.waiting, "seconds": age(backlog)}
        if age(backlog) > _OLD_SECONDS:
            return Part("backlog.old", Level.LOOK, values)
        return Part("backlog.some", values=values)

    def _of_the_gates(self) -> Part:
        targets = self._courier.targets
        if closed := targets.closed():
            urls = {"urls": _some([target.url for target in closed])}
            if targets.shared in closed:
                return Part("backend_gate.closed", Level.DOWN, urls)
            return Part("backend_gate.one_closed", Level.LOOK, urls)
        if failing := self._courier.attempts.failing():
            worst = failing[0]
            tenants = _some([str(one.tenant) for one in failing])
            values = {"tenants": tenants, "failures": worst.failures, "why": worst.reason}
            return Part("backend_gate.failing", Level.LOOK, values)
        return Part("backend_gate.open", values={"in_flight": self._courier.in_flight})

    def _of_the_tenants(self) -> Part:
        if self._tenants.trouble:
            return Part("tenants_file.trouble", Level.LOOK, {"why": self._tenants.trouble})
        listed = self._tenants.listed
        if listed is None:
            return Part("tenants_file.none")
        return Part("tenants_file.well", values={"count": len(listed)})

    def _of_waha(self) -> Part:
        if self._watch.silent_since is not None:
            level = Level.DOWN if self._watch.ever else Level.LOOK  # it may never have been there
            return Part("waha.silent", level, {"seconds": time.time() - self._watch.silent_since})
        if self._watch.refused:
            return Part("waha.refused", Level.LOOK, {"why": self._watch.refused})
        return Part("waha.well" if self._watch.ever else "waha.unasked")

    def _of_the_clock(self) -> Part:
        ahead = self.seconds_ahead()
        if ahead is None:
            return Part("clock.unknown")
        if not ahead:
            return Part("clock.well")
        said = "clock.ahead" if ahead > 0 else "clock.behind"
        return Part(said, Level.LOOK, {"seconds": abs(ahead)})

    def seconds_ahead(self) -> float | None:
        """Of WhatsApp's clock; negative: behind it; None: not known yet."""
        return self._skew.seconds_ahead()

    def _of_the_gaps(self) -> Part:
        gaps = self.gap_ages()
        if not self._recovery.hours:
            return Part("recovery.off")
        if not gaps:
            return self._of_the_reconciliation()
        values = {"seconds": max(gaps.values()), "sessions": _some(list(gaps))}
        return Part("recovery.gap", Level.LOOK, values)

    def _of_the_reconciliation(self) -> Part:
        up_to = self._recovery.reconciled_up_to()
        if up_to is None:
            return Part("recovery.cannot" if self._recovery.cannot_tell else "recovery.unasked")
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(up_to))
        return Part("recovery.reconciled", values={"at": at})

    def gap_ages(self) -> dict[str, float]:
        """Sessions of which messages may be missing, and for how many seconds they have been."""
        now = time.time()
        return {name: max(0.0, now - since) for name, since in self._recovery.gaps_since().items()}

    def _of_the_sessions(self) -> Iterator[Part]:
        known = self._sessions.all()
        if not known:
            yield Part("waha_sessions.none")
        if odd := [name for name in known if not _is_plain(name)]:
            yield Part("session_names.odd", Level.LOOK, {"sessions": _some(odd)})
        now = time.time()
        for name, session in known.items():
            seconds = now - session.last_event
            heard = f"last event {seconds:.0f} s ago" if session.last_event else "no event yet"
            values = {"status": session.status or "sends", "seconds": seconds, "heard": heard}
            if session.in_trouble:
                yield Part("waha_session.trouble", Level.DOWN, values, name)
            elif session.status == "STARTING":
                yield Part("waha_session.starting", Level.WELL, values, name)
            elif session.status is None or self._watch.silent_since is not None:
                yield Part("waha_session.unknown", Level.WELL, values, name)
            else:
                said = "waha_session.well" if session.last_event else "waha_session.quiet"
                yield Part(said, Level.WELL, values, name)

    def _of_the_webhooks(self) -> Iterator[Part]:
        for name, why in self._watch.unhooked().items():
            if self._watch.was_hooked(name):
                yield Part("waha_webhook.missing", Level.DOWN, {"why": why}, name)
            else:
                yield Part("waha_webhook.unproven", Level.LOOK, {"why": why}, name)

    def _of_the_bodies(self) -> Part:
        if odd := "; ".join(self._shapes.odd()):
            return Part("webhook_bodies.odd", Level.LOOK, {"what": odd})
        return Part("webhook_bodies.well")


def _of_the_letters(backlog: Backlog | StoreUnavailable) -> Iterator[Part]:
    if isinstance(backlog, StoreUnavailable):
        return
    if backlog.dead:
        yield Part("dead_letters.some", Level.LOOK, {"count": backlog.dead})
    else:
        yield Part("dead_letters.none")


def _of_the_unreadable(backlog: Backlog | StoreUnavailable) -> Iterator[Part]:
    if isinstance(backlog, StoreUnavailable):
        return
    if backlog.unreadable:
        yield Part("unreadable.some", Level.LOOK, {"count": backlog.unreadable})
    else:
        yield Part("unreadable.none")


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
