"""What every store promises, run over each of them. These tests see only base.Store."""

import asyncio
import json
import time
from typing import Any

import pytest

from gateway.domain.model import (
    ALL_TENANTS,
    Accepted,
    AskForLink,
    Bind,
    DeadLetter,
    DeadLettered,
    Decision,
    Delivered,
    Delivery,
    Forward,
    IdentityLink,
    InboundMessage,
    Lock,
    LockPolicy,
    Requeue,
    Retry,
    Selection,
    TenantFilter,
)
from gateway.errors import StoreUnavailable
from gateway.store import Limits, Store
from tests.contract.conftest import Reopen
from tests.messages import ALI, LID, NOW, OMAR, SARA, by_the_rules, message, parse, tenant, user


async def accept(
    store: Store, inbound: InboundMessage, policy: LockPolicy = LockPolicy.LAST_LINK
) -> Accepted:
    return await store.accept(inbound, by_the_rules(inbound, policy))


async def say(store: Store, text: str, *, user: str = ALI, **how: Any) -> Accepted:
    return await accept(store, message(text, user, **how))


async def claim(
    store: Store, limit: int = 100, *, wait: float = 0.0, probe: TenantFilter | None = None
) -> list[Delivery]:
    return await store.claim(limit, wait=wait, probe=probe)


async def claim_one(store: Store, *, wait: float = 5.0) -> Delivery:
    (delivery,) = await claim(store, 1, wait=wait)
    return delivery


async def drain(store: Store) -> list[Delivery]:
    """Claim and settle until nothing is due."""
    done: list[Delivery] = []
    while claimed := await claim(store):
        for delivery in claimed:
            await store.settle(delivery, Delivered())
        done += claimed
    return done


def texts(deliveries: list[Delivery]) -> list[str]:
    return [json.loads(delivery.body)["payload"]["body"] for delivery in deliveries]


async def tenant_of(store: Store, text: str) -> int | None:
    return (await store.lock_of(user(text)))[1].tenant


# accept


async def test_a_link_locks_and_its_message_is_the_first_delivery(store: Store) -> None:
    accepted = await say(store, "start_realty_2")

    assert accepted == Accepted(user(ALI), Bind(tenant(2)))
    assert await tenant_of(store, ALI) == 2
    assert store.totals() == (1, 1)
    delivery = await claim_one(store)
    assert (delivery.tenant, delivery.user, delivery.attempt) == (2, ALI, 1)


async def test_without_a_lock_nothing_is_delivered(store: Store) -> None:
    assert await say(store, "hello") == Accepted(user(ALI), AskForLink(hold=True))
    assert await claim(store) == []
    assert store.totals() == (0, 0)


async def test_a_delivery_carries_the_very_bytes_and_headers(store: Store) -> None:
    await say(store, "start_realty_2")
    await drain(store)
    inbound = message("مرحبا 👋")
    await accept(store, inbound)
    delivery = await claim_one(store)
    assert delivery.body == inbound.body
    assert delivery.headers == inbound.headers
    assert delivery.idempotency_key == inbound.idempotency_key


async def test_a_new_link_moves_the_user_and_what_waits_stays_where_it_was(store: Store) -> None:
    await say(store, "start_realty_2", sent=NOW - 3)
    await say(store, "for two", sent=NOW - 2)
    moved = await say(store, "start_realty_9", sent=NOW - 1)
    await say(store, "for nine", sent=NOW)

    assert moved.decision == Bind(tenant(9), previous=tenant(2))
    assert store.totals() == (1, 1)
    assert [(d.tenant, texts([d])[0]) for d in await drain(store)] == [
        (2, "start_realty_2"),
        (9, "start_realty_9"),
        (2, "for two"),
        (9, "for nine"),
    ]


async def test_decide_is_given_the_lock_as_it_is_in_the_same_commit(store: Store) -> None:
    """Link and follow-up arrive together: the follow-up sees the lock that the link made."""
    inbound = [message("start_realty_2"), message("hello"), message("start_realty_9"), message("x")]
    accepted = await asyncio.gather(*(accept(store, one) for one in inbound))
    decisions = [one.decision for one in accepted]
    assert decisions == [
        Bind(tenant(2)),
        Forward(tenant(2)),
        Bind(tenant(9), previous=tenant(2)),
        Forward(tenant(9)),
    ]


async def test_a_decision_that_fails_keeps_nothing_and_harms_nobody_else(store: Store) -> None:
    def stumble(_: Lock) -> Decision:
        raise RuntimeError("stumbled")

    inbound = message("start_realty_2")
    results = await asyncio.gather(
        say(store, "start_realty_3", user=SARA),
        store.accept(inbound, stumble),
        say(store, "start_realty_4", user=OMAR),
        return_exceptions=True,
    )
    assert isinstance(results[1], RuntimeError)
    assert [await tenant_of(store, who) for who in (SARA, ALI, OMAR)] == [3, None, 4]
    assert (await accept(store, inbound)).decision == Bind(tenant(2))


# what was seen before


async def test_a_copy_is_a_duplicate_and_is_delivered_once(store: Store) -> None:
    inbound = message("start_realty_2")
    first, copy = await asyncio.gather(accept(store, inbound), accept(store, inbound))
    later = await accept(store, inbound)
    assert first.decision == Bind(tenant(2))
    assert copy == later == Accepted(user(ALI), None)
    assert len(await drain(store)) == 1


async def test_a_copy_is_known_after_a_restart(reopen: Reopen) -> None:
    inbound = message("start_realty_2")
    await accept(await reopen(), inbound)
    assert (await accept(await reopen(), inbound)).decision is None


