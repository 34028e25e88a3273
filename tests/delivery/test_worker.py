"""The courier: a real store, a real backend, a clock of ours where hours pass."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.delivery import attempts as attempts_module
from gateway.delivery import circuit_breaker as breaker_module
from gateway.delivery import worker as delivery_module
from gateway.delivery.backend import Backend, transport
from gateway.delivery.circuit_breaker import CircuitBreaker, Signal
from gateway.delivery.targets import Targets
from gateway.delivery.worker import DeliveryWorker
from gateway.domain.model import ALL_TENANTS, Address, Delivery, Outcome, Selection
from gateway.errors import (
    BackendError,
    BackendRefused,
    BackendUnavailable,
    NotConnected,
    StoreUnavailable,
)
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha import lid_lookup as lids_module
from gateway.waha.client import Waha
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.sessions import Sessions
from tests.conftest import Answer, FakeBackend, Received, no_media, wait_until
from tests.messages import ALI, LID, OMAR, SARA, by_the_rules, message, tenant, user

Start = Callable[..., DeliveryWorker]


def targets(
    url: str, *, timeout: float = 5, tenants: Tenants | None = None, max_in_flight: int = 256
) -> Targets:
    """All tenants at url, but for those with a backend of their own."""
    return Targets(
        Address(url),
        tenants or Tenants(None),
        timeout=timeout,
        transport=transport(max_in_flight * 2),
        max_in_flight=max_in_flight,
    )


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backoff of nothing: how long it is has tests of its own."""
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 0.0)
    monkeypatch.setattr(delivery_module, "_STORE_SECONDS", 0.01)


@pytest.fixture
async def start(store: Store, backend: FakeBackend, lid_lookup: LidLookup) -> AsyncIterator[Start]:
    started: list[DeliveryWorker] = []

    def make(*, url: str | None = None, timeout: float = 5, **how: Any) -> DeliveryWorker:
        to = targets(url or backend.url, timeout=timeout)
        worker = DeliveryWorker(
            store,
            to,
            lid_lookup,
            no_media(),
            Metrics(),
            **{"max_in_flight": 256, "max_age": 86_400.0} | how,
        )
        worker.start()
        started.append(worker)
        return worker

    yield make
    for worker in started:
        await worker.stop(grace=0)


async def say(store: Store, text: str, user: str = ALI, **how: Any) -> None:
    inbound = message(text, user, **how)
    await store.accept(inbound, by_the_rules(inbound))


def texts(received: list[Received], user: str) -> list[str]:
    return [json.loads(one.body)["payload"]["body"] for one in received if one.user == user]


async def emptied(store: Store) -> None:
    """Nothing waits any more."""
    while (await store.backlog()).waiting:
        await asyncio.sleep(0.005)


