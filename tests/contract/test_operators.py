"""What every store promises operators and offices, run over each of them."""

import asyncio
import json
import time
from typing import Any

import pytest

from gateway.domain import person
from gateway.domain.model import (
    Accepted,
    Bind,
    DeadLettered,
    Delivered,
    Delivery,
    Forward,
    PersonSummary,
    Requeue,
    Retry,
    Selection,
    TenantFilter,
    UnreadableReason,
)
from gateway.domain.person import Known, Person
from gateway.store import Store
from tests.contract.conftest import Reopen
from tests.messages import (
    ALI,
    LID,
    NOW,
    OMAR,
    SARA,
    by_the_rules,
    message,
    parse,
    tenant,
    user,
    webhook,
)

NOT_YET = UnreadableReason.NOT_DECRYPTED


async def say(store: Store, text: str, who: str = ALI, **how: Any) -> Accepted:
    inbound = message(text, who, **how)
    return await store.accept(inbound, by_the_rules(inbound))


async def claimed(store: Store, **how: Any) -> list[tuple[int, str, str]]:
    """Tenant, user and text of all that is due; none is settled."""
    return [(one.tenant, one.user, text_of(one)) for one in await store.claim(1000, wait=0, **how)]


def text_of(one: Delivery) -> str:
    text: str = json.loads(one.body)["payload"]["body"]
    return text


async def drained(store: Store) -> list[tuple[int, str, str]]:
    """The same, one after the other, each settled."""
    found = []
    while some := await store.claim(1000, wait=0):
        for one in some:
            found.append((int(one.tenant), str(one.user), text_of(one)))
            await store.settle(one, Delivered())
    return found


async def lock_of(store: Store, who: str) -> int | None:
    return (await store.lock_of(user(who)))[1].tenant


# locking by hand


async def test_an_operator_locks_and_moves_and_it_lasts(reopen: Reopen) -> None:
    store = await reopen()
    assert await store.lock(user(ALI), tenant(5)) == (ALI, None, 0)
    assert await store.lock(user(ALI), tenant(7)) == (ALI, 5, 0)
    store = await reopen()
    assert await lock_of(store, ALI) == 7
    assert (await say(store, "hello", sent=NOW + 1)).decision == Forward(tenant(7))
    reported = await store.history(user(ALI), limit=10)
    assert [(one.kind, one.from_tenant, one.to_tenant, one.why) for one in reported] == [
        ("moved", 5, 7, "operator"),
        ("locked", None, 5, "operator"),
    ]


async def test_a_link_from_before_does_not_undo_what_an_operator_did(store: Store) -> None:
    await store.lock(user(ALI), tenant(5))
    said = await say(store, "start_realty_2", sent=NOW - 3600, raised=NOW - 3600)
    assert isinstance(said.decision, Forward)
    assert said.decision.tenant == 5


async def test_what_waits_goes_where_it_was_to_go_and_what_was_held_to_the_new_tenant(
    store: Store,
) -> None:
    await say(store, "start_realty_2")
    await store.lock(user(ALI), tenant(5))
    inbound = message("held", SARA, now=time.time())
    await store.accept(inbound, by_the_rules(inbound))
    assert await store.lock(user(SARA), tenant(5)) == (SARA, None, 1)
    assert await drained(store) == [(2, ALI, "start_realty_2"), (5, SARA, "held")]


async def test_either_id_of_a_person_can_be_locked(store: Store) -> None:
    await say(store, "start_realty_2", LID, other_id=ALI)
    assert await store.lock(user(LID), tenant(5)) == (ALI, 2, 0)
    assert await lock_of(store, ALI) == 5


# moving a tenant


