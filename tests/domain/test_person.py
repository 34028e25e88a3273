"""The rules of domain/person.py, as tables: what is known, what happens, and the changes."""

from dataclasses import replace

import pytest

from gateway.domain import lock_events, person
from gateway.domain.dedup import Copy, PersonHash, key_of_another
from gateway.domain.lock_events import Kind, LockEvent, Why
from gateway.domain.model import (
    NEVER,
    AskForLink,
    Bind,
    Forward,
    IdentityLink,
    InboundMessage,
    Lock,
    Moment,
    Note,
    TenantId,
    UserId,
    session_of,
)
from gateway.domain.person import (
    HELP_SECONDS,
    AddDelivery,
    DropHeld,
    ForgetHeld,
    ForgetUser,
    HeldMessage,
    Help,
    Hold,
    Known,
    LockChange,
    MarkSeen,
    Pair,
    PairIds,
    Person,
    RecordEvent,
    ReleaseHeld,
    RenameUser,
    RewriteEvent,
    Rules,
    SetLock,
    UpdateRecord,
)
from tests.messages import ALI, LID, NOW, OMAR, SARA, by_the_rules, message, tenant, user

RULES = Rules(hold_seconds=900.0, max_held_per_user=2, help_cooldown=3600.0)
A, S, OM, L = user(ALI), user(SARA), user(OMAR), user(LID)
L2 = user("158764321000099@lid")
NOBODY = Known({}, {})


def locked(number: int, changed: float = NOW - 100) -> Person:
    return Person(lock=Lock(tenant(number), Moment.of(changed)))


def unlocked(changed: float = NOW - 100) -> Person:
    return Person(lock=Lock(None, Moment.of(changed)), is_unlocked=True)


def held(id_: int, sent: float, arrived: float = NOW - 5) -> HeldMessage:
    return HeldMessage(id_, f"key {id_}", Moment.of(sent), arrived)


def accept(
    known: Known, inbound: InboundMessage, *, refusal: str | None = None, may_help: bool = False
) -> person.Outcome:
    return person.accept(
        known,
        inbound,
        by_the_rules(inbound, may_help=may_help),
        refusal=lambda _: refusal,
        rules=RULES,
        now=NOW,
    )


def kinds(changed: person.Changed) -> list[str]:
    return [type(one).__name__ for one in changed.changes]


# messages


def test_a_link_locks_records_and_is_delivered_first() -> None:
    outcome = accept(NOBODY, message("start_realty_2"))

    assert outcome.accepted
    assert outcome.accepted.decision == Bind(tenant(2))
    assert kinds(outcome.changed) == ["SetLock", "RecordEvent", "AddDelivery", "MarkSeen"]
    (event,) = outcome.changed.events
    assert (event.user, event.kind, event.from_tenant, event.to_tenant, event.why) == (
        A,
        Kind.LOCKED,
        None,
        2,
        Why.LINK,
    )
    assert outcome.changed.known.person(A).lock == Lock(tenant(2), message("").sent)


def test_what_a_user_with_a_lock_writes_changes_nothing_else() -> None:
    outcome = accept(Known({A: locked(2)}, {}), message("hello"))
    assert kinds(outcome.changed) == ["AddDelivery", "MarkSeen"]


def test_a_full_backlog_refuses_and_remembers_nothing() -> None:
    outcome = accept(Known({A: locked(2)}, {}), message("hello"), refusal="full")
    assert (outcome.accepted, outcome.refused) == (None, "full")
    assert outcome.changed.changes == ()


def test_identities_are_linked_even_from_what_is_refused() -> None:
    inbound = message("hello", LID, other_id=ALI)
    outcome = accept(Known({A: locked(2)}, {}), inbound, refusal="full")
    assert kinds(outcome.changed) == ["PairIds", "RenameUser"]


