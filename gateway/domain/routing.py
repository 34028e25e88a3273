"""Every rule of who talks to whom, on one page."""

from collections.abc import Callable

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

    forward_events holds the names of FORWARD_EVENTS: "message" stands for what users send, under
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


def decide(
    message: InboundMessage,
    lock: Lock,
    *,
    policy: LockPolicy,
    prefix: str,
    may_lock: Callable[[TenantId], bool] = lambda _: True,
    may_help: bool = False,
) -> Decision:
    """What is to be done with a person's message, given where the person belongs.

    may_lock: whether the tenant is known and takes new users.
    """
    from_a_person = message.event in MESSAGE_EVENTS and not message.own
    text = message.text if from_a_person else ""
    stale = message.sent < lock.changed or (
        lock.tenant is not None and not message.sent_is_readable
    )
    if lock.tenant is None:
        link = deep_link.parse(text, prefix=prefix, must_open=False)
        if link is None:
            return AskForLink(hold=from_a_person, help=may_help)
        if stale:
            return AskForLink(LinkNote(Note.STALE, link), help=may_help)
        if not may_lock(link):
            return AskForLink(LinkNote(Note.REFUSED, link), hold=True)
        return Bind(link)

    link = deep_link.parse(text, prefix=prefix, must_open=True)
    if link is None:
        quoted = deep_link.parse(text, prefix=prefix, must_open=False)
        if quoted is None or quoted == lock.tenant:
            return Forward(lock.tenant)
        return Forward(lock.tenant, LinkNote(Note.QUOTED, quoted))
    if stale:
        return Forward(lock.tenant, LinkNote(Note.STALE, link))
    if link == lock.tenant:
        return Forward(lock.tenant, LinkNote(Note.CONFIRMED, link))
    if policy is LockPolicy.FIRST_LINK or not may_lock(link):
        return Forward(lock.tenant, LinkNote(Note.REFUSED, link))
    return Bind(link, previous=lock.tenant)
