"""Whether WAHA is there, and how its sessions stand, without an event that tells."""

import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.errors import WahaSilent, WahaUnavailable
from gateway.metrics import Metrics
from gateway.sessions import Sessions
from gateway.waha.client import Waha
from gateway.watch import Watch
from tests.conftest import wait_until


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def watch(client: Waha, metrics: Metrics) -> Iterator[Watch]:
    made = Watch(client, Sessions(metrics), metrics, home_session="default")
    yield made
    made.stop()


def up(metrics: Metrics, session: str = "default") -> float | None:
    return metrics.value("gateway_waha_session_up", session=session)


async def test_a_session_that_waits_for_its_qr_code_is_known_without_an_event(
    watch: Watch, waha: StandIn, metrics: Metrics
) -> None:
    waha.statuses["default"] = "SCAN_QR_CODE"
    await watch.look()
    assert metrics.value("gateway_waha_up") == 1
    assert up(metrics) == 0
    waha.statuses["default"] = "WORKING"
    await watch.look()
    assert up(metrics) == 1


async def test_a_waha_that_has_died_is_noticed(
    watch: Watch, waha: StandIn, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await watch.look()
    assert (watch.silent_since, watch.ever) == (None, True)
    there, watch._waha = watch._waha, Waha("http://127.0.0.1:9/api", "")
    await watch.look()
    await watch.look()
    assert watch.silent_since is not None
    assert abs(watch.silent_since - time.time()) < 60
    assert metrics.value("gateway_waha_up") == 0
    await watch._waha.close()
    watch._waha = there
    await watch.look()
    assert watch.silent_since is None
    told = [one.message.partition(":")[0] for one in caplog.records if one.name == "gateway.watch"]
    assert told == ["📵 WAHA does not answer", "📱 WAHA answers again"]


async def test_one_session_that_stumbles_hides_no_other(
    client: Waha, waha: StandIn, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = Sessions(metrics)
    watch = Watch(client, sessions, metrics, home_session="default")
    told: list[str] = []
    watch.lost, watch.back = lambda: told.append("lost"), lambda: told.append("back")
    waha.configs |= {"a": {}, "b": {}, "c": {}}
    for name in "abc":
        sessions.asked(name, "WORKING", frozenset(), 1.0)
    waha.statuses["c"] = "FAILED"
    look_at = client.look_at

    async def stumbles(name: str) -> tuple[str | None, frozenset[str]]:
        if name == "a":
            raise WahaSilent("it hangs")
        if name == "b":
            raise WahaUnavailable("500", 500)
        return await look_at(name)

    monkeypatch.setattr(client, "look_at", stumbles)
    await watch.look()
    assert (watch.silent_since, up(metrics, "c"), told) == (None, 0, [])
    monkeypatch.setattr(client, "look_at", look_at)
    waha.delay = 0.0
    silent = Waha("http://127.0.0.1:9/api", "")
    watch._waha = silent
    await watch.look()
    await watch.look()
    watch._waha = client
    await watch.look()
    await silent.close()
    assert told == ["lost", "back"]


async def test_it_looks_again_and_again_whatever_waha_answers(
    watch: Watch, waha: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.watch._EVERY_SECONDS", 0.01)
    looked = 0
    look = watch.look

    async def stumbles() -> None:
        nonlocal looked
        looked += 1
        if looked == 2:
            raise RuntimeError("unforeseen")
        await look()

    monkeypatch.setattr(watch, "look", stumbles)
    watch.start()
    await wait_until(lambda: looked >= 4)
    assert "the look at WAHA stumbled" in caplog.text


async def test_a_wrong_key_is_an_answer_and_told(
    watch: Watch, waha: StandIn, metrics: Metrics
) -> None:
    waha.odd_answer = lambda: web.Response(status=401)
    await watch.look()
    assert metrics.value("gateway_waha_up") == 1
    assert "401" in str(watch.refused)
    waha.odd_answer = None
    await watch.look()
    assert watch.refused is None


async def test_a_home_session_that_is_not_there_does_not_work(
    watch: Watch, waha: StandIn, metrics: Metrics
) -> None:
    await watch.look()
    assert up(metrics) == 1
    del waha.configs["default"]
    await watch.look()
    assert up(metrics) == 0


async def test_a_status_that_is_none_is_not_believed(
    watch: Watch, waha: StandIn, metrics: Metrics
) -> None:
    waha.statuses["default"] = "WOR\ud83dKING"
    await watch.look()
    assert up(metrics) is None


async def test_a_session_that_waha_has_no_more_is_forgotten(
    client: Waha, waha: StandIn, metrics: Metrics
) -> None:
    sessions = Sessions(metrics)
    watch = Watch(client, sessions, metrics, home_session="default")
    sessions.asked("sales", "WORKING", frozenset(), 1.0)
    assert up(metrics, "sales") == 1
    del waha.configs["sales"]
    await watch.look()
    assert up(metrics, "sales") is None
    assert "sales" not in sessions.all()