HASH, OTHERS = PersonHash.of(A, None), PersonHash.of(OM, None)
BY_LID = PersonHash.of(None, L)


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        ([], "delivered"),
        ([Copy(HASH, routed=True)], "duplicate"),
        ([Copy(HASH, routed=False)], "duplicate"),
        ([Copy(OTHERS, routed=True)], "delivered under a key of its own"),
        ([Copy(BY_LID, routed=True)], "duplicate"),
        ([Copy(BY_LID, routed=False)], "delivered, and no longer held"),
        ([Copy(OTHERS, routed=True), Copy(HASH, routed=True)], "duplicate"),
    ],
)
def test_whether_it_came_before(seen: list[Copy], what: str) -> None:
    inbound = message("hello")
    outcome = accept(Known({A: locked(2)}, {}, tuple(seen)), inbound)
    assert outcome.accepted
    if what == "duplicate":
        assert outcome.accepted.decision is None
        assert outcome.changed.changes == ()
        return
    assert outcome.accepted.decision == Forward(tenant(2))
    (added,) = [one for one in outcome.changed.changes if isinstance(one, AddDelivery)]
    assert (added.content.idempotency_key == inbound.idempotency_key) is ("of its own" not in what)
    assert any(isinstance(one, ForgetHeld) for one in outcome.changed.changes) is (
        "no longer held" in what
    )


@pytest.mark.parametrize(("already", "is_held"), [(0, True), (1, True), (2, False)])
def test_no_more_is_held_of_a_user_than_may_be(already: int, is_held: bool) -> None:
    waiting = tuple(held(number, NOW - 9) for number in range(already))
    outcome = accept(Known({A: Person(held=waiting)}, {}), message("hello"))
    assert outcome.accepted
    assert outcome.accepted.decision == AskForLink(hold=True)
    assert any(isinstance(one, Hold) for one in outcome.changed.changes) is is_held
    assert len(outcome.changed.known.person(A).held) == already + is_held


def test_a_link_releases_what_was_written_after_it_and_is_not_too_old() -> None:
    waiting = (
        held(1, NOW - 20),  # before the link
        held(2, NOW - 5),
        held(3, NOW - 4, arrived=NOW - 901),  # too old
        held(4, NOW - 3),
    )
    outcome = accept(Known({A: Person(held=waiting)}, {}), message("start_realty_2", sent=NOW - 10))
    released = [one for one in outcome.changed.changes if isinstance(one, ReleaseHeld)]
    assert [one.held.id for one in released] == [2, 4]
    assert {one.tenant for one in released} == {2}
    assert outcome.changed.changes[-2] == DropHeld(A)
    assert outcome.changed.known.person(A).held == ()
    assert outcome.changed.released == 2


@pytest.mark.parametrize(
    ("before", "queued"),
    [
        (None, True),
        (Help(NOW - 10), False),  # one waits
        (Help(NOW - HELP_SECONDS - 1), True),  # it waited too long
        (Help(NOW - 4000, NOW - 3000), False),  # within the cool-down
        (Help(NOW - 9000, NOW - 4000), True),
        (Help(NOW + 9000, NOW + 9000), True),  # of a clock that was ahead
        (Help(NOW + 5), False),
    ],
)
def test_whether_a_help_message_is_queued(before: Help | None, queued: bool) -> None:
    outcome = accept(Known({A: Person(help=before)}, {}), message("hello"), may_help=True)
    assert outcome.accepted
    assert outcome.accepted.help_waits is queued
    assert outcome.changed.changes
    assert (
        any(
            isinstance(one, UpdateRecord) and one.person.help == Help(NOW)
            for one in outcome.changed.changes
        )
        is queued
    )


def test_a_lock_that_a_file_has_under_the_other_id_comes_to_the_person() -> None:
    known = Known({A: Person(), L: locked(4)}, {L: Pair(L, A, NOW - 9)})
    outcome = accept(known, message("hello", ALI))
    assert outcome.accepted
    assert outcome.accepted.decision == Forward(tenant(4))
    assert SetLock(L, None) in outcome.changed.changes
    assert SetLock(A, tenant(4)) in outcome.changed.changes


# two ids, one person