async def test_message_and_message_any_are_one(store: Store) -> None:
    await say(store, "start_realty_2", bare_id="3EB0A")
    twin = await say(store, "start_realty_2", bare_id="3EB0A", event="message.any")
    assert twin.decision is None


async def test_twins_by_phone_and_by_lid_are_one(store: Store) -> None:
    await say(store, "start_realty_2", bare_id="3EB0A")
    twin = await say(store, "start_realty_2", user=LID, other_id=ALI, bare_id="3EB0A")
    assert twin == Accepted(user(ALI), None)
    # The twin's two ids are learnt all the same.
    assert (await say(store, "hello", user=LID)).user == ALI


async def test_a_phone_and_a_lid_not_known_to_differ_are_one(store: Store) -> None:
    await say(store, "start_realty_2", bare_id="3EB0A")
    assert (await say(store, "start_realty_2", user=LID, bare_id="3EB0A")).decision is None


async def test_a_lid_known_to_be_somebody_else_is_another_message(store: Store) -> None:
    await say(store, "hello", user=LID, other_id=SARA)
    await say(store, "start_realty_2", bare_id="3EB0A")
    other = await say(store, "start_realty_3", user=LID, bare_id="3EB0A")
    assert other == Accepted(user(SARA), Bind(tenant(3)))


async def test_two_people_may_use_one_message_id_and_both_are_delivered(store: Store) -> None:
    await say(store, "start_realty_2", bare_id="3EB0A")
    other = await say(store, "start_realty_2", user=SARA, bare_id="3EB0A")
    assert other.decision == Bind(tenant(2))
    keys = {delivery.idempotency_key for delivery in await drain(store)}
    assert len(keys) == 2, "one key for two messages would let the backend drop one of them"


async def test_without_ids_nothing_is_a_copy(store: Store) -> None:
    body = b'{"event":"message","payload":{"from":"971501234567@c.us","body":"start_realty_2"}}'
    assert (await accept(store, parse(body))).decision is not None
    assert (await accept(store, parse(body))).decision is not None


async def test_a_copy_that_went_to_nobody_does_not_hide_the_one_that_shows_whose_it_is(
    store: Store,
) -> None:
    """By LID nobody knew the person; the second copy comes by phone, and the phone has a lock."""
    await hold(store, "start_realty_2", 9)
    await drain(store)
    by_lid = await hold(store, "important", 5, user=LID, bare_id="3EB0A")
    assert isinstance(by_lid.decision, AskForLink)
    assert (await hold(store, "important", 5, bare_id="3EB0A")).decision == Forward(tenant(2))
    await hold(store, "both ids", 1, user=LID, other_id=ALI)
    assert texts(await drain(store)) == ["important", "both ids"]


# locks


async def test_a_lock_outlives_a_restart(reopen: Reopen) -> None:
    await say(await reopen(), "start_realty_2")
    again = await reopen()
    assert await tenant_of(again, ALI) == 2
    assert (await say(again, "hello")).decision == Forward(tenant(2))


async def test_an_old_link_moves_nobody_back(reopen: Reopen) -> None:
    await say(await reopen(), "start_realty_2", sent=NOW - 10)
    await say(await reopen(), "start_realty_9", sent=NOW - 5)
    late = await say(await reopen(), "start_realty_2", sent=NOW - 8)
    assert isinstance(late.decision, Forward)
    assert late.decision.tenant == 9
    assert await tenant_of(await reopen(), ALI) == 9


async def test_the_users_own_link_again_renews_the_time_of_the_lock(store: Store) -> None:
    await say(store, "start_realty_2", sent=NOW - 10)
    await say(store, "start_realty_2", sent=NOW - 2)
    late = await say(store, "start_realty_9", sent=NOW - 5)
    assert isinstance(late.decision, Forward)
    assert await tenant_of(store, ALI) == 2


