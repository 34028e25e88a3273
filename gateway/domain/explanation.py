"""What would become of a webhook and why, rule by rule, for a person who asks."""

from collections.abc import Callable
from datetime import UTC, datetime

from gateway.domain import deep_link
from gateway.domain.model import (
    MESSAGE_EVENTS,
    NEVER,
    Accepted,
    AskForLink,
    Bind,
    Chat,
    Content,
    DryRun,
    Forward,
    InboundMessage,
    Lock,
    Note,
    TenantId,
    is_lid,
    unscoped,
)

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
_NOTES = {
    Note.CONFIRMED: "names tenant {0}, where the user is already: the lock's time is renewed",
    Note.STALE: "names tenant {0}, but was sent before the lock last changed: changes nothing",
    Note.QUOTED: "names tenant {0}, but the text of a user with a lock must begin with it",
    Note.REFUSED: "names tenant {0}, but {1}",
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
        rules["shape"] = f"no usable `{message.odd_part}`: has WAHA changed its form?"
    if reason == "no_content":
        rules["content"] = f"{_CONTENTS[message.content]}: goes to no tenant"
    if reason == "from_me":
        rules["own"] = f"sent by the gateway's own number: message.any is not in {setting}"
    return rules


def of_person(
    message: InboundMessage,
    dry_run: DryRun,
    *,
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
    rules["link"] = _link(message, dry_run, prefix, may_lock)
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
        return "it has no id: a copy could not be told from a new one"
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
    dry_run: DryRun,
    prefix: str,
    may_lock: Callable[[TenantId], bool],
) -> str:
    decision = dry_run.accepted.decision
    if isinstance(decision, Bind):
        if decision.previous is None:
            return f"names tenant {decision.tenant}: locks the user there"
        return f"names tenant {decision.tenant}: moves the user there from {decision.previous}"
    if isinstance(decision, AskForLink | Forward) and decision.link:
        link = decision.link
        return _NOTES[link.note].format(link.tenant, _why_refused(may_lock(link.tenant)))
    if message.event not in MESSAGE_EVENTS or message.own:
        return "does not count: only what a person writes binds"
    if not message.text:
        return "none: there is no text or caption that counts"
    own = dry_run.lock.tenant
    if own is not None and deep_link.parse(message.text, prefix=prefix, must_open=False) == own:
        return f"names tenant {own} inside the text: changes nothing"
    return f"none: no {prefix}_N as a word of its own, or several different ones"


def _why_refused(may_lock: bool) -> str:
    if may_lock:
        return "LOCK_POLICY=first_link keeps the first"
    return "tenants.json does not know it or says that it is not active"


def _help(accepted: Accepted, decision: AskForLink, why_not: str | None) -> str:
    if accepted.help_waits:
        return "would be sent in a moment, if there is still no lock then"
    if decision.link and decision.link.note is Note.REFUSED:
        return "none: there is a link, though it locks to nobody"
    if not decision.help:
        return f"none: {why_not}"
    return "none: one was sent within HELP_COOLDOWN, or waits already"