def link(
    known: Known, *, phone: UserId = A, at: float = NOW, asked: bool = False
) -> person.Changed:
    shown = IdentityLink(L, phone, at, "3EB0", asked=asked)
    return person.link_identity(known, shown, hold_seconds=900.0, now=NOW)


@pytest.mark.parametrize(
    ("pairs", "at", "taken"),
    [
        ([], NOW, True),
        ([Pair(L, A, NOW - 9)], NOW, False),  # known already
        ([Pair(L, S, NOW - 9)], NOW, True),
        ([Pair(L, S, NOW + 9)], NOW, False),  # older than what is known
        ([Pair(L, S, NOW)], NOW, True),
        ([Pair(L2, A, NOW - 9)], NOW, True),  # the number changed hands
        ([Pair(L2, A, NOW + 9)], NOW, False),
        ([Pair(L, None, NOW + 9)], NOW, False),  # it lost its phone later than that
    ],
)
def test_the_newer_link_wins(pairs: list[Pair], at: float, taken: bool) -> None:
    changed = link(Known({}, {pair.lid: pair for pair in pairs}), at=at)
    assert (PairIds(Pair(L, A, at)) in changed.changes) is taken
    assert (changed.known.phone_of(L) == A) is (taken or pairs == [Pair(L, A, NOW - 9)])


def test_a_number_that_changed_hands_leaves_its_lock_with_the_lid_that_had_it() -> None:
    known = Known({A: locked(2)}, {L2: Pair(L2, A, NOW - 50)})
    changed = link(known)
    assert changed.known.person(L2).lock.tenant == 2
    assert changed.known.person(A).lock.tenant is None
    assert changed.known.pairs[L2] == Pair(L2, None, NOW - 50)
    assert [one for one in changed.changes if isinstance(one, RenameUser)] == [
        RenameUser(A, L2, None),
        RenameUser(L, A, L),
    ]


def test_a_person_with_a_new_phone_keeps_the_lock() -> None:
    changed = link(Known({S: locked(3)}, {L: Pair(L, S, NOW - 50)}))
    assert changed.known.person(A).lock.tenant == 3
    assert changed.known.person(S).lock.tenant is None


OLD, NEW = NOW - 200, NOW - 100


@pytest.mark.parametrize(
    ("lid", "phone", "stays"),
    [
        (Person(), Person(), None),
        (locked(2), Person(), 2),
        (Person(), locked(3), 3),
        (locked(2, OLD), locked(3, NEW), 3),
        (locked(2, NEW), locked(3, OLD), 2),
        (locked(2, OLD), unlocked(NEW), None),  # the unlock is the newer decision
        (locked(2, NEW), unlocked(OLD), 2),
        (unlocked(NEW), locked(3, OLD), None),
        (unlocked(OLD), locked(3, NEW), 3),
        # The loss of a person behind an id is no decision.
        (locked(2, OLD), Person(lock=Lock(None, Moment.of(NEW))), 2),
        (locked(2, NEW), locked(3, NEW), 3),  # at one moment what the phone has
    ],
)
def test_of_two_decisions_the_newer_one_stays(
    lid: Person, phone: Person, stays: int | None
) -> None:
    changed = link(Known({L: lid, A: phone}, {}))
    after = changed.known.person(A).lock
    assert after.tenant == stays
    assert after.changed == max(lid.lock.changed, phone.lock.changed)
    assert changed.known.person(L).lock.tenant is None


@pytest.mark.parametrize(
    ("lid", "phone"), [(locked(2, OLD), unlocked(NEW)), (unlocked(NEW), locked(3, OLD))]
)
def test_an_unlock_that_won_outlives_a_second_merge(lid: Person, phone: Person) -> None:
    # The number changes hands: a third id, with an older lock, is the same person.
    once = link(Known({L: lid, A: phone, S: locked(5, OLD - 50)}, {})).known
    assert once.person(A).is_unlocked
    twice = link(once, phone=S, at=NOW + 1).known
    assert twice.person(S).lock == Lock(None, Moment.of(NEW))


