"""Who talks to whom: the rules as tables."""

from typing import Any

import pytest

from gateway.domain.model import (
    NEVER,
    AskForLink,
    Bind,
    Decision,
    Forward,
    LinkNote,
    Lock,
    LockPolicy,
    Moment,
    Note,
)
from gateway.domain.routing import decide, reason_to_ignore
from tests.messages import ALI, NOW, message, tenant

LAST, FIRST = LockPolicy.LAST_LINK, LockPolicy.FIRST_LINK
FREE = Lock(None, NEVER)
AT_2 = Lock(tenant(2), Moment.of(NOW - 100))


def note(kind: Note, number: int) -> LinkNote:
    return LinkNote(kind, tenant(number))


@pytest.mark.parametrize(
    ("text", "lock", "policy", "decision"),
    [
        ("hello", FREE, LAST, AskForLink(hold=True)),
        ("start_realty_2", FREE, LAST, Bind(tenant(2))),
        ("hi, start_realty_2", FREE, LAST, Bind(tenant(2))),
        ("start_realty_2", FREE, FIRST, Bind(tenant(2))),
        ("hello", AT_2, LAST, Forward(tenant(2))),
        ("start_realty_2", AT_2, LAST, Forward(tenant(2), note(Note.CONFIRMED, 2))),
        ("start_realty_9", AT_2, LAST, Bind(tenant(9), previous=tenant(2))),
        ("start_realty_9", AT_2, FIRST, Forward(tenant(2), note(Note.REFUSED, 9))),
        ("see start_realty_9", AT_2, LAST, Forward(tenant(2), note(Note.QUOTED, 9))),
        ("see start_realty_2", AT_2, LAST, Forward(tenant(2))),
    ],
)
def test_a_message_and_a_lock_give_a_decision(
    text: str, lock: Lock, policy: LockPolicy, decision: Decision
) -> None:
    assert decide(message(text), lock, policy=policy, prefix="start_realty") == decision


@pytest.mark.parametrize(
    ("sent", "raised", "acts"),
    [
        (NOW - 101, NOW, False),  # an older second, whatever the envelope says
        (NOW - 100, NOW - 100.1, False),  # the same second, older by the envelope
        (NOW - 100, NOW - 99.9, True),
        (NOW - 100, NOW - 100, True),  # not older
        (NOW - 99, NOW - 500, True),
        (NOW + 86_400, NOW + 86_400, True),  # from the future: counts as now
    ],
)
def test_a_link_acts_only_if_it_is_not_older_than_the_last_change(
    sent: float, raised: float, acts: bool
) -> None:
    link = message("start_realty_9", sent=sent, raised=raised)
    locked = decide(link, AT_2, policy=LAST, prefix="start_realty")
    unlocked = decide(link, Lock(None, AT_2.changed), policy=LAST, prefix="start_realty")

    stale = note(Note.STALE, 9)
    assert locked == (Bind(tenant(9), previous=tenant(2)) if acts else Forward(tenant(2), stale))
    assert unlocked == (Bind(tenant(9)) if acts else AskForLink(stale))


def test_a_link_without_a_time_counts_as_sent_now() -> None:
    link = message("start_realty_9", timestamp=None, now=NOW)
    assert isinstance(decide(link, AT_2, policy=LAST, prefix="start_realty"), Bind)


@pytest.mark.parametrize(
    "how",
    [
        {"event": "message.any", "own": True},
        {"event": "message.edited"},
        {"event": "message.reaction"},
        {"event": "message.waiting"},
        {"location": {"latitude": 1}},
        {"vCards": ["BEGIN:VCARD\nNOTE:start_realty_9\nEND:VCARD"]},
    ],
)
def test_only_what_a_person_writes_binds(how: dict[str, Any]) -> None:
    link = message("start_realty_9", **how)
    assert isinstance(decide(link, FREE, policy=LAST, prefix="start_realty"), AskForLink)
    assert decide(link, AT_2, policy=LAST, prefix="start_realty") == Forward(tenant(2))


def test_a_quoted_text_does_not_bind() -> None:
    quoting = message("yes", replyTo={"id": "3EB0", "body": "start_realty_9"})
    nothing = AskForLink(hold=True)
    assert decide(quoting, FREE, policy=LAST, prefix="start_realty") == nothing


@pytest.mark.parametrize(
    ("how", "forward", "reason"),
    [
        ({}, {"message"}, None),
        ({"event": "message.any"}, {"message"}, None),
        ({"event": "message"}, {"message.any"}, None),
        ({"event": "message.any", "own": True}, {"message"}, "from_me"),
        ({"event": "message.any", "own": True}, {"message.any"}, None),
        ({"event": "message.any", "own": True}, {"*"}, None),
        ({"event": "message.ack", "own": True}, {"message"}, "event_not_forwarded"),
        ({"event": "message.ack", "own": True}, {"message", "message.ack"}, None),
        ({"event": "brand.new"}, {"message"}, "event_not_forwarded"),
        ({"event": "brand.new"}, {"*"}, None),
        ({"user": "120363@g.us"}, {"message"}, "group"),
        ({"user": "status@broadcast"}, {"message"}, "status"),
        ({"user": "12345678@broadcast"}, {"message"}, "broadcast"),
        ({"user": "120363@newsletter"}, {"message"}, "newsletter"),
        ({"user": "971501230000"}, {"message"}, "own_number"),  # me.id
        ({"user": "230000000000001@lid"}, {"message"}, "own_number"),  # me.lid
        ({"user": "971557357753"}, {"message"}, "own_number"),  # GATEWAY_PHONE
        ({"user": "0@c.us"}, {"message"}, "no_user"),
        ({"user": "13135550002@meta.ai"}, {"message"}, "no_user"),
        ({"user": "120363@g.us", "event": "message.any", "own": True}, {"message"}, "group"),
    ],
)
def test_what_is_for_no_tenant(how: dict[str, Any], forward: set[str], reason: str | None) -> None:
    inbound = message("hi", **{"user": ALI} | how)
    assert reason_to_ignore(inbound, frozenset(forward)) == reason


@pytest.mark.parametrize(
    ("how", "held"),
    [
        ({}, True),
        ({"event": "message.any"}, True),
        ({"text": None}, True),  # a voice message
        ({"event": "message.any", "own": True}, False),
        ({"event": "message.reaction"}, False),
    ],
)
def test_what_a_person_without_a_lock_says_is_held(how: dict[str, Any], held: bool) -> None:
    decision = decide(message(**how), FREE, policy=LAST, prefix="start_realty")
    assert decision == AskForLink(hold=held)
