"""Tenants with a backend of their own: another address, another gate, another secret."""

import asyncio
import json
from pathlib import Path

import pytest
import standardwebhooks
from aiohttp import web

from gateway import tenants as tenants_module
from gateway.delivery import Courier
from gateway.gate import Sign
from gateway.lids import Lids
from gateway.metrics import Metrics
from gateway.model import Among
from gateway.store import Store
from gateway.tenants import Tenants
from tests.conftest import FakeBackend, no_media, wait_until
from tests.messages import ALI, OMAR, SARA, tenant, user
from tests.test_delivery import emptied, say, targets

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


def courier_of(store: Store, lids: Lids, shared: str, tenants: Tenants) -> Courier:
    made = Courier(
        store,
        targets(shared, tenants=tenants),
        lids,
        no_media(),
        Metrics(),
        max_in_flight=10,
        max_age=86_400,
    )
    made.start()
    return made


async def test_a_tenants_messages_go_to_its_own_backend_signed_with_its_own_secret(
    store: Store, backend: FakeBackend, lids: Lids, tmp_path: Path
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
    courier = courier_of(store, lids, backend.url, tenants)
    for number, who in ((2, ALI), (3, SARA), (4, OMAR)):
        await say(store, f"start_realty_{number}", who)
    await emptied(store)
    await courier.stop(grace=1)
    assert [(one.tenant, one.path) for one in own.received] == [(2, "/hook/two")]
    assert [(one.tenant, one.path) for one in bare.received] == [(3, "/hook/three")]
    assert [one.tenant for one in backend.received] == [4]
    received = own.received[0]
    signed = {name.lower(): value for name, value in received.headers.items()}
    standardwebhooks.Webhook(SECRET).verify(received.body, signed)
    assert "webhook-signature" not in {name.lower() for name in bare.received[0].headers}
    for runner in runners:
        await runner.cleanup()


async def test_a_backend_that_is_away_closes_its_own_gate_only(
    store: Store, backend: FakeBackend, lids: Lids, tmp_path: Path
) -> None:
    own = FakeBackend()
    runner = await listening(own)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    courier = courier_of(store, lids, backend.url, tenants)
    await runner.cleanup()
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(courier.targets.closed)
    assert [target.url for target in courier.targets.closed()] == [own.url]
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
    assert not courier.targets.closed()
    await courier.stop(grace=1)
    await again.cleanup()


async def test_the_shared_backends_outage_does_not_stop_who_has_another(
    store: Store, lids: Lids, tmp_path: Path
) -> None:
    own, shared = FakeBackend(), FakeBackend()
    runner, gone = await listening(own), await listening(shared)
    await gone.cleanup()
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    courier = courier_of(store, lids, shared.url, tenants)
    for number in range(5):
        await say(store, "start_realty_3", f"97150000000{number}")
    await wait_until(lambda: courier.targets.shared.gate.closed)
    assert courier.targets.open() == Among(frozenset({tenant(2)}), others=False)
    for number in range(20):
        await say(store, "start_realty_2", f"97150000010{number:02}")
    await wait_until(lambda: len(own.received) == 20)
    assert (await store.backlog()).by_tenant == {3: 5}
    await courier.stop(grace=1)
    await runner.cleanup()


async def test_own_backends_that_hang_leave_room_for_the_common_one(
    store: Store, backend: FakeBackend, lids: Lids, tmp_path: Path
) -> None:
    own = FakeBackend()
    runner = await listening(own)
    own.open_gate.clear()
    hanging = {str(number): {"backend_url": f"{own.url}/{number}"} for number in range(10, 20)}
    tenants = tenants_at(tmp_path, {"3": {}} | hanging)
    courier = courier_of(store, lids, backend.url, tenants)
    for number in range(20):
        await say(store, f"start_realty_{10 + number % 10}", f"97150000000{number:02}")
    await wait_until(lambda: len(own.received) == 5)  # half of MAX_IN_FLIGHT, which is 10
    await say(store, "start_realty_3", ALI)
    await wait_until(lambda: backend.received)
    own.open_gate.set()
    await emptied(store)
    await courier.stop(grace=1)
    await runner.cleanup()


async def test_a_gate_behind_which_nothing_waits_any_more_opens(
    store: Store, backend: FakeBackend, lids: Lids, tmp_path: Path
) -> None:
    """It stayed closed for good when its users had been erased."""
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}, "3": {}})
    courier = courier_of(store, lids, backend.url, tenants)
    people = [f"97150000000{number}" for number in range(5)]
    for who in people:
        await say(store, "start_realty_2", who)
    await wait_until(courier.targets.closed)
    probers = list(courier._probing.values())
    for who in people:
        await store.erase(user(who))
    await wait_until(lambda: not courier.targets.closed())
    await asyncio.wait(probers)
    assert [one for one in probers if not one.cancelled() and one.exception()] == []
    assert courier._probing == {}
    await courier.stop(grace=1)


async def test_waiting_behind_a_closed_gate_does_not_age_a_message_at_another_address(
    store: Store,
    backend: FakeBackend,
    lids: Lids,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenants_module, "_LOOK_SECONDS", 0.01)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}})
    made = targets(backend.url, tenants=tenants)
    old = made.of(tenant(2))[1]
    for _ in range(3):
        old.gate.tell(Sign.NO_CONNECTION, user(ALI), tenant(2), 20.0)
    tenants.start()
    (tmp_path / "tenants.json").write_text(json.dumps({"2": {"backend_url": "http://mended"}}))
    await wait_until(lambda: made.of(tenant(2))[1].url == "http://mended")
    assert made.of(tenant(2))[1].seconds_closed(10.0, 100.0) == 80.0
    tenants.stop()
    await made.close()


async def test_one_tenants_own_backend_closes_after_ten_failures_of_three_users(
    store: Store, backend: FakeBackend, lids: Lids, tmp_path: Path
) -> None:
    """Behind the shared one, failures of a single tenant prove nothing."""
    own = FakeBackend()
    runner = await listening(own)
    own.answer = lambda _: 500
    tenants = tenants_at(tmp_path, {"2": {"backend_url": own.url}, "3": {}})
    courier = courier_of(store, lids, backend.url, tenants)
    for number in range(12):
        await say(store, "start_realty_2", f"97150000000{number:02}")
    await wait_until(courier.targets.closed)
    own.answer = lambda _: 200
    await emptied(store)
    await courier.stop(grace=1)
    await runner.cleanup()


async def test_a_tenant_that_is_given_another_address_is_delivered_there(
    store: Store,
    backend: FakeBackend,
    lids: Lids,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits behind a closed gate goes at once when its address is mended."""
    monkeypatch.setattr(tenants_module, "_LOOK_SECONDS", 0.01)
    own = FakeBackend()
    runner = await listening(own)
    tenants = tenants_at(tmp_path, {"2": {"backend_url": "http://127.0.0.1:9"}})
    tenants.start()
    courier = courier_of(store, lids, backend.url, tenants)
    for number in range(5):
        await say(store, "start_realty_2", f"97150000000{number}")
    await wait_until(courier.targets.closed)
    (tmp_path / "tenants.json").write_text(json.dumps({"2": {"backend_url": own.url}, "3": {}}))
    await emptied(store)
    assert {one.user for one in own.received} == {f"97150000000{number}" for number in range(5)}
    assert courier.targets.closed() == []
    await courier.stop(grace=1)
    tenants.stop()
    await runner.cleanup()