def test_a_merge_is_recorded_on_both_sides_with_who_said_so() -> None:
    into, from_ = link(Known({L: locked(2)}, {}), asked=True).events
    assert (into.user, into.why, into.other, into.who) == (L, Why.MERGED_INTO, A, "waha")
    assert (from_.user, from_.why, from_.other, from_.who) == (A, Why.MERGED_FROM, L, "waha")
    assert link(Known({L: locked(2)}, {})).events[0].who is None


def test_what_was_held_goes_to_where_the_person_belonged_then() -> None:
    changes = (
        LockChange(Moment.of(NOW - 60), 1, tenant(2)),
        LockChange(Moment.of(NOW - 30), 2, None),
        LockChange(Moment.of(NOW - 20), 3, tenant(5)),
    )
    phone = replace(locked(5, NOW - 20), lock_changes=changes)
    waiting = tuple(held(number, NOW - ago) for number, ago in enumerate((70, 50, 25, 10)))
    changed = link(Known({A: phone, L: Person(held=waiting)}, {}))
    released = [one for one in changed.changes if isinstance(one, ReleaseHeld)]
    assert [(one.held.id, one.tenant, one.alias) for one in released] == [(1, 2, L), (3, 5, L)]


@pytest.mark.parametrize(
    ("lid", "phone", "stays"),
    [
        (None, Help(1.0), Help(1.0)),
        (Help(2.0), None, Help(2.0)),
        (Help(2.0), Help(1.0), Help(2.0)),
        (Help(1.0, 5.0), Help(4.0, 4.5), Help(1.0, 5.0)),
        (Help(9.0), Help(1.0, 2.0), Help(1.0, 2.0)),  # what was sent silences what waits
    ],
)
def test_of_two_help_messages_the_one_sent_last_counts(
    lid: Help | None, phone: Help | None, stays: Help
) -> None:
    changed = link(Known({L: Person(help=lid), A: Person(help=phone)}, {}))
    assert changed.known.person(A).help == stays
    assert changed.known.person(L).help is None


# what an operator does


@pytest.mark.parametrize(
    ("before", "kind"),
    [(Person(), Kind.LOCKED), (locked(2), Kind.MOVED), (locked(7), Kind.LOCKED)],
)
def test_an_operator_locks(before: Person, kind: Kind) -> None:
    who, was, changed = person.lock(
        Known({A: before}, {L: Pair(L, A, 1.0)}), L, tenant(7), at=None, hold_seconds=9, now=NOW
    )
    assert (who, was) == (A, before.lock.tenant)
    (event,) = changed.events
    assert (event.kind, event.why, event.changed) == (kind, Why.OPERATOR, Moment.of(NOW))
    assert changed.known.person(A).lock == Lock(tenant(7), Moment.of(NOW))


def test_a_decision_counts_no_earlier_than_the_one_before() -> None:
    later = locked(2, NOW + 500)  # by WhatsApp's clock, or ours went back
    for changed in (
        person.lock(Known({A: later}, {}), A, tenant(7), at=None, hold_seconds=9, now=NOW)[2],
        person.unlock(Known({A: later}, {}), A, at=NOW, now=NOW)[2],
        person.move(Known({A: later}, {}), A, tenant(7), at=None, now=NOW),
    ):
        assert changed.known.person(A).lock.changed == Moment.of(NOW + 500)


def test_an_unlock_of_nobody_changes_nothing() -> None:
    assert person.unlock(NOBODY, A, at=None, now=NOW) == (A, None, person.Changed((), NOBODY))
    _, tenant_before, changed = person.unlock(Known({A: locked(2)}, {}), A, at=None, now=NOW)
    assert tenant_before == 2
    assert changed.known.person(A).is_unlocked


def test_a_tenants_move_is_recorded_as_one() -> None:
    changed = person.move(Known({A: locked(2)}, {}), A, TenantId(7), at=NOW - 1, now=NOW)
    (event,) = changed.events
    assert (event.kind, event.why, event.from_tenant, event.to_tenant) == (
        Kind.MOVED,
        Why.TENANT_MOVE,
        2,
        7,
    )
    assert changed.changes[0] == SetLock(A, tenant(7))
    assert isinstance(changed.changes[1], RecordEvent)