async def test_a_tenants_users_move_and_what_waits_goes_along_in_order(reopen: Reopen) -> None:
    store = await reopen()
    for number in range(3):
        for who in (ALI, SARA):
            await say(store, f"start_realty_2 {number}", who)
    await say(store, "start_realty_3", OMAR)
    keys = {one.idempotency_key for one in await store.claim(10, wait=0)}
    store = await reopen()  # nothing is in flight any more
    assert await store.move(tenant(2), tenant(7)) == (2, 6)
    assert (await store.users_of(tenant(7), 10, None))[0] == [ALI, SARA]
    assert store.totals() == (3, 2)
    store = await reopen()
    first = await store.claim(10, wait=0)
    assert {one.idempotency_key for one in first} == keys
    for one in first:
        await store.settle(one, Delivered())
    texts = [f"start_realty_2 {number}" for number in (1, 2)]
    assert sorted(await drained(store)) == [(7, who, text) for who in (ALI, SARA) for text in texts]
    assert (await say(store, "next")).decision == Forward(tenant(7))
    reported = await store.history(user(ALI), limit=1)
    assert (reported[0].kind, reported[0].from_tenant, reported[0].to_tenant) == ("moved", 2, 7)
    assert await store.move(tenant(2), tenant(7)) == (0, 0)


async def test_what_was_attempted_or_is_in_flight_stays(store: Store) -> None:
    await say(store, "start_realty_2 tried", ALI)
    await say(store, "start_realty_2 flying", SARA)
    in_flight = {one.user: one for one in await store.claim(10, wait=0)}
    await store.settle(
        in_flight[user(ALI)], Retry(wait=0.0, reason="x", poison=False, tried_at=NOW, age=0.0)
    )
    await say(store, "fresh", ALI)
    await say(store, "fresh", SARA)
    assert await store.move(tenant(2), tenant(7)) == (2, 2)
    assert sorted(await claimed(store)) == [
        (2, ALI, "start_realty_2 tried"),
        (7, ALI, "fresh"),
        (7, SARA, "fresh"),
    ]
    await store.settle(in_flight[user(SARA)], Delivered())
    assert (await store.backlog()).by_tenant == {7: 2, 2: 1}


async def test_what_was_sent_without_an_answer_stays_though_nothing_was_counted(
    store: Store,
) -> None:
    """The breaker opened behind it: it went to two tenants when its own was moved then."""
    await say(store, "start_realty_2")
    (in_flight,) = await store.claim(10, wait=0)
    await store.settle(in_flight, Requeue(sent_at=NOW))
    await say(store, "fresh", SARA)
    await store.lock(user(SARA), tenant(2))
    assert await store.move(tenant(2), tenant(7)) == (2, 0)
    (again,) = await store.claim(10, wait=0)
    assert (again.tenant, again.attempt) == (2, 1)


async def test_a_moved_message_is_due_no_sooner_than_the_queue_it_joins(store: Store) -> None:
    await say(store, "start_realty_7 late", ALI, sent=NOW + 9, raised=NOW + 9)
    (one,) = await store.claim(10, wait=0)
    again = Retry(wait=9e9, reason="x", poison=False, tried_at=NOW, age=0.0)
    await store.settle(one, again)
    await store.lock(user(ALI), tenant(2))
    await say(store, "early", ALI, sent=NOW, raised=NOW)
    assert await store.move(tenant(2), tenant(7)) == (1, 1)
    assert await claimed(store) == []
    await store.make_due()
    assert [text for _, _, text in await drained(store)] == ["early", "start_realty_7 late"]


async def test_what_waits_can_be_left(store: Store) -> None:
    await say(store, "start_realty_2")
    assert await store.move(tenant(2), tenant(7), with_waiting=False) == (1, 0)
    assert await drained(store) == [(2, ALI, "start_realty_2")]


async def test_moved_messages_join_what_waits_there_already(store: Store) -> None:
    await say(store, "start_realty_7 a", ALI, sent=NOW, raised=NOW)
    await say(store, "start_realty_2 b", ALI, sent=NOW + 2, raised=NOW + 2)
    await say(store, "start_realty_7 c", ALI, sent=NOW + 4, raised=NOW + 4)
    await say(store, "start_realty_2 d", ALI, sent=NOW + 6, raised=NOW + 6)
    assert await store.move(tenant(2), tenant(7)) == (1, 2)
    assert [text for _, _, text in await drained(store)] == [
        "start_realty_7 a",
        "start_realty_2 b",
        "start_realty_7 c",
        "start_realty_2 d",
    ]


