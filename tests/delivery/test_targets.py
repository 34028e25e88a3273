"""Tenants with a backend of their own: another address, another circuit breaker, another secret."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
import standardwebhooks
from aiohttp import web
from aiohttp.resolver import AsyncResolver, DefaultResolver

from gateway.delivery import circuit_breaker as breaker_module
from gateway.delivery.circuit_breaker import Signal
from gateway.delivery.targets import Target, Targets
from gateway.delivery.worker import DeliveryWorker
from gateway.domain.model import ALL_TENANTS, Delivery, TenantFilter
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.tenants import registry as tenants_module
from gateway.tenants.registry import Tenants
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.media import Media
from tests.conftest import FakeBackend, no_media, wait_until
from tests.delivery.test_worker import emptied, say, targets
from tests.messages import ALI, OMAR, SARA, tenant, user

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"


async def listening(fake: FakeBackend) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/{path:.*}", fake.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    return runner


def tenants_at(tmp_path: Path, content: dict[str, dict[str, str]]) -> Tenants:
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps(content))
    return Tenants(file)


def worker_of(
    store: Store, lid_lookup: LidLookup, shared: str, tenants: Tenants, *, max_in_flight: int = 10
) -> DeliveryWorker:
    made = DeliveryWorker(
        store,
        targets(shared, tenants=tenants, max_in_flight=max_in_flight, timeout=60),
        lid_lookup,
        no_media(),
        Metrics(),
        max_in_flight=max_in_flight,
        max_age=86_400,
    )
    made.start()
    return made


def target_of(made: Targets, number: int) -> Target:
    found = made.of(tenant(number))
    assert found is not None
    return found[1]


async def test_a_tenants_messages_go_to_its_own_backend_signed_with_its_own_secret(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    own, bare = FakeBackend(), FakeBackend()
    runners = [await listening(own), await listening(bare)]
    tenants = tenants_at(
        tmp_path,
        {
            "2": {"backend_url": f"{own.url}/hook/two", "signing_secret": SECRET},
            "3": {"backend_url": f"{bare.url}/hook/three"},
            "4": {},
        },
    )
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    for number, who in ((2, ALI), (3, SARA), (4, OMAR)):
        await say(store, f"start_realty_{number}", who)
    await emptied(store)
    await worker.stop(grace=1)
    assert [(one.tenant, one.path) for one in own.received] == [(2, "/hook/two")]
    assert [(one.tenant, one.path) for one in bare.received] == [(3, "/hook/three")]
    assert [one.tenant for one in backend.received] == [4]
    received = own.received[0]
    signed = {name.lower(): value for name, value in received.headers.items()}
    standardwebhooks.Webhook(SECRET).verify(received.body, signed)
    assert "webhook-signature" not in {name.lower() for name in bare.received[0].headers}
    for runner in runners:
        await runner.cleanup()


async def test_a_backend_that_is_away_opens_its_own_breaker_only(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    own = FakeBackend()
    runner = await listening(own)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    await runner.cleanup()
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(worker.targets.open_targets)
    assert [target.url for target in worker.targets.open_targets()] == [own.url]
    for number in range(20):
        await say(store, "start_realty_3", f"97150000010{number:02}")
    await wait_until(lambda: len(backend.received) == 20)
    assert (await store.backlog()).by_tenant == {2: 5}
    site = own.url.rpartition(":")[2]
    app = web.Application()
    app.router.add_post("/{path:.*}", own.take)
    again = web.AppRunner(app, shutdown_timeout=0.1)
    await again.setup()
    await web.TCPSite(again, "127.0.0.1", int(site)).start()
    await emptied(store)
    assert len({one.user for one in own.received}) == 5
    assert not worker.targets.open_targets()
    await worker.stop(grace=1)
    await again.cleanup()


async def test_the_shared_backends_outage_does_not_stop_who_has_another(
    store: Store, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    own, shared = FakeBackend(), FakeBackend()
    runner, gone = await listening(own), await listening(shared)
    await gone.cleanup()
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    worker = worker_of(store, lid_lookup, shared.url, tenants)
    for number in range(5):
        await say(store, "start_realty_3", f"97150000000{number}")
    await wait_until(lambda: worker.targets.shared.breaker.is_open)
    assert worker.targets.claimable == TenantFilter({tenant(2)}, others=False)
    for number in range(20):
        await say(store, "start_realty_2", f"97150000010{number:02}")
    await wait_until(lambda: len(own.received) == 20)
    assert (await store.backlog()).by_tenant == {3: 5}
    await worker.stop(grace=1)
    await runner.cleanup()


async def test_own_backends_that_hang_do_not_stop_the_common_one(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    own = FakeBackend()
    runner = await listening(own)
    own.may_answer.clear()
    hanging = {str(number): {"backend_url": f"{own.url}/{number}"} for number in range(10, 20)}
    tenants = tenants_at(tmp_path, {"3": {}} | hanging)
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    for number in range(20):
        await say(store, f"start_realty_{10 + number % 10}", f"97150000000{number:02}")
    await wait_until(lambda: len(own.received) == 5)  # half of MAX_IN_FLIGHT, which is 10
    await say(store, "start_realty_3", ALI)
    await wait_until(lambda: backend.received)
    own.may_answer.set()
    await emptied(store)
    await worker.stop(grace=1)
    await runner.cleanup()


async def test_a_breaker_behind_which_nothing_waits_any_more_closes(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    """It stayed closed for good when its users had been erased."""
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}, "3": {}})
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    people = [f"97150000000{number}" for number in range(5)]
    for who in people:
        await say(store, "start_realty_2", who)
    await wait_until(worker.targets.open_targets)
    probers = list(worker._probing.values())
    for who in people:
        await store.erase(user(who))
    await wait_until(lambda: not worker.targets.open_targets())
    await asyncio.wait(probers)
    assert [one for one in probers if not one.cancelled() and one.exception()] == []
    assert worker._probing == {}
    await worker.stop(grace=1)


async def test_waiting_behind_an_open_breaker_does_not_age_a_message_at_another_address(
    store: Store,
    backend: FakeBackend,
    lid_lookup: LidLookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}})
    made = targets(backend.url, tenants=tenants)
    old = target_of(made, 2)
    for _ in range(3):
        old.breaker.record(Signal.NO_CONNECTION, user(ALI), tenant(2), 20.0)
    tenants.start()
    (tmp_path / "tenants.json").write_text(json.dumps({"2": {"backend_url": "http://mended"}}))
    await wait_until(lambda: target_of(made, 2).url == "http://mended")
    assert made.seconds_open(tenant(2), target_of(made, 2), 10.0, 100.0) == 80.0
    tenants.stop()
    await made.close()


async def test_one_tenants_own_backend_closes_after_ten_failures_of_three_users(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    """Behind the shared one, failures of a single tenant prove nothing."""
    own = FakeBackend()
    runner = await listening(own)
    own.answer = lambda _: 500
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    for number in range(12):
        await say(store, "start_realty_2", f"97150000000{number:02}")
    await wait_until(worker.targets.open_targets)
    own.answer = lambda _: 200
    await emptied(store)
    await worker.stop(grace=1)
    await runner.cleanup()


async def test_a_tenant_that_is_given_another_address_is_delivered_there(
    store: Store,
    backend: FakeBackend,
    lid_lookup: LidLookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits behind an open breaker goes at once when its address is fixed."""
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    own = FakeBackend()
    runner = await listening(own)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}})
    tenants.start()
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(worker.targets.open_targets)
    (tmp_path / "tenants.json").write_text(json.dumps({"2": {"backend_url": own.url}, "3": {}}))
    await emptied(store)
    assert {one.user for one in own.received} == {f"97150000000{number}" for number in range(5)}
    assert worker.targets.open_targets() == []
    await worker.stop(grace=1)
    tenants.stop()
    await runner.cleanup()


