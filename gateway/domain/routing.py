"""Every rule of who talks to whom, on one page."""

from collections.abc import Callable
from enum import Enum, auto

from gateway.domain import deep_link
from gateway.domain.model import (
    MESSAGE_EVENTS,
    AskForLink,
    Bind,
    Chat,
    Content,
    Decision,
    Forward,
    InboundMessage,
    LinkNote,
    Lock,
    LockPolicy,
    Note,
    TenantId,
)


def reason_to_ignore(message: InboundMessage, forward_events: frozenset[str]) -> str | None:
    """Why message is for no tenant, in the words of the webhook's answer; None if it is for one.

    forward_events holds the names of FORWARD_EVENTS: "message" means what users send, under
    either name; "message.any" adds what the gateway's own number sends; "*" is every event.
    """
    a_message, everything = message.event in MESSAGE_EVENTS, "*" in forward_events
    if not (a_message or everything or message.event in forward_events):
        return "event_not_forwarded"
    if message.chat is not Chat.PERSON:
        return str(message.chat.value)
    if a_message and message.own and not (everything or "message.any" in forward_events):
        return "from_me"
    if message.content in (Content.PLACEHOLDER, Content.NOTICE):
        return "no_content"
    return None


class LinkOutcome(Enum):
    """What a person's message says of a link."""

    NOT_A_PERSONS = auto()  # only what a person writes counts
    NO_TEXT = auto()
    NONE = auto()
    OWN_INSIDE = auto()  # in the midst of its text a user with a lock names that tenant
    QUOTED = auto()
    STALE = auto()
    CONFIRMED = auto()
    FIRST_STAYS = auto()  # LOCK_POLICY=first_link
    REFUSED = auto()  # tenants.json does not know the tenant, or says that it is not active
    BINDS = auto()


_NOTES = {
    LinkOutcome.QUOTED: Note.QUOTED,
    LinkOutcome.STALE: Note.STALE,
    LinkOutcome.CONFIRMED: Note.CONFIRMED,
    LinkOutcome.FIRST_STAYS: Note.REFUSED,
    LinkOutcome.REFUSED: Note.REFUSED,
}


def find_link(
    message: InboundMessage,
    lock: Lock,
    *,
    policy: LockPolicy,
    prefix: str,
    may_lock: Callable[[TenantId], bool] = lambda _: True,
) -> tuple[LinkOutcome, TenantId | None]:
    """Return what message says of a link, and the tenant that it names.

    lock: where the person belongs. may_lock: whether the tenant is known and takes new users.
    """
    if message.event not in MESSAGE_EVENTS or message.own:
        return LinkOutcome.NOT_A_PERSONS, None
    if not message.text:
        return LinkOutcome.NO_TEXT, None
    has_lock = lock.tenant is not None
    tenant = deep_link.parse(message.text, prefix=prefix, must_open=has_lock)
    if tenant is None:
        inside = deep_link.parse(message.text, prefix=prefix, must_open=False)
        if inside is None:
            return LinkOutcome.NONE, None
        return LinkOutcome.OWN_INSIDE if inside == lock.tenant else LinkOutcome.QUOTED, inside
    if message.sent < lock.changed or (has_lock and not message.sent_is_readable):
        return LinkOutcome.STALE, tenant
    if tenant == lock.tenant:
        return LinkOutcome.CONFIRMED, tenant
    if has_lock and policy is LockPolicy.FIRST_LINK:
        return LinkOutcome.FIRST_STAYS, tenant
    return LinkOutcome.BINDS if may_lock(tenant) else LinkOutcome.REFUSED, tenant


def decide(
    message: InboundMessage,
    lock: Lock,
    *,
    policy: LockPolicy,
    prefix: str,
    may_lock: Callable[[TenantId], bool] = lambda _: True,
    may_help: bool = False,
) -> Decision:
    """What is to be done with a person's message: see find_link()."""
    outcome, tenant = find_link(message, lock, policy=policy, prefix=prefix, may_lock=may_lock)
    if outcome is LinkOutcome.BINDS and tenant is not None:
        return Bind(tenant, previous=lock.tenant)
    note = _NOTES.get(outcome)
    link = LinkNote(note, tenant) if note and tenant is not None else None
    if lock.tenant is not None:
        return Forward(lock.tenant, link)
    if link is None:
        return AskForLink(hold=outcome is not LinkOutcome.NOT_A_PERSONS, help=may_help)
    if outcome is LinkOutcome.STALE:
        return AskForLink(link, help=may_help)
    return AskForLink(link, hold=True)
