"""One message from webhook to store: is it for a tenant at all? Then accept it, in one commit."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gateway.domain import explanation, routing
from gateway.domain.model import (
    Accepted,
    AskForLink,
    Chat,
    Decide,
    Forward,
    InboundMessage,
    LockPolicy,
    Note,
    UnreadableReason,
    is_lid,
    request_id,
)
from gateway.errors import BadBody, StoreUnavailable
from gateway.inbound.sources import Parse
from gateway.log import Throttle, shown
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha import events
from gateway.waha.clock_skew import ClockSkew
from gateway.waha.help_messages import HelpMessages
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.schema_drift import SchemaDrift
from gateway.waha.sessions import Sessions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that decide what becomes of a message."""

    home_session: str
    prefix: str
    policy: LockPolicy
    forward_events: frozenset[str]
    hold_seconds: float


@dataclass(frozen=True, slots=True)
class Ignored:
    """Not for any tenant; reason in the words of the webhook's answer."""

    reason: str
    outcome = "ignored"


@dataclass(frozen=True, slots=True)
class Explained:
    """What would become of a webhook: the outcome, and each rule with what it says of it."""

    outcome: Accepted | Ignored | StoreUnavailable
    rules: dict[str, str]


class Ingest:
    def __init__(
        self,
        store: Store,
        rules: Rules,
        tenants: Tenants,
        sessions: Sessions,
        own_numbers: OwnNumbers,
        schema_drift: SchemaDrift,
        lid_lookup: LidLookup,
        helper: HelpMessages,
        metrics: Metrics,
        skew: ClockSkew,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._rules = rules
        self._tenants = tenants
        self._sessions = sessions
        self._own_numbers = own_numbers
        self._schema_drift = schema_drift
        self._lid_lookup = lid_lookup
        self._helper = helper
        self._metrics = metrics
        self._skew = skew
        self._clock = clock
        self._complaints = Throttle()

    async def receive(
        self, body: bytes, headers: Mapping[str, str], *, parse: Parse = events.parse
    ) -> Accepted | Ignored:
        """What became of a webhook that parse reads; durable on return. Raise BadBody or
        StoreUnavailable."""
        message = self._parse(body, headers, parse)
        self._skew.note(message)
        self._sessions.hear(message)
        self._schema_drift.see(message)
        if reason := routing.reason_to_ignore(message, self._rules.forward_events):
            if message.chat is Chat.PERSON and (identity_link := message.identity_link):
                with contextlib.suppress(StoreUnavailable):  # not worth a 503
                    # Our own answer may be what shows a LID's phone.
                    await self._store.link_identity(identity_link)
            return await self._ignore(message, reason)
        try:
            return await self._accept(message, may_help=True)
        except StoreUnavailable:
            self._sessions.not_stored(message)
            raise

    async def recover(self, body: bytes) -> Accepted | Ignored:
        """As receive(), of a message that WAHA was asked for: the backend gets it with
        `X-Recovered: true`, and nobody is asked for a link because of it."""
        message = self._parse(body, {"content-type": "application/json"})
        message = replace(message, headers=(*message.headers, ("x-recovered", "true")))
        if reason := routing.reason_to_ignore(message, self._rules.forward_events):
            return await self._ignore(message, reason)
        return await self._accept(message, may_help=False)

    async def are_known(self, bodies: Sequence[bytes]) -> list[bool]:
        """Of each body whether recover() would make a duplicate of it. Nothing is written."""
        known = [False] * len(bodies)
        messages: list[tuple[int, InboundMessage]] = []
        for place, body in enumerate(bodies):
            with contextlib.suppress(BadBody):
                message = self._parse(body, {})
                if not routing.reason_to_ignore(message, self._rules.forward_events):
                    messages.append((place, message))
        answers = await self._store.are_known([message for _, message in messages])
        for (place, _), answer in zip(messages, answers, strict=True):
            known[place] = answer
        return known

    async def explain(self, body: bytes, headers: Mapping[str, str]) -> Explained:
        """What receive() would do and why; nothing is kept. Raise BadBody or StoreUnavailable."""
        message, rules = self._parse(body, headers), self._rules
        reason = routing.reason_to_ignore(message, rules.forward_events)
        rules_applied = explanation.of_event(message, reason, rules.forward_events)
        if reason:
            return Explained(Ignored(reason), rules_applied)
        dry_run = await self._store.dry_run(message, self._decide(message))
        rules_applied |= explanation.of_person(
            message,
            dry_run,
            policy=rules.policy,
            prefix=rules.prefix,
            may_lock=self._tenants.may_lock,
            hold_seconds=rules.hold_seconds,
            why_no_help=self._helper.why_not(message),
        )
        if dry_run.refused:
            return Explained(StoreUnavailable(dry_run.refused), rules_applied)
        return Explained(dry_run.accepted, rules_applied)

    async def _ignore(self, message: InboundMessage, reason: str) -> Ignored:
        """Keep the message if a person should see it: nobody else will."""
        if message.unreadable and reason in ("no_user", "no_content"):
            await self._store.add_unreadable(message, message.unreadable)
            self._complain(message, message.unreadable)
        log.debug("ignored: %s", reason, extra={"event": "webhook.ignored", "reason": reason})
        return Ignored(reason)

    def _complain(self, message: InboundMessage, reason: UnreadableReason) -> None:
        self._complaints.warn(
            log,
            (message.session, reason),
            "🧩 A message of session %s goes to nobody (%s): see GET /router/unreadable",
            message.session,
            reason.value,
            event="webhook.unreadable",
            reason=reason.value,
            session=message.session,
            request_id=request_id(message.headers),
        )

    async def _accept(self, message: InboundMessage, *, may_help: bool) -> Accepted:
        accepted = await self._store.accept(message, self._decide(message, may_help=may_help))
        self._sessions.accepted(message)
        _log_outcome(accepted, message)
        if is_lid(accepted.user):
            self._lid_lookup.ask(accepted.user)
        if accepted.help_waits:
            self._helper.queue(accepted.user, message.arrived)
        return accepted

    def _parse(
        self, body: bytes, headers: Mapping[str, str], parse: Parse = events.parse
    ) -> InboundMessage:
        return parse(
            body,
            headers,
            home_session=self._rules.home_session,
            now=self._clock(),
            latest=self._skew.latest(),
            own_ids=self._own_numbers.all,
        )

    def _decide(self, message: InboundMessage, *, may_help: bool = True) -> Decide:
        rules = self._rules
        return functools.partial(
            routing.decide,
            message,
            policy=rules.policy,
            prefix=rules.prefix,
            may_lock=self._tenants.may_lock,
            may_help=may_help and self._helper.why_not(message) is None,
        )


def _log_outcome(accepted: Accepted, message: InboundMessage) -> None:
    """But for a change of the lock: see operations/lock_reports.py."""
    user, decision = shown(accepted.user), accepted.decision
    request = request_id(message.headers)
    if decision is None:
        log.debug(
            "seen before: %s",
            user,
            extra={"event": "webhook.duplicate", "user": user, "request_id": request},
        )
    elif isinstance(decision, AskForLink):
        facts = {"event": "user.unknown", "user": user, "request_id": request}
        if decision.link and decision.link.note is Note.REFUSED:
            log.warning(
                "%s has no lock; the link is of tenant %s, which is unknown or inactive",
                user,
                decision.link.tenant,
                extra=facts | {"tenant": decision.link.tenant},
            )
            return
        sentence = "%s has no lock and sent no link"
        if decision.link:
            sentence = "%s has no lock; the link is older than the last change of it"
        elif not decision.hold:
            sentence = "%s has no lock to follow"  # no message of theirs
        log.info(sentence, user, extra=facts)
    elif isinstance(decision, Forward):
        log.info(
            "🔀 Routing %s → Tenant %s (existing session)",
            user,
            decision.tenant,
            extra={
                "event": "message.routed",
                "user": user,
                "tenant": decision.tenant,
                "request_id": request,
            },
        )
