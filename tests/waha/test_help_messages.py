"""Help for those without a lock: one text, after a while, rarely, and only if it is needed."""

import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.domain.model import UserId
from gateway.errors import StoreUnavailable, WahaUnavailable
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.waha import client as client_module
from gateway.waha import help_messages as help_module
from gateway.waha import lid_lookup as lids_module
from gateway.waha.client import Waha
from gateway.waha.help_messages import HelpMessages
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.sessions import Sessions
from tests.conftest import wait_until
from tests.messages import ALI, LID, SARA, by_the_rules, example, message, parse, user

Make = Callable[..., HelpMessages]
TEXT = "please open the link"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_DELAY_SECONDS", "_CHECK_SECONDS", "_RETRY_SECONDS"):
        monkeypatch.setattr(help_module, name, 0.02)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def counted(metrics: Metrics) -> dict[str, float]:
    """By outcome, those that were."""
    outcomes = ("queued", "sent", "perhaps", "not_needed", "refused", "failed", "too_late")
    name = "gateway_help_messages_total"
    found = {outcome: metrics.value(name, outcome=outcome) for outcome in outcomes}
    return {outcome: count for outcome, count in found.items() if count}


@pytest.fixture
async def make(
    store: Store, client: Waha, sessions: Sessions, lid_lookup: LidLookup, metrics: Metrics
) -> AsyncIterator[Make]:
    made: list[HelpMessages] = []

    def of(**how: Any) -> HelpMessages:
        settings: dict[str, Any] = {
            "text": TEXT,
            "per_minute": 6000,
            "home_session": "default",
        } | how
        made.append(HelpMessages(client, store, sessions, lid_lookup, metrics, **settings))
        return made[-1]

    yield of
    for one in made:
        await one.stop()


async def write(helper: HelpMessages, store: Store, who: str = ALI, text: str = "hello") -> None:
    """Somebody writes, as ingest takes it."""
    now = time.time()
    session, _, number = who.rpartition("/")
    inbound = message(text, number, sent=now, now=now, session=session or "default")
    may_help = helper.why_not(inbound) is None
    accepted = await store.accept(inbound, by_the_rules(inbound, may_help=may_help))
    if accepted.help_waits:
        helper.queue(accepted.user, now)


def chats(waha: StandIn) -> list[str]:
    return [one["chatId"] for one in waha.sent]


async def idle(helper: HelpMessages) -> None:
    await wait_until(lambda: not helper._tasks)


async def test_a_user_without_a_lock_is_helped_once(
    make: Make, store: Store, waha: StandIn
) -> None:
    helper = make()
    for _ in range(3):
        await write(helper, store)
    await idle(helper)
    await write(helper, store)
    await idle(helper)
    assert waha.sent == [{"session": "default", "chatId": f"{ALI}@c.us", "text": TEXT}]


async def test_it_goes_out_by_the_session_that_the_user_wrote_to(
    make: Make, store: Store, waha: StandIn
) -> None:
    helper = make()
    await write(helper, store, f"sales/{ALI}")
    await write(helper, store, ALI)
    await idle(helper)
    assert sorted(one["session"] for one in waha.sent) == ["default", "sales"]


async def test_who_comes_by_a_link_meanwhile_is_reported_nothing(
    make: Make, store: Store, waha: StandIn, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help_module, "_DELAY_SECONDS", 0.2)
    helper = make()
    await write(helper, store)
    await write(helper, store, text="start_realty_2")
    await idle(helper)
    assert waha.sent == []
    assert counted(metrics) == {"queued": 1, "not_needed": 1}


async def test_a_lid_is_reported_when_waha_has_said_who_it_is(
    make: Make, store: Store, waha: StandIn, lid_lookup: LidLookup
) -> None:
    waha.phones[LID.removesuffix("@lid")], waha.delay = ALI, 0.3
    helper = make()
    await write(helper, store, text="start_realty_2")
    await write(helper, store, LID)
    lid_lookup.ask(user(LID))
    await idle(helper)
    assert waha.sent == [], "it is Ali, who has a lock"

    waha.delay = 0
    await write(helper, store, "158764321000099@lid")
    lid_lookup.ask(user("158764321000099@lid"))
    await idle(helper)
    assert chats(waha) == ["158764321000099@lid"]


def status(value: str) -> bytes:
    reported = f'"status":"{value}","statuses"'
    return example(30).replace(b'"status":"WORKING","statuses"', reported.encode())


async def test_while_the_session_is_not_working_it_waits_and_others_do_not(
    make: Make, store: Store, waha: StandIn, sessions: Sessions
) -> None:
    helper = make()
    sessions.hear(parse(status("SCAN_QR_CODE")))
    await write(helper, store, ALI)
    await write(helper, store, f"sales/{SARA}")
    await wait_until(lambda: waha.sent)
    assert chats(waha) == [f"{SARA}@c.us"]
    assert helper._tasks
    sessions.hear(parse(status("WORKING")))
    await idle(helper)
    assert chats(waha) == [f"{SARA}@c.us", f"{ALI}@c.us"]