async def test_once_a_backend_takes_something_again_nobody_waits_for_a_backoff(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered 401 to everything, so no breaker opened, and some wait for minutes by now."""
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    backend.answer = lambda _: 401
    worker = start()
    others = [f"97150000000{n}" for n in range(6)]
    for who in others:
        await say(store, "start_realty_2", who)
    await wait_until(lambda: worker.attempts.failing())
    backend.answer = lambda _: 200
    await say(store, "start_realty_2", ALI)
    await emptied(store)
    assert worker.attempts.failing() == []


async def test_messages_arrive_in_order_one_at_a_time(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    start()
    for number in range(20):
        for who, link in ((ALI, 2), (SARA, 3)):
            await say(store, f"start_realty_{link} {number}", who)
    await asyncio.wait_for(emptied(store), 10)
    for who, link in ((ALI, 2), (SARA, 3)):
        assert texts(backend.received, who) == [f"start_realty_{link} {n}" for n in range(20)]
    assert {(one.user, one.tenant) for one in backend.received} == {(ALI, 2), (SARA, 3)}


async def test_queues_go_in_parallel(store: Store, backend: FakeBackend, start: Start) -> None:
    backend.may_answer.clear()
    start()
    for who in (ALI, SARA, OMAR):
        await say(store, "start_realty_2", who)
        await say(store, "next", who)
    await wait_until(lambda: len(backend.received) == 3)
    assert {one.user for one in backend.received} == {ALI, SARA, OMAR}
    backend.may_answer.set()
    await wait_until(lambda: len(backend.received) == 6)


async def test_a_failing_message_comes_again_and_holds_back_only_its_user(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    failures = 3

    def fails_ali_first(one: Received) -> int:
        nonlocal failures
        if one.user == ALI and failures:
            failures -= 1
            return 503
        return 200

    backend.answer = fails_ali_first
    start()
    await say(store, "start_realty_2")
    await say(store, "next")
    await say(store, "start_realty_2", SARA)
    await asyncio.wait_for(emptied(store), 10)
    assert texts(backend.received, ALI) == ["start_realty_2"] * 4 + ["next"]
    alis = [one for one in backend.received if one.user == ALI]
    assert len({one.key for one in alis[:4]}) == 1
    assert [one.headers["X-Delivery-Attempt"] for one in alis] == ["1", "2", "3", "4", "1"]


async def test_a_refusal_is_a_dead_letter_and_the_queue_goes_on(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.answer = lambda one: 422 if b"start_realty" in one.body else 200
    start()
    await say(store, "start_realty_2")
    await say(store, "next")
    await asyncio.wait_for(emptied(store), 10)
    assert texts(backend.received, ALI) == ["start_realty_2", "next"]


async def test_after_twelve_own_faults_it_is_a_dead_letter(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    """Others get through between any two attempts, this one never does."""

    async def fails_poison(one: Received) -> int:
        if one.user == SARA:
            return 200
        await say(store, "start_realty_2", SARA)
        while (await store.backlog()).waiting > 1:
            await asyncio.sleep(0.001)
        return 500

    backend.answer = fails_poison
    start()
    await say(store, "start_realty_2 poison")
    await asyncio.wait_for(emptied(store), 10)
    (letter,) = await store.dead_letters(Selection(), limit=10)
    assert (letter.attempts, letter.status) == (12, 500)
    assert texts(backend.received, ALI) == ["start_realty_2 poison"] * 12


async def test_a_backend_that_fails_everybody_makes_no_dead_letters(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.answer = lambda one: 500
    worker = start()
    for number in range(12):
        await say(store, f"start_realty_{number % 3 + 1}", f"97150000{number:04}")
    await wait_until(lambda: worker.targets.shared.breaker.is_open)
    backend.answer = lambda one: 200
    await asyncio.wait_for(emptied(store), 10)
    assert not worker.targets.shared.breaker.is_open
    assert len({one.user for one in backend.received}) == 12


async def test_an_outage_is_nobodys_fault_and_burns_no_attempts(
    store: Store, backend: FakeBackend, start: Start, unused_port: int
) -> None:
    worker = start(url=f"http://127.0.0.1:{unused_port}")
    for who in (ALI, SARA, OMAR):
        await say(store, "start_realty_2", who)
    await wait_until(lambda: worker.targets.shared.breaker.is_open)
    worker.stop_claiming()
    await wait_until(lambda: worker.in_flight == 0)
    store.set_claimable(ALL_TENANTS, None)
    claimed = await store.claim(10, wait=5)
    assert {one.user for one in claimed} == {ALI, SARA, OMAR}
    # Two failures came before it was clear that the backend is away.
    assert sum(one.attempt - 1 for one in claimed) == 2
    assert sum(one.poison_attempts for one in claimed) == 0


@pytest.fixture
async def unused_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def test_too_old_is_a_dead_letter_but_not_for_waiting(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    wall, steady = 1_782_900_000.0, 0.0
    attempts = 0

    def fails_for_hours(one: Received) -> int:
        nonlocal steady, wall, attempts
        if b"poison" not in one.body:
            return 200
        attempts += 1
        steady += 3600
        wall += 3600
        return 503

    backend.answer = fails_for_hours
    start(max_age=5 * 3600.0 - 1, clock=lambda: wall, monotonic=lambda: steady)
    wall += 7 * 86_400  # a week in the store, before its first attempt
    await say(store, "start_realty_2 poison")
    await say(store, "next")
    await wait_until(lambda: "next" in texts(backend.received, ALI))
    assert attempts == 5


async def test_retry_after_of_nothing_is_no_shorter_than_the_backoff(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    backend.answer = lambda _: web.Response(status=503, headers={"Retry-After": "0"})
    worker = start()
    await say(store, "start_realty_2")
    await wait_until(lambda: backend.received and not worker.in_flight)
    assert await store.claim(10, wait=0) == []


async def test_retry_after_holds_back_the_queue(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    def asks_ali_to_wait(one: Received) -> web.Response:
        if one.user == SARA:
            return web.Response()
        return web.Response(status=429, headers={"Retry-After": "3600"})

    backend.answer = asks_ali_to_wait
    start()
    await say(store, "start_realty_2")
    await wait_until(lambda: backend.received)
    await say(store, "start_realty_2", SARA)
    await wait_until(lambda: len(backend.received) == 2)
    assert [one.user for one in backend.received] == [ALI, SARA]
    assert await store.claim(10, wait=0) == []


class Flaky:
    """A store whose settle fails a few times."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.failures = 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("disk")
        await self.store.settle(delivery, outcome)


async def test_an_outcome_is_settled_until_the_store_takes_it(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup
) -> None:
    to = targets(backend.url)
    worker = DeliveryWorker(
        Flaky(store), to, lid_lookup, no_media(), Metrics(), max_in_flight=10, max_age=86_400
    )
    worker.start()
    await say(store, "start_realty_2")
    await asyncio.wait_for(emptied(store), 10)
    assert len(backend.received) == 1
    await worker.stop(grace=1)


async def test_an_unforeseen_error_settles_its_delivery_and_the_worker_goes_on(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = 2
    post = Backend.post

    async def stumbling(self: Backend, delivery: Delivery) -> None:
        nonlocal fails
        if fails:
            fails -= 1
            raise ZeroDivisionError
        await post(self, delivery)

    monkeypatch.setattr(Backend, "post", stumbling)
    start()
    await say(store, "start_realty_2")
    await asyncio.wait_for(emptied(store), 10)
    assert backend.received[0].headers["X-Delivery-Attempt"] == "3"


async def test_stop_lets_what_is_in_flight_finish_and_begins_nothing(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.may_answer.clear()
    worker = start()
    await say(store, "start_realty_2")
    await say(store, "next")
    await wait_until(lambda: backend.received)
    stopping = asyncio.create_task(worker.stop(grace=10))
    await asyncio.sleep(0)
    backend.may_answer.set()
    await stopping
    assert texts(backend.received, ALI) == ["start_realty_2"]
    assert (await store.backlog()).waiting == 1


async def test_what_does_not_finish_in_time_stays_in_the_store(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.may_answer.clear()
    worker = start()
    await say(store, "start_realty_2")
    await wait_until(lambda: backend.received)
    await worker.stop(grace=0.05)
    assert (await store.backlog()).waiting == 1


async def test_no_more_than_max_in_flight_are_at_the_backend(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.may_answer.clear()
    start(max_in_flight=2)
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(lambda: len(backend.received) == 2)
    await say(store, "start_realty_2", SARA)
    await asyncio.sleep(0.05)  # time enough for a third one to come by mistake
    assert len(backend.received) == 2
    backend.may_answer.set()
    await wait_until(lambda: len(backend.received) == 6)


async def test_an_open_breaker_lets_one_probe_through_and_closes_for_all(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    backend.answer = lambda _: 500
    worker = start()
    people = [f"97150000{number:04}" for number in range(12)]
    for number, who in enumerate(people):
        await say(store, f"start_realty_{number % 3 + 1}", who)
    await wait_until(lambda: worker.targets.shared.breaker.is_open and worker.in_flight == 0)
    before = len(backend.received)
    backend.may_answer.clear()
    await wait_until(lambda: len(backend.received) == before + 1)
    await asyncio.sleep(0.05)  # time enough for a second one to come by mistake
    assert len(backend.received) == before + 1
    backend.answer = lambda _: 200
    backend.may_answer.set()
    await asyncio.wait_for(emptied(store), 10)


async def test_when_the_breaker_closes_all_backoffs_end(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    backend.answer = lambda _: 500
    worker = start()
    for number in range(9):
        await say(store, f"start_realty_{number % 3 + 1}", f"97150000{number:04}")
    await wait_until(lambda: len(backend.received) == 9 and worker.in_flight == 0)
    assert not worker.targets.shared.breaker.is_open
    await say(store, "start_realty_1", SARA)  # the tenth failure closes it
    await wait_until(lambda: worker.targets.shared.breaker.is_open)
    backend.answer = lambda _: 200
    await asyncio.wait_for(emptied(store), 10)


@pytest.mark.parametrize(
    ("error", "sign"),
    [
        (NotConnected("no"), Signal.NO_CONNECTION),
        (BackendUnavailable("no answer"), Signal.FAILURE),
        (BackendUnavailable("x", status=404), Signal.FAILURE),
        (BackendUnavailable("x", status=500), Signal.FAILURE),
        (BackendUnavailable("x", status=599), Signal.FAILURE),
        (BackendUnavailable("x", status=401), Signal.ANSWER),
        (BackendUnavailable("x", status=429), Signal.ANSWER),
        (BackendUnavailable("x", status=302), Signal.ANSWER),
        (BackendRefused("x", status=422), Signal.ANSWER),
    ],
)
def test_what_a_failure_says_of_the_backend(error: BackendError, sign: Signal) -> None:
    assert delivery_module._signal_of(error) is sign


async def test_the_age_leaves_out_an_open_breaker_and_what_was_before_our_start(
    store: Store, backend: FakeBackend, start: Start
) -> None:
    wall, steady = 1_782_900_000.0, 0.0
    worker = start(clock=lambda: wall, monotonic=lambda: steady)
    wall, steady = wall + 100, 100.0
    for _ in range(3):
        worker.targets.shared.breaker.record(Signal.NO_CONNECTION, user(ALI), tenant(1), 20.0)
    worker.targets.shared.breaker.record(Signal.SUCCESS, user(ALI), tenant(1), 50.0)
    assert worker._seconds_closed(tenant(2), worker.targets.shared, wall - 10, wall) == 10
    assert worker._seconds_closed(tenant(2), worker.targets.shared, wall - 90, wall) == 60
    assert worker._seconds_closed(tenant(2), worker.targets.shared, wall - 86_400, wall) == 70


async def test_the_first_delivery_of_a_lid_waits_for_its_phone(
    store: Store, backend: FakeBackend, start: Start, waha: StandIn
) -> None:
    waha.phones["158764321000005"], waha.delay = ALI, 0.2
    start()
    await say(store, "start_realty_2", LID)
    await say(store, "next", LID)
    await say(store, "start_realty_2", SARA)
    await wait_until(lambda: len(backend.received) == 3)
    first = backend.received[0]
    assert first.user == SARA, "nobody else waits"
    assert [(one.user, one.headers["X-User-Alias"]) for one in backend.received[1:]] == [
        (ALI, LID)
    ] * 2
    assert texts(backend.received, ALI) == ["start_realty_2", "next"]
    assert {one.headers["X-Delivery-Attempt"] for one in backend.received} == {"1"}


@pytest.mark.parametrize("waha_is", ["slow", "ignorant", "away"])
async def test_a_lid_that_waha_does_not_report_is_delivered_under_the_lid(
    store: Store,
    backend: FakeBackend,
    start: Start,
    waha: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    waha_is: str,
) -> None:
    monkeypatch.setattr(lids_module, "MAX_WAIT_SECONDS", 0.2)
    if waha_is == "slow":
        waha.delay = 30
    if waha_is == "away":
        waha.retry_after, waha.statuses["default"] = 0.0, "STOPPED"
    start()
    await say(store, "start_realty_2", LID)
    await say(store, "next", LID)
    await wait_until(lambda: len(backend.received) == 2)
    assert texts(backend.received, LID) == ["start_realty_2", "next"]
    assert len(waha.asked) == 1


async def test_a_lid_is_delivered_though_waha_fails_and_nothing_is_held(
    store: Store, backend: FakeBackend, waha: StandIn, client: Waha, sessions: Sessions
) -> None:
    """With HOLD_SECONDS=0 it was put back for ever, as fast as the processor could."""
    waha.odd_answer = lambda: web.Response(status=503)
    lid_lookup = LidLookup(
        client,
        store,
        sessions,
        OwnNumbers("971557357753", Tenants(None), sessions),
        Metrics(),
        home_session="default",
        keep_asking=0,
    )
    to = targets(backend.url)
    worker = DeliveryWorker(
        store, to, lid_lookup, no_media(), Metrics(), max_in_flight=10, max_age=86_400
    )
    worker.start()
    await say(store, "start_realty_2", LID)
    await wait_until(lambda: backend.received)
    assert len(waha.asked) <= 2
    await worker.stop(grace=1)
    await lid_lookup.stop()


async def test_waiting_for_a_phone_is_no_probe(
    store: Store,
    backend: FakeBackend,
    start: Start,
    waha: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It doubled the time to the next probe, and with twelve LIDs none came through for minutes."""
    monkeypatch.setattr(breaker_module, "_FIRST_PROBE_SECONDS", 0.05)
    probes = []
    start_probe = CircuitBreaker.start_probe

    def counted(self: CircuitBreaker, now: float) -> None:
        probes.append(now)
        start_probe(self, now)

    monkeypatch.setattr(CircuitBreaker, "start_probe", counted)
    waha.phones["158764321000005"], waha.delay = ALI, 0.3
    worker = start()
    for _ in range(3):
        worker.targets.shared.breaker.record(
            Signal.NO_CONNECTION, user(SARA), tenant(3), time.monotonic()
        )
    assert worker.targets.shared.breaker.is_open
    await say(store, "start_realty_2", LID)
    await wait_until(lambda: backend.received)
    assert (len(probes), backend.received[0].user) == (1, ALI)
    await wait_until(lambda: not worker.targets.shared.breaker.is_open)


async def test_what_is_no_longer_ours_is_not_sent(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Delivery] = []

    def lost(delivery: Delivery) -> bool:
        asked.append(delivery)
        return False

    with monkeypatch.context() as without_lease:
        without_lease.setattr(store, "may_send", lost)
        start()
        await say(store, "start_realty_2")
        await wait_until(lambda: len(asked) > 1)
        assert backend.received == []
    await wait_until(lambda: backend.received)
    assert backend.received[0].headers["X-Delivery-Attempt"] == "1"


FAULTS: dict[str, Callable[[], Answer]] = {
    "500": lambda: 500,
    "401": lambda: 401,
    "429": lambda: web.Response(status=429, headers={"Retry-After": "600"}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("users", [1, 30])
async def test_a_fault_of_one_tenant_is_not_judged_by_what_others_get_through(
    store: Store,
    backend: FakeBackend,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    users: int,
) -> None:
    """30 of 30 messages were dead letters within 3 s, each after a dozen attempts."""
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    backend.answer = lambda one: FAULTS[fault]() if one.tenant == 2 else 200
    worker = start()
    people = [f"9715000000{number:02}" for number in range(users)]
    for number in range(max(users, 6)):
        await say(store, "start_realty_2", people[number % users])
    for number in range(60):
        await say(store, "start_realty_1", f"9715100000{number:02}")
    await wait_until(lambda: sum(one.tenant == 1 for one in backend.received) == 60)
    tried = [one.user for one in backend.received if one.tenant == 2]
    assert sorted(tried) == people, "each waits for its own backoff, whatever tenant 1 does"
    assert await store.dead_letters(Selection(), limit=1) == []
    if users > 1:
        assert [one.tenant for one in worker.attempts.failing()] == [2]


async def test_attempts_of_a_tenant_whose_every_message_fails_are_nobodys_fault(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 0.02)
    backend.answer = lambda one: 500 if one.tenant == 2 else 200
    start()
    for number in range(5):
        await say(store, "start_realty_2", f"9715000000{number:02}")
    while sum(one.tenant == 2 for one in backend.received) < 5 * 20:
        await say(store, "start_realty_1")
        await asyncio.sleep(0.001)
    assert await store.dead_letters(Selection(), limit=1) == []
    backend.answer = lambda _: 200
    await asyncio.wait_for(emptied(store), 10)


async def test_what_its_own_fault_holds_back_is_not_hurried_by_others(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when its tenant works again; after that it waits for its own backoff."""
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    monkeypatch.setattr(attempts_module, "_SPACING_SECONDS", 0.0)
    backend.answer = lambda one: 500 if one.user != SARA else 200
    start()
    people = [f"9715000000{number:02}" for number in range(7)]
    for who in people:
        await say(store, "start_realty_2", who)
    await wait_until(lambda: len(backend.received) == 7)
    for number in range(30):
        await say(store, f"start_realty_2 {number}", SARA)
    await wait_until(lambda: len(texts(backend.received, SARA)) == 30)
    await wait_until(lambda: all(len(texts(backend.received, who)) == 2 for who in people))
    await say(store, "start_realty_2 at last", SARA)
    await wait_until(lambda: len(texts(backend.received, SARA)) == 31)
    assert all(len(texts(backend.received, who)) == 2 for who in people)


async def test_a_retry_after_outlasts_the_breaker(
    store: Store, backend: FakeBackend, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backend was there, and asked this tenant alone to wait; others waited for the breaker."""
    monkeypatch.setattr(delivery_module, "_backoff", lambda attempt: 3600.0)
    asks = web.Response(status=429, headers={"Retry-After": "600"})
    backend.answer = lambda one: asks if one.tenant == 5 else 500
    worker = start()
    for number, who in ((5, ALI), (2, SARA)):
        await say(store, f"start_realty_{number}", who)
    await wait_until(lambda: len(backend.received) == 2 and not worker.in_flight)
    backend.answer = lambda _: 200
    breaker = worker.targets.shared.breaker
    for _ in range(3):
        breaker.record(Signal.NO_CONNECTION, user(OMAR), tenant(3), time.monotonic())
    assert breaker.is_open
    breaker.record(Signal.SUCCESS, user(OMAR), tenant(3), time.monotonic())
    await wait_until(lambda: len(backend.received) == 3)
    assert backend.received[2].user == SARA
    await asyncio.sleep(0.2)  # time enough for the other one to come by mistake
    assert len(backend.received) == 3