async def test_slow_backends_of_some_tenants_stop_no_others(
    store: Store, backend: FakeBackend, lid_lookup: LidLookup, tmp_path: Path
) -> None:
    """One took all the slots that are meant for tenants' own: 24 s for everybody else's."""
    own = FakeBackend()
    runner = await listening(own)
    own.answer = lambda one: slow(own) if one.tenant < 15 else 200
    listed = {str(number): {"backend_url": f"{own.url}/{number}"} for number in range(10, 20)}
    tenants = tenants_at(tmp_path, listed)
    worker = worker_of(store, lid_lookup, backend.url, tenants, max_in_flight=128)
    own.may_answer.set()
    held = asyncio.Event()

    async def slow(_: FakeBackend) -> int:
        await held.wait()
        return 200

    for number in range(5 * 40):
        await say(store, f"start_realty_{10 + number % 5}", f"9715000{number:05}")
    await wait_until(lambda: len(own.received) >= 50)
    for number in range(5):
        await say(store, f"start_realty_{15 + number}", f"9715100{number:05}")
    await wait_until(lambda: {15, 16, 17, 18, 19} <= {one.tenant for one in own.received})
    by_tenant = Counter(one.tenant for one in own.received)
    assert max(by_tenant.values()) <= 32, "MAX_IN_FLIGHT_PER_TENANT binds a backend of its own"
    assert sum(by_tenant[one] for one in range(10, 15)) <= 64, "half stays for the common one"
    held.set()
    await emptied(store)
    assert worker.targets.shared.in_flight == 0
    assert worker.targets.claimable == ALL_TENANTS
    await worker.stop(grace=1)
    await runner.cleanup()


