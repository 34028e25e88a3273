"""One message from webhook to store: is it for a tenant at all? Then accept it, in one commit."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway import routing
from gateway.errors import StoreUnavailable
from gateway.log import shown
from gateway.model import Accepted, AskForLink, Bind, Chat, InboundMessage, LockPolicy
from gateway.store import Store
from gateway.waha import events

_MOST_SESSIONS = 1000  # whoever may post could make up names without end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that decide what becomes of a message."""

    home_session: str
    gateway_phone: str
    prefix: str
    policy: LockPolicy
    forward_events: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ignored:
    """Not for any tenant; reason in the words of the webhook's answer."""

    reason: str


@dataclass(slots=True)
class SessionSeen:
    """What webhooks told of one WAHA session. status None: no session.status came yet."""

    status: str | None = None
    last_event: float = 0.0  # Unix seconds, our clock


class Ingest:
    """sessions: by name, what was heard of each."""

    def __init__(self, store: Store, rules: Rules, clock: Callable[[], float] = time.time) -> None:
        self.sessions: dict[str, SessionSeen] = {}
        self._store = store
        self._rules = rules
        self._clock = clock
        self._decide_for = functools.partial(
            routing.decide, policy=rules.policy, prefix=rules.prefix
        )

    async def receive(self, body: bytes, headers: Mapping[str, str]) -> Accepted | Ignored:
        """What became of a webhook; durable on return. Raise BadBody or StoreUnavailable."""
        rules = self._rules
        message = events.parse(
            body,
            headers,
            home_session=rules.home_session,
            gateway_phone=rules.gateway_phone,
            now=self._clock(),
        )
        self._hear(message)
        if reason := routing.reason_to_ignore(message, rules.forward_events):
            if message.chat is Chat.PERSON and message.phone and message.lid:
                with contextlib.suppress(StoreUnavailable):  # not worth a 503
                    # Our own answer may be what shows a LID's phone.
                    await self._store.learn(message)
            log.debug("ignored: %s", reason, extra={"event": "webhook.ignored", "reason": reason})
            return Ignored(reason)
        accepted = await self._store.accept(message, functools.partial(self._decide_for, message))
        _tell(accepted)
        return accepted

    def _hear(self, message: InboundMessage) -> None:
        known = self.sessions.get(message.session)
        if known is None:
            if len(self.sessions) >= _MOST_SESSIONS:
                return
            known = self.sessions[message.session] = SessionSeen()
        known.last_event = message.arrived
        if message.session_status:
            if message.session_status != known.status:
                log.warning(
                    "WAHA session %s is %s",
                    message.session,
                    message.session_status,
                    extra={"event": "waha.session", "session": message.session},
                )
            known.status = message.session_status


def _tell(accepted: Accepted) -> None:
    user, decision = shown(accepted.user), accepted.decision
    if decision is None:
        log.debug("seen before: %s", user, extra={"event": "webhook.duplicate", "user": user})
    elif isinstance(decision, Bind):
        log.info(
            "🔒 LOCKED: User %s → Tenant %s",
            user,
            decision.tenant,
            extra={
                "event": "lock.changed",
                "user": user,
                "tenant": decision.tenant,
                "previous": decision.previous,
            },
        )
    elif isinstance(decision, AskForLink):
        log.info(
            "%s has no lock and sent no link", user, extra={"event": "user.unknown", "user": user}
        )
    else:
        log.info(
            "🔀 Routing %s → Tenant %s (existing session)",
            user,
            decision.tenant,
            extra={"event": "message.routed", "user": user, "tenant": decision.tenant},
        )
