"""What would become of a webhook and why, rule by rule, for a person who asks."""

from collections.abc import Callable
from datetime import UTC, datetime

from gateway.domain import routing
from gateway.domain.model import (
    NEVER,
    Accepted,
    AskForLink,
    Chat,
    Content,
    DryRun,
    InboundMessage,
    Lock,
    LockPolicy,
    Note,
    TenantId,
    is_lid,
    unscoped,
)
from gateway.domain.routing import LinkOutcome

_CHATS = {
    Chat.OWN_NUMBER: "the gateway's own number: no user",
    Chat.GROUP: "a group: no single user",
    Chat.STATUS: "a status (story): no user",
    Chat.NEWSLETTER: "a channel: no user",
    Chat.BROADCAST: "a broadcast list: no user",
}
_CONTENTS = {
    Content.PLACEHOLDER: "none that can be read yet; it may come under the same id",
    Content.NOTICE: "a notice of WhatsApp's: nobody wrote it",
}
_LINKS = {
    LinkOutcome.NOT_A_PERSONS: "does not count: only what a person writes binds",
    LinkOutcome.NO_TEXT: "none: there is no text or caption that counts",
    LinkOutcome.NONE: "none: no {prefix}_N as a word of its own, or several different ones",
    LinkOutcome.OWN_INSIDE: "names tenant {tenant} inside the text: changes nothing",
    LinkOutcome.QUOTED: "names tenant {tenant}, but the text of a user with a lock must begin with"
    " it",
    LinkOutcome.STALE: "names tenant {tenant}, but was sent before the lock last changed: changes"
    " nothing",
    LinkOutcome.CONFIRMED: "names tenant {tenant}, where the user is already: the lock's time is"
    " renewed",
    LinkOutcome.FIRST_STAYS: "names tenant {tenant}, but LOCK_POLICY=first_link keeps the first",
    LinkOutcome.REFUSED: "names tenant {tenant}, but tenants.json does not know it or says that it"
    " is not active",
}


def of_event(
    message: InboundMessage, reason: str | None, forward_events: frozenset[str]
) -> dict[str, str]:
    """The rules that need nothing but the event. reason: why it is ignored, or None."""
    setting = f"FORWARD_EVENTS={','.join(sorted(forward_events))}"
    forwarded = reason != "event_not_forwarded"
    rules = {"event": f"{message.event}: {'is' if forwarded else 'is not'} in {setting}"}
    rules["session"] = message.session
    rules["chat"] = _chat(message)
    if message.odd_part:
        rules["form"] = f"no usable `{message.odd_part}`: has WAHA changed its form?"
    if reason == "no_content":
        rules["content"] = f"{_CONTENTS[message.content]}: goes to no tenant"
    if reason == "from_me":
        rules["own"] = f"sent by the gateway's own number: message.any is not in {setting}"
    return rules


def of_person(
    message: InboundMessage,
    dry_run: DryRun,
    *,
    policy: LockPolicy,
    prefix: str,
    may_lock: Callable[[TenantId], bool],
    hold_seconds: float,
    why_no_help: str | None,
) -> dict[str, str]:
    """The rules about a person's event, as the store would play them. why_no_help: None if a help
    message could be sent, as far as the person does not matter."""
    accepted, decision = dry_run.accepted, dry_run.accepted.decision
    rules = {"user": _user(message, accepted), "seen": _dedup_text(message, accepted)}
    if dry_run.refused:
        rules["store"] = f"503, nothing would be kept: {dry_run.refused}"
    if decision is None:
        return rules
    rules["lock"] = _lock(dry_run.lock)
    rules["link"] = _link(message, dry_run.lock, policy=policy, prefix=prefix, may_lock=may_lock)
    if dry_run.refused:
        return rules
    if isinstance(decision, AskForLink):
        if decision.hold and hold_seconds:
            rules["held"] = (
                f"kept for {hold_seconds:g} s, should a link sent before it still come"
                " (not more than 20 of a user)"
            )
        rules["help"] = _help(accepted, decision, why_no_help)
        return rules
    rules["delivery"] = (
        f"to tenant {decision.tenant}: X-Tenant-ID: {decision.tenant},"
        f" X-User-ID: {unscoped(accepted.user)}"
    )
    if dry_run.released:
        rules["held"] = f"{dry_run.released} held messages of the user would follow it"
    return rules


def _chat(message: InboundMessage) -> str:
    if message.chat is Chat.PERSON:
        ids = [unscoped(one) for one in (message.phone, message.lid) if one]
        sender = "the gateway's own number" if message.own else "the person"
        return f"a direct chat with {' = '.join(ids)}; sent by {sender}"
    return _CHATS.get(message.chat, "it names none, or it concerns no person")


def _user(message: InboundMessage, accepted: Accepted) -> str:
    user = unscoped(accepted.user)
    if is_lid(accepted.user):
        return f"{user}: its phone is not known, so WAHA would be asked (at most once an hour)"
    if message.phone is None:
        return f"{user}: the LID's phone, by an earlier event or WAHA's answer"
    return f"{user}: the phone"


def _dedup_text(message: InboundMessage, accepted: Accepted) -> str:
    if message.dedup_key is None:
        return "it has no id: a copy cannot be distinguished from a new one"
    by = "session, fromMe and message id" if message.dedup_key.twins else "session, event and id"
    if accepted.decision is None:
        return f"seen before ({by}): nothing more happens"
    return f"not seen before ({by})"


def _lock(lock: Lock) -> str:
    if lock.changed == NEVER:
        return "none, and there never was one"
    since = datetime.fromtimestamp(lock.changed.fraction, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"none since {since}" if lock.tenant is None else f"tenant {lock.tenant}, since {since}"


def _link(
    message: InboundMessage,
    lock: Lock,
    *,
    policy: LockPolicy,
    prefix: str,
    may_lock: Callable[[TenantId], bool],
) -> str:
    outcome, tenant = routing.find_link(
        message, lock, policy=policy, prefix=prefix, may_lock=may_lock
    )
    if outcome is LinkOutcome.BINDS and lock.tenant is None:
        return f"names tenant {tenant}: locks the user there"
    if outcome is LinkOutcome.BINDS:
        return f"names tenant {tenant}: moves the user there from {lock.tenant}"
    return _LINKS[outcome].format(tenant=tenant, prefix=prefix)


def _help(accepted: Accepted, decision: AskForLink, why_not: str | None) -> str:
    if accepted.help_waits:
        return "would be sent in a moment, if there is still no lock then"
    if decision.link and decision.link.note is Note.REFUSED:
        return "none: there is a link, though it locks to nobody"
    if not decision.help:
        return f"none: {why_not}"
    return "none: one was sent within HELP_COOLDOWN, or waits already"