async def test_unlock_takes_the_lock_and_keeps_the_time(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2", sent=NOW)
    assert await store.unlock(user(ALI)) == (ALI, 2, 0)
    assert await store.unlock(user(ALI)) == (ALI, None, 0)
    assert store.totals() == (0, 0)

    store = await reopen()
    assert await tenant_of(store, ALI) is None
    late = await say(store, "start_realty_2", sent=NOW + 1)  # the unlock is of today
    assert isinstance(late.decision, AskForLink)
    now = time.time() + 1
    assert (await say(store, "start_realty_3", sent=now, now=now)).decision == Bind(tenant(3))


async def test_first_link_stays_until_an_operator_unlocks(store: Store) -> None:
    first = LockPolicy.FIRST_LINK
    await accept(store, message("start_realty_2", sent=NOW), first)
    later = await accept(store, message("start_realty_9", sent=NOW + 1, now=NOW + 1), first)
    assert isinstance(later.decision, Forward)
    assert later.decision.tenant == 2
    await store.unlock(user(ALI))
    now = time.time() + 1
    freed = await accept(store, message("start_realty_9", sent=now, now=now), first)
    assert freed.decision == Bind(tenant(9))


async def test_locks_come_in_pages_in_order(store: Store) -> None:
    people = [f"9715012345{number:02}" for number in range(25)]
    await asyncio.gather(*(say(store, "start_realty_2", user=who) for who in reversed(people)))
    seen: list[str] = []
    after = None
    for _ in range(3):
        page = await store.locks(10, after)
        seen += page.locks
        after = page.next
    assert after is None
    assert seen == people
    assert store.totals() == (25, 1)


# who a person is


async def test_either_id_finds_the_lock_once_both_were_seen(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2", user=LID, other_id=ALI)
    assert await store.lock_of(user(LID)) == await store.lock_of(user(ALI))
    assert (await store.lock_of(user(LID)))[0] == ALI

    store = await reopen()
    accepted = await say(store, "hello", user=LID)
    assert accepted == Accepted(user(ALI), Forward(tenant(2)))
    deliveries = await drain(store)
    assert [(d.user, d.alias) for d in deliveries] == [(ALI, LID)] * 2


async def test_a_lock_made_by_lid_follows_to_the_phone(store: Store) -> None:
    await say(store, "start_realty_2", user=LID)
    assert (await store.lock_of(user(LID)))[0] == LID
    accepted = await say(store, "hello", other_id=LID)
    assert accepted == Accepted(user(ALI), Forward(tenant(2)))
    assert (await store.locks(10, None)).locks == {ALI: 2}


@pytest.mark.parametrize(("lid_sent", "phone_sent", "stays"), [(1, 2, 5), (2, 1, 2)])
async def test_of_two_locks_the_newer_one_stays(
    store: Store, lid_sent: int, phone_sent: int, stays: int
) -> None:
    await say(store, "start_realty_2", user=LID, sent=NOW - 10 + lid_sent)
    await say(store, "start_realty_5", user=ALI, sent=NOW - 10 + phone_sent)
    await say(store, "hello", user=LID, other_id=ALI)
    assert (await store.locks(10, None)).locks == {ALI: stays}
    assert store.totals() == (1, 1)


async def test_after_two_locks_became_one_a_newer_link_still_acts(store: Store) -> None:
    await say(store, "start_realty_2", user=LID, sent=NOW - 100)
    await say(store, "start_realty_3", sent=NOW - 90)
    await say(store, "hello", user=LID, other_id=ALI, sent=NOW - 10)
    late = await say(store, "start_realty_4", sent=NOW - 50)
    assert late.decision == Bind(tenant(4), previous=tenant(3))


@pytest.mark.parametrize("unlocked", [ALI, LID])
async def test_an_unlock_is_not_undone_by_an_older_lock_of_the_other_id(
    store: Store, unlocked: str
) -> None:
    await say(store, "start_realty_2", user=LID, sent=NOW - 100)
    await say(store, "start_realty_3", sent=NOW - 90)
    await store.unlock(user(unlocked))
    met = await say(store, "hello", user=LID, other_id=ALI)
    assert met.decision == AskForLink(hold=True)
    assert store.totals() == (0, 0)


async def test_an_unlock_that_won_a_merge_is_not_undone_by_a_third_id(store: Store) -> None:
    await say(store, "start_realty_5", user=SARA, sent=NOW - 200)
    await say(store, "start_realty_2", user=LID, sent=NOW - 100)
    await store.unlock(user(LID))
    await say(store, "hello", user=LID, other_id=ALI, raised=NOW - 10)
    met = await say(store, "new number", user=LID, other_id=SARA, raised=NOW - 5)
    assert met.decision == AskForLink(hold=True)
    assert store.totals() == (0, 0)


async def test_the_lock_follows_the_lid_to_a_new_phone(store: Store) -> None:
    await say(store, "start_realty_2", user=LID, other_id=ALI, raised=NOW - 10)
    moved = await say(store, "new number", user=LID, other_id=SARA, raised=NOW - 5)
    assert moved == Accepted(user(SARA), Forward(tenant(2)))
    assert await tenant_of(store, ALI) is None
    # An older sighting that comes late changes nothing.
    late = await say(store, "late", user=LID, other_id=ALI, raised=NOW - 7)
    assert late == Accepted(user(SARA), Forward(tenant(2)))


async def test_a_number_that_changes_hands_takes_no_lock_along(store: Store) -> None:
    other_lid = "158764321000099@lid"
    await say(store, "start_realty_2", user=LID, other_id=ALI, raised=NOW - 10)
    newcomer = await say(store, "hello", user=other_lid, other_id=ALI, raised=NOW - 5)
    assert newcomer == Accepted(user(ALI), AskForLink(hold=True))
    assert (await say(store, "still me", user=LID)) == Accepted(user(LID), Forward(tenant(2)))


async def test_a_late_identity_link_does_not_give_a_lid_that_lost_its_phone_anothers(
    store: Store,
) -> None:
    """It took over the lock of the person whose phone it showed."""
    newcomer = "158764321000099@lid"
    await say(store, "start_realty_1", user=LID, other_id=ALI, raised=NOW - 100, sent=NOW - 100)
    await say(store, "start_realty_9", user=SARA, raised=NOW - 50, sent=NOW - 50)
    await say(store, "hello", user=newcomer, other_id=ALI, raised=NOW - 20)
    late = await say(store, "late", user=LID, other_id=SARA, raised=NOW - 150)
    assert late == Accepted(user(LID), Forward(tenant(1)))
    assert await tenant_of(store, SARA) == 9
    # A newer one still counts, and then the two are one.
    await say(store, "hello", user=LID, other_id=SARA, raised=NOW - 5)
    assert (await store.lock_of(user(LID)))[0] == SARA


async def test_linking_ids_stores_them_and_nothing_else(store: Store) -> None:
    await store.link_identity(IdentityLink(user(LID), user(ALI), NOW))
    assert (await store.lock_of(user(LID)))[0] == ALI
    assert await claim(store) == []


async def test_queues_of_one_person_become_one_and_keep_their_order(store: Store) -> None:
    await say(store, "start_realty_2", user=LID, raised=NOW - 10)
    await say(store, "second", user=LID, raised=NOW - 9)
    first = await claim_one(store)
    await say(store, "third", user=ALI, other_id=LID, raised=NOW - 8)
    assert await claim(store) == [], "the first is in flight, under its old name"
    await store.settle(first, Delivered())
    rest = await drain(store)
    assert texts(rest) == ["second", "third"]
    assert {(d.user, d.alias) for d in rest} == {(user(ALI), user(LID))}


async def test_two_in_flight_of_queues_that_become_one_hold_back_the_rest(store: Store) -> None:
    await say(store, "start_realty_2", user=LID, raised=NOW - 10)
    await say(store, "start_realty_2", user=ALI, raised=NOW - 9)
    by_lid, by_phone = await claim(store)
    await say(store, "third", user=ALI, other_id=LID, raised=NOW - 8)
    await store.settle(by_lid, Delivered())
    assert await claim(store) == []
    await store.settle(by_phone, Delivered())
    assert texts(await drain(store)) == ["third"]


# messages that wait for their link


async def hold(store: Store, text: str, age: float, **how: Any) -> Accepted:
    now = time.time()
    return await say(store, text, sent=now - age, now=now, **how)


async def test_a_text_that_overtook_its_link_follows_it_in_order(reopen: Reopen) -> None:
    store = await reopen()
    assert isinstance((await hold(store, "third", 1)).decision, AskForLink)
    await hold(store, "second", 3)
    await hold(store, "before the link", 7)
    store = await reopen()
    assert await claim(store) == []
    await hold(store, "start_realty_2", 5)
    delivered = await drain(store)
    assert texts(delivered) == ["start_realty_2", "second", "third"]
    assert {delivery.tenant for delivery in delivered} == {2}
    # What was said before the link is gone, not kept for a later one.
    await hold(store, "start_realty_3", 4)
    assert texts(await drain(store)) == ["start_realty_3"]


async def test_a_held_message_is_seen_and_its_copy_is_a_duplicate(store: Store) -> None:
    inbound = message("hello", sent=time.time(), now=time.time())
    await accept(store, inbound)
    assert (await accept(store, inbound)).decision is None
    await hold(store, "start_realty_2", 5)
    delivered = await drain(store)
    assert texts(delivered) == ["start_realty_2", "hello"]
    assert delivered[1].idempotency_key == inbound.idempotency_key


async def test_at_most_twenty_of_a_user_are_held(store: Store) -> None:
    for number in range(25):
        await hold(store, f"{number}", 20 - number / 2)
    await hold(store, "start_realty_2", 30)
    assert texts(await drain(store)) == ["start_realty_2", *(f"{n}" for n in range(20))]


async def test_nobody_elses_messages_are_released(store: Store) -> None:
    await hold(store, "saras", 1, user=SARA)
    await hold(store, "start_realty_2", 5)
    assert texts(await drain(store)) == ["start_realty_2"]


async def test_what_is_held_too_long_is_not_released(reopen: Reopen) -> None:
    store = await reopen(Limits(hold_seconds=0.05, min_free_disk_bytes=0))
    await hold(store, "late", 0)
    await asyncio.sleep(0.1)
    await hold(store, "start_realty_2", 5)
    assert texts(await drain(store)) == ["start_realty_2"]


async def test_nothing_is_held_when_that_is_switched_off(reopen: Reopen) -> None:
    store = await reopen(Limits(hold_seconds=0, min_free_disk_bytes=0))
    await hold(store, "hello", 1)
    await hold(store, "start_realty_2", 5)
    assert texts(await drain(store)) == ["start_realty_2"]


async def test_what_an_unknown_lid_said_joins_the_queue_when_it_is_a_person_with_a_lock(
    store: Store,
) -> None:
    await hold(store, "start_realty_2", 9)
    await hold(store, "by lid", 5, user=LID)
    await hold(store, "by both", 1, user=LID, other_id=ALI)
    delivered = await drain(store)
    assert texts(delivered) == ["start_realty_2", "by lid", "by both"]
    assert {(one.user, one.alias) for one in delivered[1:]} == {(ALI, LID)}


async def test_wahas_answer_releases_what_an_unknown_lid_said(store: Store) -> None:
    await hold(store, "start_realty_2", 9)
    await hold(store, "by lid", 5, user=LID)
    assert await store.held_lids() == [LID]
    await store.link_identity(IdentityLink(user(LID), user(ALI), time.time(), asked=True))
    delivered = await drain(store)
    assert texts(delivered) == ["start_realty_2", "by lid"]
    assert {(one.user, one.alias) for one in delivered[1:]} == {(ALI, LID)}
    assert await store.held_lids() == []


@pytest.mark.parametrize(("locked", "unknown"), [(ALI, LID), (LID, ALI)])
@pytest.mark.parametrize("second", [2, 3])
async def test_what_an_unknown_id_said_goes_to_the_tenant_of_that_time(
    store: Store, second: int, locked: str, unknown: str
) -> None:
    """It was lost when the link was renewed or changed before WAHA answered."""
    await hold(store, "start_realty_2", 9, user=locked)
    await hold(store, "meanwhile", 5, user=unknown)
    await hold(store, f"start_realty_{second}", 2, user=locked)
    await store.link_identity(IdentityLink(user(LID), user(ALI), time.time(), asked=True))
    delivered = {text: one.tenant for one in await drain(store) for text in texts([one])}
    assert delivered == {"start_realty_2": 2, "meanwhile": 2, f"start_realty_{second}": second}


# help messages


async def ask(store: Store, who: str = ALI, **how: Any) -> Accepted:
    """Somebody without a lock writes, and may be helped."""
    inbound = message("hello", who, **how)
    return await store.accept(inbound, by_the_rules(inbound, may_help=True))


async def waiting(store: Store) -> list[str]:
    return [who for who, _ in await store.help_waits()]


async def test_help_is_stored_once_per_person_and_cool_down(reopen: Reopen) -> None:
    store = await reopen()
    assert (await ask(store)).help_waits
    assert not (await ask(store)).help_waits, "one waits already"
    assert (await ask(store, SARA)).help_waits
    store = await reopen()
    assert await waiting(store) == [ALI, SARA]
    assert await store.begin_help(user(ALI)) == ALI
    assert await store.begin_help(user(ALI)) is None, "it counts as sent"
    store = await reopen()
    assert not (await ask(store)).help_waits, "the cool-down outlives a restart"
    assert await waiting(store) == [SARA]


async def test_help_is_stored_again_after_the_cool_down(reopen: Reopen) -> None:
    store = await reopen(Limits(help_cooldown=0.05, min_free_disk_bytes=0))
    await ask(store)
    await store.begin_help(user(ALI))
    await asyncio.sleep(0.1)
    assert (await ask(store)).help_waits


async def test_who_has_a_lock_by_then_gets_no_help_and_may_get_it_later(store: Store) -> None:
    await ask(store)
    await say(store, "start_realty_2")
    assert await store.begin_help(user(ALI)) is None
    await store.unlock(user(ALI))
    assert (await ask(store)).help_waits


async def test_a_copy_and_an_event_of_another_kind_ask_for_no_help(store: Store) -> None:
    inbound = message("hello")
    assert (await store.accept(inbound, by_the_rules(inbound, may_help=True))).help_waits
    await store.begin_help(user(ALI))
    await store.undo_help(user(ALI), retry=False)
    assert not (await store.accept(inbound, by_the_rules(inbound, may_help=True))).help_waits
    assert not (await say(store, "hello", user=SARA)).help_waits


async def test_what_was_not_sent_waits_again_or_is_forgotten(store: Store) -> None:
    await ask(store)
    await store.begin_help(user(ALI))
    await store.undo_help(user(ALI), retry=True)
    assert await waiting(store) == [ALI]
    assert await store.begin_help(user(ALI)) == ALI
    await store.undo_help(user(ALI), retry=False)
    assert await waiting(store) == []
    assert (await ask(store)).help_waits


@pytest.mark.parametrize("helped_as", [ALI, LID])
async def test_help_follows_the_person_to_another_id(store: Store, helped_as: str) -> None:
    await ask(store, helped_as)
    await store.begin_help(user(helped_as))
    await ask(store, LID if helped_as == ALI else ALI)
    await store.link_identity(IdentityLink(user(LID), user(ALI), time.time()))
    assert await waiting(store) == [], "the person was helped"
    assert await store.begin_help(user(LID)) is None


async def test_undoing_a_help_message_leaves_the_one_that_was_sent_to_the_same_person(
    store: Store,
) -> None:
    """The person got two: the row of the one that failed had taken the place of the other."""
    await ask(store, ALI)
    await store.begin_help(user(ALI))
    await ask(store, LID)
    await store.begin_help(user(LID))
    await store.link_identity(IdentityLink(user(LID), user(ALI), time.time()))
    for again in (True, False):
        await store.undo_help(user(LID), retry=again)
        assert await waiting(store) == []
        assert not (await ask(store)).help_waits


async def test_help_that_waits_goes_to_the_phone_once_it_is_known(store: Store) -> None:
    await ask(store, LID)
    await store.link_identity(IdentityLink(user(LID), user(ALI), time.time()))
    assert await store.begin_help(user(LID)) == ALI


# rehearsing


async def test_a_dry_run_says_what_accept_will_do_and_keeps_nothing(store: Store) -> None:
    await say(store, "start_realty_2", sent=NOW - 9)
    await say(store, "start_realty_3", user=SARA, sent=NOW - 9)
    await drain(store)
    for who, text, both in (
        (ALI, "hello", LID),
        (SARA, "start_realty_5", None),
        (OMAR, "hello", None),
        (OMAR, "start_realty_7", None),
    ):
        inbound = message(text, who, other_id=both)
        decide = by_the_rules(inbound, may_help=True)
        before = (await store.locks(10, None), store.totals())
        rehearsed = await store.dry_run(inbound, decide)
        assert await store.dry_run(inbound, decide) == rehearsed
        assert (await store.locks(10, None), store.totals()) == before
        assert await claim(store) == []
        assert (await store.backlog()).waiting == 0
        assert await waiting(store) == []
        assert (await store.lock_of(user(LID)))[0] == LID or who != ALI
        assert rehearsed.lock == (await store.lock_of(user(who)))[1]
        assert await store.accept(inbound, decide) == rehearsed.accepted
        again = await store.dry_run(inbound, decide)
        assert again.accepted.decision is None, "it was seen"
        for who_waits in await waiting(store):
            await store.begin_help(user(who_waits))
        await drain(store)


async def test_a_dry_run_shows_its_lock_to_nobody_in_the_same_commit(store: Store) -> None:
    link, text = message("start_realty_2"), message("hello")
    _, accepted, _ = await asyncio.gather(
        store.dry_run(link, by_the_rules(link)),
        accept(store, text),
        store.dry_run(link, by_the_rules(link)),
    )
    assert accepted.decision == AskForLink(hold=True)


async def test_a_dry_run_counts_what_was_held(store: Store) -> None:
    await hold(store, "second", 1)
    await hold(store, "third", 0)
    inbound = message("start_realty_2", sent=time.time() - 5, now=time.time())
    assert (await store.dry_run(inbound, by_the_rules(inbound))).released == 2
    await accept(store, inbound)
    assert texts(await drain(store)) == ["start_realty_2", "second", "third"]


async def test_a_dry_run_shows_of_a_full_backlog(reopen: Reopen) -> None:
    store = await reopen(Limits(max_backlog=1, min_free_disk_bytes=0))
    await say(store, "start_realty_2")
    inbound = message("hello")
    assert "MAX_BACKLOG=1" in str((await store.dry_run(inbound, by_the_rules(inbound))).refused)


# lines


async def test_a_queue_goes_one_at_a_time_in_order_of_events(store: Store) -> None:
    await say(store, "start_realty_2", raised=NOW - 10)
    link = await claim_one(store)
    for text, raised in [("b", NOW - 4), ("c", NOW - 3), ("a", NOW - 5), ("d", NOW - 3)]:
        await say(store, text, raised=raised)
    assert await claim(store) == []
    await store.settle(link, Delivered())
    order = []
    while claimed := await claim(store):
        assert len(claimed) == 1
        order += texts(claimed)
        await store.settle(claimed[0], Delivered())
    assert order == ["a", "b", "c", "d"]


async def test_an_older_message_that_arrives_while_the_head_waits_goes_first(store: Store) -> None:
    await say(store, "start_realty_2", raised=NOW - 5)
    await say(store, "older", raised=NOW - 9)
    assert texts(await drain(store)) == ["older", "start_realty_2"]


async def test_different_queues_go_at_the_same_time(store: Store) -> None:
    for who in (ALI, SARA, OMAR):
        await say(store, "start_realty_2", user=who)
    assert len(await claim(store)) == 3


async def test_a_failing_delivery_holds_back_its_own_user_and_nobody_else(store: Store) -> None:
    for who in (ALI, SARA):
        await say(store, "start_realty_2", user=who)
        await say(store, "next", user=who)
    alis, saras = sorted(await claim(store), key=lambda delivery: delivery.user)
    await store.settle(alis, again(wait=3600))
    await store.settle(saras, Delivered())
    assert [d.user for d in await drain(store)] == [SARA]


def again(*, wait: float, poison: bool = False, age: float = 0.0) -> Retry:
    return Retry(wait, "no answer", poison=poison, tried_at=time.time(), age=age)


async def test_what_failed_comes_again_with_the_same_key_and_the_next_number(store: Store) -> None:
    await say(store, "start_realty_2")
    first = await claim_one(store)
    await store.settle(first, again(wait=0.05, poison=True, age=7.0))
    second = await claim_one(store)
    assert second.idempotency_key == first.idempotency_key
    assert (second.attempt, second.poison_attempts, second.age) == (2, 1, 7.0)
    assert second.tried_at == pytest.approx(time.time(), abs=60)


async def test_due_times_and_counts_outlive_a_restart(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2")
    await store.settle(await claim_one(store), again(wait=3600, poison=True))
    store = await reopen()
    assert await claim(store) == []
    await store.make_due()
    delivery = await claim_one(store)
    assert (delivery.attempt, delivery.poison_attempts) == (2, 1)


async def test_what_was_put_back_is_due_at_once_and_not_counted(store: Store) -> None:
    await say(store, "start_realty_2")
    await store.settle(await claim_one(store), Requeue())
    assert (await claim_one(store)).attempt == 1


async def test_a_dead_letter_lets_its_queue_go_on(store: Store) -> None:
    await say(store, "start_realty_2")
    await say(store, "next")
    await store.settle(await claim_one(store), DeadLettered("refused", time.time(), 422, b"no"))
    assert texts(await drain(store)) == ["next"]
    assert (await store.backlog()).waiting == 0


# dead letters


async def give_up_first(store: Store, reason: str = "refused") -> Delivery:
    delivery = await claim_one(store)
    await store.settle(delivery, DeadLettered(reason, NOW + 5, 422, b"no such flat"))
    return delivery


async def test_a_dead_letter_is_stored_whole(reopen: Reopen) -> None:
    store = await reopen()
    inbound = message("start_realty_2", bare_id="3EB0A")
    await accept(store, inbound)
    delivery = await give_up_first(store)
    store = await reopen()
    (listed,) = await store.dead_letters(Selection(), limit=10)
    assert listed.body is None
    letter = await store.dead_letter(listed.id)
    assert letter == DeadLetter(
        id=listed.id,
        tenant=tenant(2),
        user=user(ALI),
        message_id="3EB0A",
        idempotency_key=delivery.idempotency_key,
        arrived=NOW,
        died_at=NOW + 5,
        attempts=1,
        reason="refused",
        status=422,
        answer=b"no such flat",
        body=inbound.body,
    )
    assert await store.dead_letter(listed.id + 1) is None


async def test_dead_letters_come_newest_first_by_tenant_and_user(store: Store) -> None:
    for who, link in ((ALI, 2), (SARA, 3), (OMAR, 2)):
        await say(store, f"start_realty_{link}", user=who)
        await give_up_first(store)

    async def users(which: Selection, **page: int) -> list[str]:
        return [one.user for one in await store.dead_letters(which, **{"limit": 10} | page)]

    assert await users(Selection()) == [OMAR, SARA, ALI]
    assert await users(Selection(tenant=tenant(2))) == [OMAR, ALI]
    assert await users(Selection(user=user(SARA))) == [SARA]
    assert await users(Selection(tenant=tenant(2), user=user(SARA))) == []
    first = await store.dead_letters(Selection(), limit=1)
    assert await users(Selection(), limit=1, before=first[0].id) == [SARA]


async def test_a_replayed_letter_goes_behind_what_waits_with_its_key(store: Store) -> None:
    await say(store, "start_realty_2")
    before = await give_up_first(store)
    await say(store, "second")
    await say(store, "third")
    assert await store.replay(Selection(tenant=tenant(2))) == 1
    assert await store.replay(Selection()) == 0
    assert await store.dead_letters(Selection(), limit=10) == []
    delivered = await drain(store)
    assert texts(delivered) == ["second", "third", "start_realty_2"]
    assert delivered[-1].idempotency_key == before.idempotency_key
    assert (delivered[-1].poison_attempts, delivered[-1].age) == (0, 0.0)
    assert delivered[-1].attempt == 2


async def test_only_what_was_chosen_is_replayed_or_deleted(store: Store) -> None:
    for who, link in ((ALI, 2), (SARA, 3), (OMAR, 4)):
        await say(store, f"start_realty_{link}", user=who)
        await give_up_first(store)
    (alis,) = await store.dead_letters(Selection(user=user(ALI)), limit=1)
    assert await store.replay(Selection(id=alis.id)) == 1
    assert await store.delete_dead_letters(Selection(user=user(SARA))) == 1
    assert [one.user for one in await store.dead_letters(Selection(), limit=10)] == [OMAR]
    assert [one.user for one in await drain(store)] == [ALI]


async def test_very_many_letters_are_replayed(reopen: Reopen) -> None:
    store = await reopen()
    people = [f"97150{number:07}" for number in range(40)]
    for round_ in range(30):
        calls = (say(store, f"start_realty_2 {round_}", user=who) for who in people)
        await asyncio.gather(*calls)
        while claimed := await claim(store):
            await asyncio.gather(*(store.settle(one, DeadLettered("no", NOW)) for one in claimed))
    assert await store.replay(Selection()) == 1200
    order: dict[str, list[str]] = {}
    for delivery in await drain(store):
        order.setdefault(delivery.user, []).extend(texts([delivery]))
    assert order == {who: [f"start_realty_2 {n}" for n in range(30)] for who in people}


async def test_a_letter_follows_its_person_to_another_id(store: Store) -> None:
    await say(store, "start_realty_2", user=LID)
    await give_up_first(store)
    await say(store, "hello", user=ALI, other_id=LID)
    assert len(await store.dead_letters(Selection(user=user(ALI)), limit=10)) == 1
    assert len(await store.dead_letters(Selection(user=user(LID)), limit=10)) == 1
    await store.replay(Selection())
    assert {delivery.user for delivery in await drain(store)} == {ALI}


async def test_unlock_can_drop_what_waits_but_not_what_is_in_flight(store: Store) -> None:
    await say(store, "start_realty_2")
    in_flight = await claim_one(store)
    await say(store, "second")
    await say(store, "third")
    await say(store, "start_realty_2", user=SARA)
    assert await store.unlock(user(ALI), drop_waiting=True) == (ALI, 2, 2)
    assert [one.reason for one in await store.dead_letters(Selection(), limit=10)] == [
        "dropped by an operator's unlock"
    ] * 2
    await store.settle(in_flight, Delivered())
    assert [one.user for one in await drain(store)] == [SARA]
    assert await store.unlock(user(ALI), drop_waiting=True) == (ALI, None, 0)


async def test_the_backlog_counts_by_tenant_the_largest_first(store: Store) -> None:
    await say(store, "start_realty_2")
    await say(store, "start_realty_3", user=SARA)
    await say(store, "more", user=SARA)
    assert list((await store.backlog()).by_tenant.items()) == [(3, 2), (2, 1)]


# the process


async def test_a_claim_ends_with_the_process_and_the_delivery_comes_again(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2")
    await say(store, "next")
    before = await claim_one(store)
    after = await claim_one(await reopen())
    assert after.idempotency_key == before.idempotency_key


async def test_what_is_done_does_not_come_again(reopen: Reopen) -> None:
    store = await reopen()
    await say(store, "start_realty_2")
    await drain(store)
    assert await claim(await reopen()) == []


async def test_claim_waits_for_a_message(store: Store) -> None:
    waiting = asyncio.create_task(claim(store, wait=10))
    await asyncio.sleep(0)
    await say(store, "start_realty_2")
    assert len(await waiting) == 1


async def test_a_backlog_larger_than_memory_keeps_comes_whole_and_in_order(reopen: Reopen) -> None:
    store = await reopen()
    people = [f"97150{number:07}" for number in range(200)]
    for round_ in range(3):
        await asyncio.gather(
            *(
                say(store, f"start_realty_2 {round_}", user=who, raised=NOW + round_)
                for who in people
            )
        )
    store = await reopen()
    assert (await store.backlog()).waiting == 600
    order: dict[str, list[str]] = {}
    for delivery in await drain(store):
        order.setdefault(delivery.user, []).extend(texts([delivery]))
    assert order == {who: [f"start_realty_2 {n}" for n in range(3)] for who in people}


# fair shares and limits


async def test_the_next_slot_goes_to_the_tenant_with_the_fewest_in_flight(store: Store) -> None:
    for number in range(6):
        await say(store, "start_realty_1", user=f"97150000000{number}")
    for number in range(2):
        await say(store, "start_realty_2", user=f"97150000001{number}")
    assert sorted(d.tenant for d in await claim(store, 4)) == [1, 1, 2, 2]
    assert [d.tenant for d in await claim(store, 4)] == [1, 1, 1, 1]


async def test_of_equals_the_one_served_longest_ago_is_next(store: Store) -> None:
    for who, link in [
        ("97150000001", 1),
        ("97150000002", 2),
        ("97150000003", 1),
        ("97150000004", 2),
    ]:
        await say(store, f"start_realty_{link}", user=who)
    served = []
    for _ in range(4):
        delivery = await claim_one(store)
        served.append(delivery.tenant)
        await store.settle(delivery, Delivered())
    assert served == [1, 2, 1, 2]


async def test_the_cap_of_a_tenant_binds_once_half_of_all_is_in_use(reopen: Reopen) -> None:
    store = await reopen(Limits(max_in_flight=8, max_in_flight_per_tenant=2, min_free_disk_bytes=0))
    for number in range(8):
        await say(store, "start_realty_1", user=f"97150000000{number}")
    assert len(await claim(store, 8)) == 4, "alone it may have half of all, beyond its cap"
    for number in range(8):
        await say(store, "start_realty_2", user=f"97150000001{number}")
    assert [d.tenant for d in await claim(store, 4)] == [2, 2]


async def test_a_probe_is_of_the_tenant_probed_longest_ago(store: Store) -> None:
    for link in (1, 2, 3):
        await say(store, f"start_realty_{link}", user=f"9715000000{link}")
    probed = []
    for _ in range(6):
        (probe,) = await claim(store, probe=ALL_TENANTS)
        probed.append(probe.tenant)
        await store.settle(probe, Requeue())
    assert sorted(probed[:3]) == [1, 2, 3]
    assert probed[3:] == probed[:3]


async def test_a_full_backlog_refuses_and_keeps_nothing(reopen: Reopen) -> None:
    store = await reopen(Limits(max_backlog=2, min_free_disk_bytes=0))
    await say(store, "start_realty_1")
    await say(store, "start_realty_2", user=SARA)
    refused = message("start_realty_3", OMAR)
    with pytest.raises(StoreUnavailable, match="MAX_BACKLOG=2"):
        await accept(store, refused)
    assert await tenant_of(store, OMAR) is None
    assert store.health().refusing is not None

    await drain(store)
    assert store.health().refusing is None
    assert (await accept(store, refused)).decision == Bind(tenant(3))


async def test_a_full_backlog_of_one_tenant_refuses_only_its_own(reopen: Reopen) -> None:
    store = await reopen(Limits(max_backlog_per_tenant=1, min_free_disk_bytes=0))
    await say(store, "start_realty_1")
    with pytest.raises(StoreUnavailable, match="of tenant 1 wait, MAX_BACKLOG_PER_TENANT=1"):
        await say(store, "more")
    assert (await say(store, "start_realty_2", user=SARA)).decision == Bind(tenant(2))
    assert store.health().refusing is None


async def test_the_backlog_shows_how_many_wait_and_since_when(store: Store) -> None:
    assert (await store.backlog()).oldest is None
    await say(store, "start_realty_2", now=NOW + 1)
    await say(store, "more", now=NOW + 2)
    backlog = await store.backlog()
    assert (backlog.waiting, backlog.oldest) == (2, NOW + 1)


async def test_what_is_known_is_reported_without_a_write(store: Store) -> None:
    """By either id, as accept() would find it."""
    await say(store, "start_realty_2", user=LID, other_id=ALI, bare_id="A1")
    await say(store, "nobody's yet", user=SARA, bare_id="A2")
    asked = [
        message(user=LID, bare_id="A1"),
        message(user=ALI, bare_id="A1"),
        message(user=SARA, bare_id="A1"),  # ids are chosen by the sender's phone
        message(user=SARA, bare_id="A2"),
        message(user=ALI, bare_id="A3"),
        message(user=ALI, bare_id="A1", session="sales"),
    ]
    for _ in range(2):
        assert await store.are_known(asked) == [True, True, False, True, False, False]
    assert await store.are_known([]) == []


async def test_what_two_people_hold_under_one_id_stays_each_ones_own(store: Store) -> None:
    """The id is chosen by the sender's phone, and which phone the LID is nobody knows."""
    now = time.time()
    await say(store, "from the LID", user=LID, bare_id="3EB0SAME", sent=now, now=now)
    await say(store, "from the phone", user=ALI, bare_id="3EB0SAME", sent=now, now=now)
    assert (await store.backlog()).held >= 1

    await say(store, "start_realty_2", user=LID, sent=now - 1, now=now)
    await say(store, "start_realty_3", user=ALI, sent=now - 1, now=now)
    delivered = {(one.tenant, one.user, texts([one])[0]) for one in await drain(store)}
    assert (2, LID, "from the LID") in delivered
    assert (3, ALI, "from the phone") in delivered
    assert len(delivered) == 4


async def test_an_erasure_frees_the_number_that_was_the_persons_before(store: Store) -> None:
    """Its next owner's link counts, though it is older than what the erased one decided."""
    other = "158764321000099@lid"
    await say(store, "start_realty_2", user=LID, other_id=ALI, sent=NOW, raised=NOW)
    await say(store, "hello", user=LID, other_id=SARA, sent=NOW + 1, raised=NOW + 1)
    assert await tenant_of(store, SARA) == 2
    await store.erase(user(SARA))
    link = message("start_realty_5", other, other_id=ALI, sent=NOW - 5, raised=NOW + 9)
    fresh = await accept(store, link)
    assert fresh.decision == Bind(tenant(5))


async def test_a_copy_that_is_held_under_the_other_id_too_is_delivered_once(store: Store) -> None:
    await hold(store, "hello", 9, bare_id="3EB0A")
    await hold(store, "hello", 9, user=LID, bare_id="3EB0A")
    await store.link_identity(IdentityLink(user(LID), user(ALI), NOW, None))
    assert (await store.lock(user(ALI), tenant(2)))[2] == 1
    assert (await store.backlog()).waiting == 1
    assert (await store.backlog()).held == 0
