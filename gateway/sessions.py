"""What webhooks told of each WAHA session: its status, its own number, when it last sent."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from gateway.metrics import Metrics
from gateway.model import MESSAGE_EVENTS, InboundMessage

_MOST = 1000  # whoever may post could make up names without end
_QUIET = frozenset({"WORKING", "STARTING"})  # nothing to look at

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """status None: no session.status came yet. Times are Unix seconds."""

    status: str | None = None
    status_at: float = 0.0  # WAHA's clock
    last_event: float = 0.0  # our clock
    last_message: float = 0.0  # when the newest that was accepted was sent; WAHA's clock
    own_ids: frozenset[str] = frozenset()

    @property
    def in_trouble(self) -> bool:
        return self.status is not None and self.status not in _QUIET


class Sessions:
    def __init__(self, metrics: Metrics) -> None:
        # Phones and LIDs of all sessions' own numbers: to each other they are no users either.
        self.own_ids: frozenset[str] = frozenset()
        self._told: frozenset[str] = frozenset()  # by WAHA, when it was asked
        self._known: dict[str, Session] = {}
        self._metrics = metrics
        # Called with name, status before, status now, when it has changed.
        self.changed: Callable[[str, str | None, str], None] = lambda _name, _before, _now: None

    def hear(self, message: InboundMessage) -> None:
        """Note what an event tells of its session."""
        known = self._known.get(message.session)
        if known is None:
            if len(self._known) >= _MOST:
                return
            known = self._known[message.session] = Session()
            self._metrics.session_seen(
                message.session, functools.partial(getattr, known, "last_event")
            )
        known.last_event = message.arrived
        # Fewer of the same: this event names the phone only.
        if not message.own_ids <= known.own_ids:
            known.own_ids = message.own_ids
            self.own_ids = self._told.union(*(one.own_ids for one in self._known.values()))
        # WAHA knows no order: what was raised before the status we know is no news.
        # No time of WAHA's may rule the future, though.
        told_at = min(message.event_time, message.arrived)
        if message.session_status and told_at >= known.status_at:
            self._set_status(message.session, known, message.session_status)
            known.status_at = told_at
        elif known.in_trouble and message.event in MESSAGE_EVENTS and told_at > known.status_at:
            # Of several routers one alone was told that it works again.
            self._set_status(message.session, known, "WORKING")
            known.status_at = told_at

    def _set_status(self, name: str, known: Session, status: str) -> None:
        if status == known.status:
            return
        self._metrics.session_status(name, known.status, status)
        before, known.status = known.status, status
        self.changed(name, before, status)
        level = logging.WARNING if known.in_trouble else logging.INFO
        log.log(
            level,
            "📱 WAHA session %s is %s",
            name,
            status,
            extra={"event": "waha.session", "session": name, "status": status},
        )

    def own(self, ids: frozenset[str]) -> None:
        """ids: a session's own, as WAHA tells them."""
        self._told |= ids
        self.own_ids |= ids

    def accepted(self, message: InboundMessage) -> None:
        """A person's message is durable here."""
        known = self._known.get(message.session)
        if known and message.event in MESSAGE_EVENTS and not message.own:
            known.last_message = max(known.last_message, float(message.sent.second))

    def can_send(self, name: str) -> bool:
        """False while the session is known not to be WORKING."""
        known = self._known.get(name)
        return known is None or known.status in (None, "WORKING")

    def all(self) -> dict[str, Session]:
        """By name, in order of names."""
        return dict(sorted(self._known.items()))