@pytest.mark.parametrize(
    ("before", "who"),
    [
        (Person(), None),
        (Person(help=Help(NOW - 5)), A),
        (Person(help=Help(NOW - 5, NOW - 1)), None),
        (Person(help=Help(NOW - HELP_SECONDS - 1)), None),
        (replace(locked(2), help=Help(NOW - 5)), None),
    ],
)
def test_whom_a_help_message_is_sent_to(before: Person, who: UserId | None) -> None:
    found, changed = person.begin_help(Known({A: before}, {}), A, now=NOW)
    assert found == who
    after = changed.known.person(A).help
    if who:
        assert after == Help(NOW - 5, NOW)
    elif before.lock.tenant:
        assert after is None
    else:
        assert after == before.help


@pytest.mark.parametrize(("retry", "after"), [(True, Help(NOW - 5)), (False, None)])
def test_a_help_message_that_was_not_sent(retry: bool, after: Help | None) -> None:
    sent = Person(help=Help(NOW - 5, NOW))
    assert person.undo_help(Known({A: sent}, {}), A, retry=retry).known.person(A).help == after
    known_by_phone = Known({A: sent, L: sent}, {L: Pair(L, A, 1.0)})
    assert person.undo_help(known_by_phone, L, retry=retry).changes == ()


def test_which_ids_a_message_concerns() -> None:
    pairs = {L: Pair(L, A, 1.0), A: Pair(L, A, 1.0), L2: Pair(L2, None, 1.0), OM: None, S: None}
    for ids, expected in (
        ([A], {A, L}),
        ([L], {A, L}),
        ([L2], {L2}),
        ([OM], {OM}),
        ([L2, A], {L2, A, L}),
        ([], set()),
    ):
        found, _ = person.ids_to_load(ids, pairs.__getitem__, pairs.__getitem__)
        assert found == expected


def test_seen_messages_mark_whether_they_were_routed() -> None:
    for known, routed in ((NOBODY, False), (Known({A: locked(2)}, {}), True)):
        inbound = message("hello")
        changes = accept(known, inbound).changed.changes
        marks = [one for one in changes if isinstance(one, MarkSeen)]
        assert inbound.dedup_key
        copy = Copy(PersonHash.of(A, None), routed=routed)
        assert marks == [MarkSeen(inbound.dedup_key, copy, inbound.arrived)]
    assert NOBODY.person(A).lock.changed == NEVER


# erasure


def entry(
    who: UserId,
    kind: Kind = Kind.LOCKED,
    why: Why = Why.LINK,
    other: UserId | None = None,
    at: float = NOW - 50,
) -> LockEvent:
    return LockEvent(
        at, who, kind, tenant(1), tenant(2), Moment.of(at), why, "waha", other, "3EB0", "r1"
    )


def nameless(one: LockEvent) -> LockEvent:
    return LockEvent(one.at, user("erased-1"), one.kind, one.from_tenant, one.to_tenant, None, None)


def erase(known: Known, who: UserId, entries: dict[int, LockEvent]) -> person.Changed:
    ids, changed = person.erase(known, who, entries, nobody=user("erased-1"), now=NOW)
    assert ids == tuple(one for one in known.ids_of(who) if one)
    return changed


def test_who_is_erased_is_nobody_in_the_history_and_stored_no_more() -> None:
    known = Known({A: locked(2), L: Person(), S: locked(5)}, {L: Pair(L, A, NOW - 90)})
    entries = {3: entry(A), 7: entry(L, Kind.MERGED, Why.MERGED_INTO, A), 8: entry(S)}
    for who in (A, L):
        changed = erase(known, who, entries)
        assert changed.changes == (
            SetLock(A, None),
            ForgetUser(A),
            ForgetUser(L),
            RewriteEvent(3, entries[3], nameless(entries[3])),
            RewriteEvent(7, entries[7], nameless(entries[7])),
            RecordEvent(
                LockEvent(NOW, user("erased-1"), Kind.ERASED, None, None, None, Why.OPERATOR)
            ),
        )
        assert changed.known == Known({S: locked(5)}, {})