async def test_after_ten_minutes_it_is_dropped(
    make: Make,
    store: Store,
    waha: StandIn,
    sessions: Sessions,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(help_module, "HELP_SECONDS", 1.5)
    sessions.hear(parse(status("FAILED")))
    helper = make()
    await write(helper, store)
    await idle(helper)
    assert waha.sent == []
    assert counted(metrics) == {"queued": 1, "too_late": 1}


async def test_sends_are_spread_evenly(
    make: Make, store: Store, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = make(per_minute=600)
    at: list[float] = []
    send = Waha.send_text

    async def timed(self: Waha, *what: str) -> None:
        at.append(time.monotonic())
        await send(self, *what)

    monkeypatch.setattr(Waha, "send_text", timed)
    for number in range(5):
        await write(helper, store, f"97150123450{number}")
    await idle(helper)
    assert len(waha.sent) == 5
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert sum(gaps) >= 0.95 * 0.4


async def test_more_than_can_go_in_time_are_not_queued(
    make: Make, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help_module, "_DELAY_SECONDS", 30)  # on a slow day one was sent meanwhile
    helper = make(per_minute=1)
    for number in range(12):
        await write(helper, store, f"9715012345{number:02}")
    assert len(helper._tasks) == 10
    assert len(await store.help_waits()) == 10
    assert "HELP_PER_MINUTE" in str(helper.why_not(message("hello", sent=time.time())))


@pytest.mark.parametrize(
    ("inbound", "why"),
    [
        (message("hi", event="message.any", own=True), "no message of theirs"),
        (message("hi", event="message.reaction"), "no message of theirs"),
        (message("hi", sent=time.time() - 700, now=time.time()), "older than 10 minutes"),
    ],
)
def test_what_is_answered_by_no_help(make: Make, inbound: Any, why: str) -> None:
    assert why in str(make().why_not(inbound))


async def test_an_empty_text_is_silence(make: Make, store: Store, waha: StandIn) -> None:
    helper = make(text="")
    await write(helper, store)
    assert await store.help_waits() == []


async def test_a_text_that_was_emptied_silences_what_waited(
    make: Make, store: Store, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help_module, "_DELAY_SECONDS", 30)
    before = make()
    await write(before, store)
    await before.stop()
    silent = make(text="")
    await silent.start()
    assert (len(await store.help_waits()), silent._tasks) == (1, set())


async def test_what_is_queued_while_the_one_before_is_sent_is_seen_to(
    make: Make, store: Store, waha: StandIn, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for a restart: the user's task was still there, and ended without a look."""
    waha.odd_answer = lambda: web.Response(status=401)
    begin = store.undo_help

    async def undo(who: UserId, *, retry: bool) -> None:
        await begin(who, retry=retry)
        waha.odd_answer = None
        await write(helper, store)

    monkeypatch.setattr(store, "undo_help", undo)
    helper = make()
    await write(helper, store)
    await idle(helper)
    assert chats(waha) == [f"{ALI}@c.us"]
    assert counted(metrics) == {"queued": 2, "refused": 1, "sent": 1}


async def test_a_lid_that_waha_cannot_report_is_helped_in_the_end(
    make: Make, store: Store, waha: StandIn, lid_lookup: LidLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lids_module, "_LATE_SECONDS", 0.1)
    monkeypatch.setattr(Waha, "phone_of", _failing)
    helper = make()
    await write(helper, store, LID)
    lid_lookup.ask(user(LID))
    await idle(helper)
    assert chats(waha) == [LID]


async def _failing(self: Waha, session: str, lid: str) -> str | None:
    raise WahaUnavailable("500")


async def test_waha_away_is_tried_again_until_it_is_back(
    make: Make, store: Store, waha: StandIn, metrics: Metrics
) -> None:
    waha.odd_answer = lambda: web.Response(status=503)
    helper = make()
    await write(helper, store)
    await wait_until(lambda: "failed" in counted(metrics))
    waha.odd_answer = None
    await idle(helper)
    assert chats(waha) == [f"{ALI}@c.us"]


@pytest.mark.parametrize(("answer", "retry"), [(401, True), (500, False)])
async def test_what_waha_refused_may_be_asked_for_again_and_what_it_may_have_sent_not(
    make: Make, store: Store, waha: StandIn, answer: int, retry: bool
) -> None:
    waha.odd_answer = lambda: web.Response(status=answer)
    helper = make()
    await write(helper, store)
    await idle(helper)
    waha.odd_answer = None
    await write(helper, store)
    await idle(helper)
    assert chats(waha) == [f"{ALI}@c.us"] * retry


async def test_silence_counts_as_sent(
    make: Make, store: Store, waha: StandIn, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT_SECONDS", 0.05)
    waha.delay = 30
    helper = make()
    await write(helper, store)
    await idle(helper)
    waha.delay = 0
    await write(helper, store)
    await idle(helper)
    assert waha.sent == []
    assert counted(metrics) == {"queued": 1, "perhaps": 1}


async def test_what_waited_when_the_process_ended_goes_after_the_start(
    make: Make, store: Store, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help_module, "_DELAY_SECONDS", 30)
    before = make()
    await write(before, store)
    await before.stop()
    monkeypatch.setattr(help_module, "_DELAY_SECONDS", 0.02)
    again = make()
    await again.start()
    await idle(again)
    assert chats(waha) == [f"{ALI}@c.us"]


async def test_what_is_being_sent_at_the_end_is_finished(
    make: Make, store: Store, waha: StandIn
) -> None:
    waha.delay = 0.3
    helper = make()
    await write(helper, store)
    await wait_until(lambda: helper._sending)
    await helper.stop()
    assert chats(waha) == [f"{ALI}@c.us"]


async def test_a_store_that_fails_delays_it(
    make: Make, store: Store, waha: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = store.begin_help
    failures = 2

    async def failing(who: UserId) -> UserId | None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailable("disk")
        return await begin(who)

    monkeypatch.setattr(store, "begin_help", failing)
    helper = make()
    await write(helper, store)
    await idle(helper)
    assert chats(waha) == [f"{ALI}@c.us"]
