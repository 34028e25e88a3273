"""Which phone a LID is: asked of WAHA beside the messages' way, harmless whatever it answers."""

import asyncio
import logging
import time
from collections.abc import Callable

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.domain.model import UserId
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha import client as client_module
from gateway.waha import lid_lookup as lids_module
from gateway.waha.client import Waha
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.sessions import Sessions
from tests.conftest import wait_until
from tests.messages import ALI, LID, SARA, by_the_rules, message, parse, user, webhook

NUMBER = LID.removesuffix("@lid")


async def say(store: Store, text: str, who: str = ALI) -> None:
    inbound = message(text, who, sent=time.time(), now=time.time())
    await store.accept(inbound, by_the_rules(inbound))


async def known_as(store: Store, who: str) -> str:
    return (await store.lock_of(user(who)))[0]


async def answered(lid_lookup: LidLookup, lid: str = LID) -> None:
    await wait_until(lambda: not lid_lookup.is_being_asked(user(lid)))


async def test_a_hit_is_stored_and_not_asked_for_again(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.phones[NUMBER] = ALI
    await say(store, "start_realty_2")
    await say(store, "by lid", LID)
    lid_lookup.ask(user(LID))
    lid_lookup.ask(user(LID))
    await answered(lid_lookup)
    assert await known_as(store, LID) == ALI
    assert len(await store.claim(10, wait=0)) == 1, "one line, its head"
    assert (await store.backlog()).waiting == 2, "what the LID said was released"
    lid_lookup.ask(user(LID))
    assert waha.asked == [("default", LID)]


async def test_a_newer_identity_link_wins_over_the_answer(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.phones[NUMBER] = ALI
    lid_lookup.ask(user(LID))
    await answered(lid_lookup)
    later = parse(webhook("hello", LID, other_id=SARA, sent=time.time() + 5), now=time.time() + 5)
    await store.accept(later, by_the_rules(later))
    assert await known_as(store, LID) == SARA


async def test_a_identity_link_that_came_while_waha_thought_is_newer(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.phones[NUMBER], waha.delay = ALI, 0.3
    lid_lookup.ask(user(LID))
    await wait_until(lambda: waha.asked)
    now = time.time()
    seen = parse(webhook("hello", LID, other_id=SARA, sent=now), now=now)
    await store.accept(seen, by_the_rules(seen))
    await answered(lid_lookup)
    assert await known_as(store, LID) == SARA


async def test_a_miss_is_asked_for_again_after_an_hour(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    clock = [0.0]
    lid_lookup = make(store, client, sessions, lambda: clock[0])
    for clock[0], times in ((0.0, 1), (3599.0, 1), (3601.0, 2)):
        lid_lookup.ask(user(LID))
        await answered(lid_lookup)
        assert len(waha.asked) == times
    assert await known_as(store, LID) == LID
    await lid_lookup.stop()


def make(
    store: Store,
    client: Waha,
    sessions: Sessions,
    monotonic: Callable[[], float] = time.monotonic,
    keep_asking: float = 900,
    metrics: Metrics | None = None,
) -> LidLookup:
    return LidLookup(
        client,
        store,
        sessions,
        OwnNumbers("971557357753", Tenants(None), sessions),
        metrics or Metrics(),
        home_session="default",
        keep_asking=keep_asking,
        monotonic=monotonic,
    )


@pytest.mark.parametrize("own", ["971557357753", "971501230000"])
async def test_the_gateways_own_number_is_nobodys_phone(
    lid_lookup: LidLookup, store: Store, waha: StandIn, sessions: Sessions, own: str
) -> None:
    sessions.hear(message("hello"))  # its `me` is 971501230000
    waha.phones[NUMBER] = own
    lid_lookup.ask(user(LID))
    await answered(lid_lookup)
    assert await known_as(store, LID) == LID
    assert await known_as(store, own) == own


async def test_the_session_is_in_the_question_and_in_what_is_stored(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.phones[NUMBER] = ALI
    lid_lookup.ask(user(f"sales/{LID}"))
    await answered(lid_lookup, f"sales/{LID}")
    assert waha.asked == [("sales", LID)]
    assert await known_as(store, f"sales/{LID}") == f"sales/{ALI}"
    assert await known_as(store, LID) == LID


def no_such_engine() -> web.Response:
    return web.json_response({"message": "not implemented"}, status=501)


@pytest.mark.parametrize("refusal", ["store", "key", "engine"])
async def test_a_refusal_counts_as_a_miss_and_is_reported_once(
    lid_lookup: LidLookup,
    store: Store,
    waha: StandIn,
    caplog: pytest.LogCaptureFixture,
    refusal: str,
) -> None:
    waha.has_store = refusal != "store"
    waha.key = "the key" if refusal == "key" else ""
    waha.odd_answer = no_such_engine if refusal == "engine" else None
    for lid in (LID, "158764321000099@lid"):
        lid_lookup.ask(user(lid))
        await answered(lid_lookup, lid)
    assert len(waha.asked) == 2
    assert [one.levelno for one in caplog.records] == [logging.WARNING]
    assert await known_as(store, LID) == LID


async def test_a_failure_is_repeated_until_there_is_an_answer(
    lid_lookup: LidLookup, store: Store, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lids_module, "_REST_SECONDS", 0.02)
    waha.phones[NUMBER], waha.retry_after, waha.statuses["default"] = ALI, 0.0, "STARTING"
    lid_lookup.ask(user(LID))
    await wait_until(lambda: len(waha.asked) >= 3)
    assert lid_lookup.is_being_asked(user(LID))
    waha.statuses.clear()
    await answered(lid_lookup)
    assert await known_as(store, LID) == ALI


async def test_a_failure_is_given_up_in_the_end_and_may_be_asked_again(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    waha.retry_after, waha.statuses["default"] = 0.0, "FAILED"
    lid_lookup = make(store, client, sessions, keep_asking=0)
    lid_lookup.ask(user(LID))
    await answered(lid_lookup)
    lid_lookup.ask(user(LID))
    assert lid_lookup.is_being_asked(user(LID))
    await lid_lookup.stop()


async def test_while_a_session_fails_its_lids_are_not_waited_for_and_others_are_asked(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.retry_after, waha.statuses["default"] = 0.0, "FAILED"
    waha.phones[NUMBER] = ALI
    assert lid_lookup.ask_and_expect(user(LID))
    await wait_until(lambda: not lid_lookup.ask_and_expect(user(LID)))
    assert not lid_lookup.ask_and_expect(user("158764321000099@lid"))
    assert len(waha.asked) == 1
    lid_lookup.ask(user(f"sales/{LID}"))
    await answered(lid_lookup, f"sales/{LID}")
    assert await known_as(store, f"sales/{LID}") == f"sales/{ALI}"


async def test_an_answer_is_waited_for_two_seconds_and_no_longer(
    lid_lookup: LidLookup, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lids_module, "MAX_WAIT_SECONDS", 0.1)
    waha.delay = 5
    assert lid_lookup.ask_and_expect(user(LID))
    await asyncio.wait_for(lid_lookup.wait_for(user(LID)), 3)
    assert lid_lookup.is_being_asked(user(LID))
    assert not lid_lookup.ask_and_expect(user(LID))
    assert not lid_lookup.ask_and_expect(user("158764321000099@lid")), (
        "nor for the next one, for a while"
    )


async def test_a_hundred_lids_are_asked_for_a_few_at_a_time(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    at_once, most = 0, 0
    phone_of = Waha.phone_of

    async def counted(self: Waha, session: str, lid: str) -> str | None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await phone_of(self, session, lid)
        finally:
            at_once -= 1

    many = [UserId(f"15876432100{n:04}@lid") for n in range(100)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Waha, "phone_of", counted)
        for lid in many:
            lid_lookup.ask(lid)
        await wait_until(lambda: not any(map(lid_lookup.is_being_asked, many)))
    assert (len(waha.asked), most) == (100, 8)


async def test_what_was_held_when_the_process_ended_is_asked_for_at_the_start(
    lid_lookup: LidLookup, store: Store, waha: StandIn
) -> None:
    waha.phones[NUMBER] = ALI
    await say(store, "start_realty_2")
    await say(store, "by lid", LID)
    await lid_lookup.start()
    await answered(lid_lookup)
    assert (await store.backlog()).waiting == 2


async def test_a_slow_waha_is_not_waited_for_when_we_end(
    lid_lookup: LidLookup, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT_SECONDS", 60)
    waha.delay = 60
    lid_lookup.ask(user(LID))
    await wait_until(lambda: waha.asked)
    await asyncio.wait_for(lid_lookup.stop(), 3)


async def test_after_a_minute_nobody_waits_for_an_answer_any_more(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    waha.retry_after, waha.statuses["default"] = 0.0, "FAILED"
    clock = [0.0]
    lid_lookup = make(store, client, sessions, lambda: clock[0])
    lid_lookup.ask(user(LID))
    assert lid_lookup.is_being_asked(user(LID))
    clock[0] = 61.0
    assert not lid_lookup.is_being_asked(user(LID))
    await lid_lookup.stop()


@pytest.mark.parametrize(
    ("outcome", "phone", "status"),
    [("found", ALI, 200), ("unknown", None, 200), ("refused", None, 501), ("failed", None, 503)],
)
async def test_each_outcome_is_counted(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions,
    outcome: str, phone: str | None, status: int,
) -> None:  # fmt: skip
    waha.phones = {NUMBER: phone} if phone else {}
    waha.odd_answer = None if status == 200 else lambda: web.Response(status=status)
    metrics = Metrics()
    lid_lookup = make(store, client, sessions, metrics=metrics)
    lid_lookup.ask(user(LID))
    name = "gateway_lid_lookups_total"
    await wait_until(lambda: metrics.value(name, outcome=outcome))
    assert metrics.value(name, outcome=outcome) == 1
    await lid_lookup.stop()


async def test_what_is_asked_for_more_than_an_hour_is_one_question(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    waha.retry_after, waha.statuses["default"] = 0.0, "FAILED"
    clock = [0.0]
    lid_lookup = make(store, client, sessions, lambda: clock[0], keep_asking=7200)
    for clock[0] in (0.0, 3700.0, 7100.0):
        lid_lookup.ask(user(LID))
    assert len(lid_lookup._tasks) == 1
    await lid_lookup.stop()


async def test_an_answer_about_who_was_erased_is_not_stored(
    store: Store, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    waha.phones[NUMBER], waha.delay = ALI, 0.2
    lid_lookup = make(store, client, sessions)
    lid_lookup.ask(user(LID))
    await wait_until(lambda: waha.asked)
    await store.erase(user(LID))
    lid_lookup.forget(user(LID))
    await wait_until(lambda: not lid_lookup._questions)
    assert (await store.export(user(ALI))).ids == (ALI,)
    waha.delay = 0.0
    lid_lookup.ask(user(LID))  # who comes again is asked for again
    await wait_until(lambda: not lid_lookup._questions)
    assert (await store.export(user(ALI))).ids == (ALI, LID)
    await lid_lookup.stop()