def test_room_is_shared_tenants_targets_and_given_back(tmp_path: Path) -> None:
    listed = {str(n): {"backend_url": f"http://own/{n}"} for n in range(1, 1001)}
    made = targets("http://common", tenants=tenants_at(tmp_path, listed), max_in_flight=256)
    begun = []
    for number in range(1, 1001):  # each takes as much as it gets
        while target := made.admit(tenant(number)):
            made.start_attempt(target)
            begun.append(target)
    taken = Counter(target.url.rpartition("/")[2] for target in begun)
    assert sum(taken.values()) == 128
    assert max(taken.values()) == 32
    assert len(taken) > 8, "the next one always found room"
    assert len(made.claimable.named) == 1000, "nothing more is claimed for them"
    for target in begun:
        made.end_attempt(target)
    for _ in range(100):
        made.admit_waiting()
    assert made.claimable == TenantFilter(set())
    assert made.has_room(begun[0])


class Changed:
    """In place of Media: tenants.json changes while it is asked, which may take seconds."""

    def __init__(self, change: Callable[[], Awaitable[None]]) -> None:
        self.change = change

    async def made_fresh(self, delivery: Delivery) -> Delivery:
        await self.change()
        return delivery


@pytest.mark.parametrize("to", [{}, {"3": {}}, {"2": {"backend_url": "OWN"}}])
async def test_the_address_is_looked_up_right_before_the_sending(
    store: Store,
    backend: FakeBackend,
    lid_lookup: LidLookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: dict[str, dict[str, str]],
) -> None:
    """A message went to the common backend after its tenant was taken out of tenants.json."""
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    own, old = FakeBackend(), FakeBackend()
    runners = [await listening(own), await listening(old)]
    text = json.dumps(to).replace("OWN", own.url)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": old.url}, "3": {}})
    tenants.start()

    async def change() -> None:
        (tmp_path / "tenants.json").write_text(text)
        await wait_until(lambda: set(map(str, tenants.listed or {})) == set(to))

    made = targets(backend.url, tenants=tenants)
    media = cast(Media, Changed(change))
    worker = DeliveryWorker(
        store, made, lid_lookup, media, Metrics(), max_in_flight=10, max_age=86_400
    )
    worker.start()
    await say(store, "start_realty_2")
    if "2" in to:
        await wait_until(lambda: own.received)
    else:
        await wait_until(lambda: made.claimable == TenantFilter({tenant(2)}))
        assert (await store.backlog()).by_tenant == {2: 1}
    assert backend.received == old.received == []
    await worker.stop(grace=1)
    tenants.stop()
    for runner in runners:
        await runner.cleanup()


async def test_a_probe_does_not_go_where_its_tenant_no_longer_is(
    store: Store,
    backend: FakeBackend,
    lid_lookup: LidLookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It fell back to the common backend."""
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(breaker_module, "_FIRST_PROBE_SECONDS", 0.05)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}, "3": {}})
    tenants.start()
    worker = worker_of(store, lid_lookup, backend.url, tenants)
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(worker.targets.open_targets)
    claim = store.claim

    async def slow(limit: int, *, wait: float, probe: TenantFilter | None = None) -> list[Delivery]:
        found = await claim(limit, wait=wait, probe=probe)
        if found:
            (tmp_path / "tenants.json").write_text("{}")
            await wait_until(lambda: tenants.listed == {})
        return found

    monkeypatch.setattr(store, "claim", slow)
    await wait_until(lambda: tenants.listed == {})
    await wait_until(lambda: worker.in_flight == 0 and not worker._probing)
    await say(store, "more", "971500000000")
    await wait_until(lambda: worker.in_flight == 0)
    assert backend.received == []
    assert (await store.backlog()).by_tenant == {2: 6}
    await worker.stop(grace=1)
    tenants.stop()


async def test_names_that_hang_stop_nobody_else(
    store: Store,
    backend: FakeBackend,
    lid_lookup: LidLookup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """65 of them took all threads that resolve names, and the common backend got nothing."""
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # a name server that never answers
    silent.bind(("127.0.0.1", 0))
    server = f"127.0.0.1:{silent.getsockname()[1]}"
    assert DefaultResolver is AsyncResolver, "aiodns is installed"
    monkeypatch.setattr(
        "aiohttp.connector.DefaultResolver",
        lambda loop: AsyncResolver(loop, nameservers=[server]),
    )
    listed = {
        str(number): {"backend_url": f"http://slow-{number}.example.com"}
        for number in range(10, 75)
    }
    tenants = tenants_at(tmp_path, {"3": {}} | listed)
    common = backend.url.replace("127.0.0.1", "localhost")
    worker = worker_of(store, lid_lookup, common, tenants, max_in_flight=256)
    for number in range(3 * 65):
        await say(store, f"start_realty_{10 + number % 65}", f"97150000{number:04}")
    await wait_until(lambda: worker.in_flight >= 100)
    await say(store, "start_realty_3", ALI)
    await wait_until(lambda: backend.received, seconds=3)
    await worker.stop(grace=0)
    silent.close()