def test_who_turned_out_to_be_the_person_was_the_person_up_to_then() -> None:
    """L2 had the phone before: its entries up to the merge are the erased person's."""
    left = entry(L2, at=NOW - 20)
    entries = {
        1: entry(L2, at=NOW - 90),
        2: entry(L2, Kind.MERGED, Why.MERGED_INTO, A, at=NOW - 80),
        3: left,
        4: entry(L2, Kind.MERGED, Why.MERGED_INTO, S, at=NOW - 10),
    }
    known = Known({A: Person(), L2: locked(4, NOW - 10)}, {L2: Pair(L2, None, NOW)})
    changed = erase(known, A, entries)
    assert [one for one in changed.changes if isinstance(one, RewriteEvent)] == [
        RewriteEvent(1, entries[1], nameless(entries[1])),
        RewriteEvent(2, entries[2], nameless(entries[2])),
    ]
    assert changed.known.person(L2).lock == Lock(tenant(4), Moment.of(NOW - 10))
    assert changed.known.pairs == {L2: Pair(L2, None, NOW)}

    del entries[3], entries[4]
    changed = erase(known, A, entries)
    assert changed.known.person(L2).lock == Lock(tenant(4), NEVER), "no change of it is left"


def test_whose_history_names_the_erased_keeps_its_own() -> None:
    entries = {5: entry(S, Kind.MERGED, Why.MERGED_FROM, L), 6: entry(S)}
    changed = erase(Known({L: Person()}, {}), L, entries)
    assert changed.changes == (
        ForgetUser(L),
        RewriteEvent(5, entries[5], replace(entries[5], other=None, message_id=None)),
    )


def test_of_whom_nothing_was_recorded_nothing_is() -> None:
    assert erase(Known({}, {}), A, {}).changes == (ForgetUser(A),)


# small things that are stored


def test_another_persons_key_is_always_the_same() -> None:
    """It is stored: another one would be another message."""
    assert key_of_another("0" * 32, A) == "6204b9ac95f17dcbe6d3a2e0b6558cd8"


@pytest.mark.parametrize(
    ("who", "session"), [(ALI, "home"), (f"sales/{ALI}", "sales"), (f"a/b/{ALI}", "a/b")]
)
def test_the_session_that_a_user_wrote_to(who: str, session: str) -> None:
    assert session_of(user(who), "home") == session


def test_every_kind_of_event_is_read_back() -> None:
    for kind in (*Kind, *Note):
        assert lock_events.kind_of(kind.value) is kind


@pytest.mark.parametrize("at", [None, NOW - 7])
def test_an_operators_decision_has_its_time_and_its_cause(at: float | None) -> None:
    known = Known({A: locked(2, NOW - 500)}, {})
    decided = Moment.of(NOW if at is None else at)
    for changed in (
        person.unlock(known, A, at=at, now=NOW)[2],
        person.lock(known, A, tenant(3), at=at, hold_seconds=900, now=NOW)[2],
    ):
        (event,) = changed.events
        assert (event.at, event.changed, event.why) == (NOW, decided, Why.OPERATOR)
    (event,) = person.move(known, A, tenant(4), at=at, now=NOW).events
    assert (event.at, event.changed, event.why) == (NOW, decided, Why.TENANT_MOVE)


def test_a_held_message_that_is_delivered_after_all_is_held_no_longer() -> None:
    inbound = message("start_realty_2")
    whose = PersonHash.of(None, L)
    known = Known(
        {
            A: Person(
                held=(HeldMessage(1, inbound.idempotency_key, Moment.of(NOW), NOW), held(2, 0))
            )
        },
        {},
        (Copy(whose, routed=False),),
    )
    outcome = accept(known, inbound)
    assert ForgetHeld(inbound.idempotency_key) in outcome.changed.changes
    # The other one was sent before the link, and stays with nobody.
    assert outcome.changed.known.person(A).held == ()
    assert [one for one in outcome.changed.changes if isinstance(one, ReleaseHeld)] == []
