"""What webhooks, and WAHA when it was asked, said of each session: its status, its own number, when
it last sent."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from gateway.domain.model import MESSAGE_EVENTS, InboundMessage
from gateway.metrics import Metrics

_MOST = 1000  # a caller could make up names without end
_CLOCKS_SECONDS = 60.0  # that WAHA's clock may be behind
_QUIET = frozenset({"WORKING", "STARTING"})  # nothing to look at

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """status None: none is known yet. Times are Unix seconds."""

    status: str | None = None
    status_at: float = 0.0  # of the event that said it; WAHA's clock
    reported_at: float = 0.0  # when that came; our clock
    started_at: float = 0.0  # when it began to work after it had not; our clock; 0: unknown
    last_event: float = 0.0  # our clock; 0: none came
    last_message: float = 0.0  # when the newest that was accepted was sent; WAHA's clock
    first_message: float = 0.0  # when the oldest that this process accepted was sent; 0: none
    own_ids: frozenset[str] = frozenset()

    @property
    def in_trouble(self) -> bool:
        return self.status is not None and self.status not in _QUIET

    @property
    def works(self) -> bool:
        """As far as is known."""
        return self.status in (None, "WORKING")


class Sessions:
    def __init__(self, metrics: Metrics) -> None:
        # Phones and LIDs of all sessions' own numbers: to each other they are no users either.
        self.own_ids: frozenset[str] = frozenset()
        self._own_as_asked: frozenset[str] = frozenset()  # what WAHA answered
        self._known: dict[str, Session] = {}
        self._metrics = metrics
        self._status_listeners: list[Callable[[str, str], None]] = []
        self._refused_listeners: list[Callable[[str, float], None]] = []

    def on_status(self, listener: Callable[[str, str], None]) -> None:
        """Call listener with session and status when WAHA reports one or a message proves one."""
        self._status_listeners.append(listener)

    def on_refused(self, listener: Callable[[str, float], None]) -> None:
        """Call listener with session and time (Unix seconds) of a person's message answered 503."""
        self._refused_listeners.append(listener)

    def hear(self, message: InboundMessage) -> None:
        """Note what an event says of its session."""
        known = self._known_as(message.session)
        if known is None:
            return
        self._heard(message.session, known, message.arrived)
        # Fewer of the same: this event names the phone only.
        if not message.own_ids <= known.own_ids:
            known.own_ids = message.own_ids
            self.own_ids = self._own_as_asked.union(*(one.own_ids for one in self._known.values()))
        # WAHA knows no order: what was raised before the status we know is no news.
        # No time of WAHA's may rule the future, though.
        reported_at = min(message.event_time, message.arrived)
        # And a clock that has gone back must not silence what comes.
        known.status_at = min(known.status_at, message.arrived)
        if message.session_status and reported_at >= known.status_at:
            known.status_at, known.reported_at = reported_at, message.arrived
            self._set_status(message.session, known, message.session_status, message.arrived)
            self._report_status(message.session, message.session_status)
        elif not known.works and message.event in MESSAGE_EVENTS and reported_at > known.status_at:
            # Of several routers one alone heard that it works again.
            known.status_at, known.reported_at = reported_at, message.arrived
            self._set_status(message.session, known, "WORKING", message.arrived)
            self._report_status(message.session, "WORKING")

    def _report_status(self, name: str, status: str) -> None:
        for listener in self._status_listeners:
            listener(name, status)

    def _set_status(self, name: str, known: Session, status: str, at: float) -> None:
        was_in_trouble = known.in_trouble
        before, known.status = known.status, status
        if status == before:
            return
        if was_in_trouble and not known.in_trouble:
            known.started_at = at
        self._metrics.session_status(name, before, status)
        level = logging.WARNING if known.in_trouble else logging.INFO
        log.log(
            level,
            "📱 WAHA session %s is %s",
            name,
            status,
            extra={"event": "waha.session", "session": name, "status": status},
        )

    def asked(self, name: str, status: str | None, own_ids: frozenset[str], at: float) -> None:
        """What WAHA answered when it was asked at that time, Unix seconds of our clock."""
        self._own_as_asked |= own_ids
        self.own_ids |= own_ids
        known = self._known_as(name)
        if known is None or status is None:
            return
        # An event overtook the answer, unless the clock has gone back since that came.
        overtaken = at <= known.reported_at <= at + _CLOCKS_SECONDS
        if not overtaken:
            before = known.status
            # By WAHA's clock, which need not be ours: an event that is much older says nothing new.
            known.status_at = max(known.status_at, at - _CLOCKS_SECONDS)
            self._set_status(name, known, status, at)
            if before not in (None, status):
                self._report_status(name, status)

    def heard_before(self, name: str, last_message: float) -> None:
        """What is known from before our start. last_message: Unix seconds."""
        if known := self._known_as(name):
            self._heard(name, known, last_message)
            known.last_message = max(known.last_message, last_message)

    def forget(self, name: str) -> None:
        """WAHA has no such session any more."""
        if self._known.pop(name, None):
            self._metrics.session_gone(name)

    def _known_as(self, name: str) -> Session | None:
        """None if there are too many."""
        known = self._known.get(name)
        if known is None and len(self._known) < _MOST:
            known = self._known[name] = Session()
        return known

    def _heard(self, name: str, known: Session, at: float) -> None:
        if not known.last_event:
            self._metrics.session_seen(name, functools.partial(getattr, known, "last_event"))
        known.last_event = max(known.last_event, at)

    def accepted(self, message: InboundMessage) -> None:
        """A person's message is durable here."""
        known = self._known.get(message.session)
        if known and message.event in MESSAGE_EVENTS and not message.own:
            at = float(message.sent.second)
            known.last_message = max(known.last_message, at)
            known.first_message = min(known.first_message or at, at)

    def not_stored(self, message: InboundMessage) -> None:
        """A message was answered 503."""
        known = message.session in self._known  # of names that are made up there is no end
        if known and message.event in MESSAGE_EVENTS and not message.own:
            for listener in self._refused_listeners:
                listener(message.session, float(message.sent.second))

    def can_send(self, name: str) -> bool:
        """False while the session is known not to be WORKING."""
        known = self._known.get(name)
        return known is None or known.works

    def all(self) -> dict[str, Session]:
        """By name, in order of names."""
        return dict(sorted(self._known.items()))