async def test_a_link_from_before_the_move_does_not_undo_it(store: Store) -> None:
    await say(store, "start_realty_2", sent=NOW, raised=NOW)
    await store.move(tenant(2), tenant(7))
    said = await say(store, "start_realty_2 again", sent=NOW + 1, raised=NOW + 1)
    assert isinstance(said.decision, Forward)
    assert said.decision.tenant == 7


async def test_users_of_a_tenant_come_in_pages_in_order(store: Store) -> None:
    people = [f"9715000000{number:02}" for number in range(5)]
    for who in reversed(people):
        await say(store, "start_realty_2", who)
    await say(store, "start_realty_3", ALI)
    found, after = [], None
    for _ in range(3):
        page, after = await store.users_of(tenant(2), 2, after)
        found += page
    assert (found, after) == (people, None)


# figures


async def test_totals_of_each_tenant_show_what_there_is_and_was(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2", ALI)
    await say(store, "start_realty_3", SARA)
    done, dead = sorted(await store.claim(10, wait=0), key=lambda one: one.tenant)
    await store.settle(done, Delivered())
    await store.settle(dead, DeadLettered("refused", NOW))
    await say(store, "next", ALI)
    for opening in (None, reopen):
        store = await opening() if opening else store
        found = await store.tenant_totals()
        assert {one: (t.users, t.delivered, t.waiting, t.dead) for one, t in found.items()} == {
            2: (1, 1, 1, 0),
            3: (1, 0, 0, 1),
        }
        first, last = found[tenant(2)].first_seen, found[tenant(2)].last_seen
        assert first
        assert last
        assert first <= last


# a person's own


async def test_the_history_shows_what_was_decided_and_why_a_link_was_not(store: Store) -> None:
    await say(store, "start_realty_2", bare_id="A")
    await say(store, "I saw start_realty_9", sent=NOW + 1, bare_id="B")
    await say(store, "start_realty_3", sent=NOW + 2, raised=NOW + 2, bare_id="C")
    await say(store, "start_realty_4", sent=NOW - 9, raised=NOW - 9, bare_id="D")
    await store.unlock(user(ALI))
    await say(store, "start_realty_8", SARA)
    reported = await store.history(user(ALI), limit=10)
    assert [(one.kind, one.from_tenant, one.to_tenant, one.message_id) for one in reported] == [
        ("unlocked", 3, None, None),
        ("stale", 3, 4, "D"),
        ("moved", 2, 3, "C"),
        ("quoted", 2, 9, "B"),
        ("locked", None, 2, "A"),
    ]
    older = await store.history(user(ALI), limit=2, before=reported[2].id)
    assert older == reported[3:]


async def fill(store: Store) -> None:
    """ALI, known by both ids, has one of each; SARA has a lock and a message."""
    await say(store, "start_realty_2 dead", LID, other_id=ALI)
    (one,) = await store.claim(10, wait=0)
    await store.settle(one, DeadLettered("refused", NOW))
    await say(store, "waits", ALI)
    await say(store, "start_realty_3", SARA)


async def test_what_is_held_of_a_person_can_be_read(store: Store) -> None:
    await fill(store)
    for who in (ALI, LID):
        export = await store.export(user(who))
        assert (export.ids, export.tenant) == ((ALI, LID), 2)
        stored = [(one.where, one.tenant, json.loads(one.body)["payload"]["body"])
                for one in export.messages]  # fmt: skip
        assert stored == [("waiting", 2, "waits"), ("dead_letter", 2, "start_realty_2 dead")]
        assert [one.kind for one in export.history] == ["locked"]


async def test_some_of_what_is_stored_of_a_person_and_how_much_there_is(store: Store) -> None:
    await fill(store)
    await say(store, "waits too", ALI)
    for who in (ALI, LID):
        some = await store.summary(user(who), limit=1)
        assert (some.waiting, some.held, some.dead_letters) == (2, 0, 1)
        assert [json.loads(one.body)["payload"]["body"] for one in some.messages] == ["waits"]
        every = await store.summary(user(who), limit=9)
        assert [one.where for one in every.messages] == ["waiting", "waiting", "dead_letter"]
        assert every.ids == (ALI, LID)
    nobody = user("971509999999")
    assert await store.summary(nobody, limit=9) == PersonSummary((nobody,), (), 0, 0, 0)


async def test_after_an_erase_nothing_is_held_but_an_entry_without_a_name(reopen: Reopen) -> None:
    store = await reopen()
    await fill(store)
    ids, erased = await store.erase(user(LID))
    assert ids == (ALI, LID)
    assert (erased.locks, erased.waiting, erased.dead_letters, erased.aliases) == (1, 1, 1, 1)
    assert erased.history == 1
    for opening in (None, reopen):
        store = await opening() if opening else store
        for who in (ALI, LID):
            export = await store.export(user(who))
            assert (export.tenant, export.messages, export.history) == (None, (), ())
        assert await store.dead_letters(Selection(), limit=10) == []
        assert store.totals() == (1, 1)
        assert (await store.backlog()).waiting == 1
    _, erased = await store.erase(user(ALI))
    assert erased.history == erased.locks == 0, "there is nothing left to erase"


async def test_an_erase_wins_over_a_settle_that_comes_later(store: Store) -> None:
    await say(store, "start_realty_2")
    (in_flight,) = await store.claim(10, wait=0)
    await say(store, "next")
    await store.erase(user(ALI))
    await store.settle(in_flight, DeadLettered("refused", NOW))
    assert await store.dead_letters(Selection(), limit=10) == []
    assert await claimed(store) == []
    assert (await store.backlog()).waiting == 0


async def test_what_an_erased_person_writes_meanwhile_goes_when_the_old_message_has_ended(
    store: Store,
) -> None:
    """It waited for ever: its line was busy when it was looked for."""
    await say(store, "start_realty_2 old")
    (in_flight,) = await store.claim(10, wait=0)
    await store.erase(user(ALI))
    await say(store, "start_realty_2 new", sent=NOW + 5, raised=NOW + 5)
    assert await claimed(store) == [], "one at a time"
    await store.settle(in_flight, Delivered())
    assert await drained(store) == [(2, ALI, "start_realty_2 new")]


async def test_an_erase_finds_what_was_said_under_a_former_number(store: Store) -> None:
    other = "971501234599"
    await say(store, "start_realty_2", LID, other_id=ALI, sent=NOW, raised=NOW)
    await say(store, "hello", LID, other_id=other, sent=NOW + 9, raised=NOW + 9)
    await say(store, "start_realty_3", ALI, sent=NOW + 20, raised=NOW + 20)  # whose it is now
    await store.erase(user(other))
    reported = await store.history(user(ALI), limit=10)
    assert [(one.kind, one.to_tenant) for one in reported] == [("locked", 3)]


async def test_who_was_erased_may_come_again(store: Store) -> None:
    await say(store, "start_realty_2")
    await store.erase(user(ALI))
    said = await say(store, "start_realty_3", sent=NOW + 5, raised=NOW + 5)
    assert said.decision == Bind(tenant(3))


async def test_another_person_keeps_what_is_theirs_when_one_is_erased(store: Store) -> None:
    """The number changed hands, and the history of the other names it."""
    other = "158764321000099@lid"
    await say(store, "start_realty_2", LID, other_id=ALI, raised=NOW)
    await say(store, "start_realty_3", other, other_id=ALI, sent=NOW + 9, raised=NOW + 9)
    await store.erase(user(ALI))
    assert await lock_of(store, LID) == 2
    assert ALI not in [one.other for one in await store.history(user(LID), limit=10)]


# of which tenants


async def test_only_the_tenants_asked_for_are_served(store: Store) -> None:
    for number, who in ((2, ALI), (3, SARA), (4, OMAR)):
        await say(store, f"start_realty_{number}", who)
    others = TenantFilter(frozenset({tenant(3)}), others=True)
    only = TenantFilter(frozenset({tenant(3)}), others=False)
    nobody = TenantFilter(frozenset(), others=False)
    store.set_claimable(nobody, None)
    assert await claimed(store) == []
    store.set_claimable(others, None)
    assert sorted(one[0] for one in await claimed(store)) == [2, 4]
    assert await claimed(store, probe=others) == []
    assert [one[0] for one in await claimed(store, probe=only)] == [3]
    await say(store, "start_realty_3", "971501234999")
    store.set_claimable(only, None)
    assert [one[0] for one in await claimed(store)] == [3]


async def test_only_the_backoffs_of_the_tenants_asked_for_end(store: Store) -> None:
    for number, who in ((2, ALI), (3, SARA)):
        await say(store, f"start_realty_{number}", who)
    for one in await store.claim(10, wait=0):
        await store.settle(one, Retry(wait=9e9, reason="x", poison=False, tried_at=NOW, age=0.0))
    await store.make_due(TenantFilter(frozenset({tenant(3)}), others=False))
    assert [one[0] for one in await claimed(store)] == [3]
    await store.make_due(TenantFilter(frozenset({tenant(3)})))
    assert [one[0] for one in await claimed(store)] == [2]


async def test_up_to_when_a_session_was_heard_only_grows_and_outlives_a_restart(
    reopen: Reopen,
) -> None:
    store = await reopen()
    assert await store.heard() == {}
    await store.note_heard({"default": 100.5, "sales": 7.0})
    await store.note_heard({"default": 90.0, "rent": 1.0})
    again = await reopen()
    assert await again.heard() == {"default": 100.5, "sales": 7.0, "rent": 1.0}


async def test_what_nobody_can_read_is_stored_for_a_person_to_see(store: Store) -> None:
    now = time.time()
    odd = parse(webhook("hello", "971501234567@new", sent=now), now=now)
    placeholder = parse(webhook(None, ALI, bare_id="3EB0A", sent=now, _data={}), now=now - 90)
    for inbound in (odd, placeholder, placeholder):  # a copy changes nothing
        assert inbound.unreadable
        await store.add_unreadable(inbound, inbound.unreadable)
    newest, oldest = await store.unreadable(limit=10)
    assert (oldest.reason, oldest.user, oldest.body) == (
        UnreadableReason.NO_CHAT, None, odd.body,
    )  # fmt: skip
    assert (newest.reason, newest.user) == (UnreadableReason.NOT_DECRYPTED, ALI)
    assert await store.unreadable(limit=1, before=newest.id) == [oldest]
    assert (await store.backlog()).unreadable == 2
    exported = (await store.export(user(ALI))).messages
    assert [(one.where, one.body) for one in exported] == [("unreadable", placeholder.body)]
    _, erased = await store.erase(user(ALI))
    assert erased.unreadable == 1
    assert await store.unreadable(limit=10) == [oldest]


async def test_what_may_be_decrypted_in_a_moment_is_no_news(store: Store) -> None:
    inbound = parse(webhook(None, ALI, sent=time.time(), _data={}), now=time.time())
    await store.add_unreadable(inbound, UnreadableReason.NOT_DECRYPTED)
    assert (await store.backlog()).unreadable == 0
    assert len(await store.unreadable(limit=10)) == 1


async def test_what_was_decrypted_or_is_too_old_is_no_longer_unreadable(store: Store) -> None:
    now = time.time()
    for bare_id, age in (("3EB0A", 90.0), ("3EB0B", 90.0), ("3EB0C", 48 * 3600 + 1.0)):
        body = webhook(None, ALI, bare_id=bare_id, sent=now, _data={})
        await store.add_unreadable(parse(body, now=now - age), UnreadableReason.NOT_DECRYPTED)
    assert (await store.backlog()).unreadable == 3
    await say(store, "start_realty_2", LID, bare_id="3EB0A", sent=now, now=now)  # by its LID
    async with asyncio.timeout(20):
        while (await store.backlog()).unreadable != 1:
            await asyncio.sleep(0.1)
    (left,) = await store.unreadable(limit=10)
    assert left.message_id == "3EB0B"


async def test_of_a_session_that_nobody_knows_yet_nothing_is_reported_and_nothing_fails(
    store: Store,
) -> None:
    """An operator may mistype its name: that must not count as trouble of the store."""
    who, hello = user(f"sales/{ALI}"), message("hello", session="sales")
    of_them = Selection(user=who)
    for _ in range(2):
        assert (await store.lock_of(who))[1].tenant is None
        assert (await store.unlock(who, drop_waiting=True))[1:] == (None, 0)
        assert await store.history(who, limit=9) == []
        assert (await store.export(who)).messages == ()
        assert (await store.summary(who, limit=9)).waiting == 0
        assert (await store.erase(who))[1].locks == 0
        assert await store.dead_letters(of_them, limit=9) == []
        assert await store.replay(of_them) == 0
        assert await store.delete_dead_letters(of_them) == 0
        assert await store.are_known([hello]) == [False]
        assert (await store.dry_run(hello, by_the_rules(hello))).refused is None
        assert await store.begin_help(who) is None
        await store.undo_help(who, retry=False)
        assert store.health().refusing is None
    await store.add_unreadable(parse(webhook(None, ALI, session="sales")), NOT_YET)
    assert [one.user for one in await store.unreadable(limit=9)] == [who]
    await store.lock(user(f"office/{ALI}"), tenant(2))
    assert (await store.lock_of(user(f"office/{ALI}")))[1].tenant == 2


async def test_whom_claims_are_for_may_change_one_by_one(store: Store) -> None:
    """The set is one and the same; who has changed is said each time."""
    for number, who in ((2, ALI), (3, SARA), (4, OMAR)):
        await say(store, f"start_realty_{number}", who)
    named = {tenant(2), tenant(3)}
    all_but = TenantFilter(named)
    store.set_claimable(all_but, None)
    assert [one[0] for one in await claimed(store)] == [4]
    named.discard(tenant(3))
    store.set_claimable(all_but, [tenant(3)])
    assert [one[0] for one in await claimed(store)] == [3]
    named.clear()
    store.set_claimable(all_but, [tenant(2)])
    assert [one[0] for one in await claimed(store)] == [2]


async def test_backoffs_of_own_faults_are_not_ended_by_others(store: Store) -> None:
    people = [ALI, SARA, OMAR]
    for who in people:
        await say(store, "start_realty_2", who)
    for one in await store.claim(10, wait=0):
        own = one.user == SARA
        failed = Retry(wait=3000.0, reason="x", poison=own, tried_at=store.now(), age=0.0)
        await store.settle(one, failed)
    two = TenantFilter(frozenset({tenant(2)}), others=False)
    await store.make_due(two, without_poison=True)
    assert sorted(one[1] for one in await claimed(store)) == [ALI, OMAR]
    await store.make_due(two)
    assert [one[1] for one in await claimed(store)] == [SARA]


async def test_whether_anything_waits_is_reported_of_some_tenants(store: Store) -> None:
    two, others = (TenantFilter(frozenset({tenant(2)}), others=others) for others in (False, True))
    assert not await store.waits(two)
    await say(store, "start_realty_2", ALI)
    assert (await store.waits(two), await store.waits(others)) == (True, False)
    (one,) = await store.claim(1, wait=0)
    assert await store.waits(two), "what is in flight, too"
    await store.settle(one, Delivered())
    assert not await store.waits(two)


@pytest.mark.parametrize("ahead", [-9.0, 0.5, 2.0, 9.0])
async def test_a_tenants_move_counts_from_when_the_rule_says(store: Store, ahead: float) -> None:
    """On files it is one statement, on Redis a script of its own: both must do as the rule does."""
    sent, raised = int(NOW) + 0.0, int(NOW) + 5.25  # a second of WhatsApp's, and WAHA's much later
    link = message("start_realty_2", sent=sent, raised=raised, now=NOW + 60)
    await store.accept(link, by_the_rules(link))
    before = (await store.lock_of(user(ALI)))[1]
    known = Known({user(ALI): Person(lock=before)}, {})
    expected = person.move(known, user(ALI), tenant(7), at=NOW + ahead, now=NOW)

    await store.move(tenant(2), tenant(7), at=NOW + ahead)
    assert (await store.lock_of(user(ALI)))[1] == expected.known.person(user(ALI)).lock
