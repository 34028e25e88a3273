"""What WAHA has and the router has not: asked for, once, in order, by the ordinary rules."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.app import create_app
from gateway.errors import WahaRefused
from gateway.inbound.ingest import Ignored
from gateway.inbound.recovery import Recovery
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.waha.client import SessionInfo
from gateway.waha.sessions import Sessions
from tests.clients import settings_of
from tests.conftest import LIMITS, FakeBackend, Received, wait_until
from tests.e2e.router import Router
from tests.messages import ALI, OMAR, SARA, webhook

NOW = time.time()


def payload(text: str, who: str = ALI, *, sent: float, bare_id: str | None = None) -> Any:
    """What WAHA has of a message."""
    return json.loads(webhook(text, who, sent=sent, bare_id=bare_id))["payload"]


def texts(received: list[Received]) -> list[str]:
    return [json.loads(one.body)["payload"]["body"] for one in received]


async def start(router: Router) -> None:
    await asyncio.to_thread(router.start)


async def stop(router: Router) -> None:
    await asyncio.to_thread(router.stop)


async def post(router: Router, body: bytes) -> str:
    answer = await asyncio.to_thread(router.post, body)
    return str(answer.json()["status"])


async def recover(router: Router, session: str | None = None, **body: float) -> httpx.Response:
    query = {"session": session} if session else {}
    return await asyncio.to_thread(
        httpx.post, f"{router.url}/router/recover", json=body, params=query, timeout=60
    )


async def test_what_came_while_the_router_was_away_is_fetched_at_its_start(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    link = webhook("start_realty_2", sent=NOW - 500, bare_id="SEEN")
    assert await post(router, link) == "routed"
    await wait_until(lambda: len(backend.received) == 1)
    await stop(router)
    assert waha.listed == 0, "nothing is recovered at a first start"
    waha.messages = [
        payload("second", sent=NOW - 300),
        payload("first", sent=NOW - 400),
        payload("start_realty_2", sent=NOW - 500, bare_id="SEEN"),
        payload("start_realty_9", sent=NOW - 600),  # older than the lock
        payload("hello", SARA, sent=NOW - 200),  # no lock, and no help for it
        payload("start_realty_5", OMAR, sent=NOW - 250),
        payload("in a group", "120363040000000001@g.us", sent=NOW - 240),
    ]
    await start(router)
    await wait_until(lambda: len(backend.received) == 4, seconds=20)
    assert [text for text in texts(backend.received) if text != "start_realty_5"] == [
        "start_realty_2", "first", "second",
    ]  # fmt: skip
    assert {(one.user, one.tenant) for one in backend.received} == {(ALI, 2), (OMAR, 5)}
    assert [one.headers.get("X-Recovered") for one in backend.received] == [
        None, "true", "true", "true",
    ]  # fmt: skip
    await stop(router)
    assert "🩹 Asked WAHA for messages of session default" in router.log.read_text("utf-8")
    assert not waha.sent, "nobody is asked for a link because of it"


async def test_what_came_while_a_session_did_not_work_is_fetched_once_it_does(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW - 100)) == "routed"
    await report_status(router, "FAILED")
    waha.messages = [payload("missed", sent=NOW - 50)]
    assert await post(router, webhook("after it", sent=time.time() + 1)) == "routed"
    await wait_until(lambda: "missed" in texts(backend.received), seconds=20)
    waha.messages.append(payload("missed too", sent=time.time()))
    await report_status(router, "FAILED")
    await report_status(router, "WORKING")
    await wait_until(lambda: "missed too" in texts(backend.received), seconds=20)
    assert len(backend.received) == 4
    await stop(router)


async def test_on_demand_hundreds_come_oldest_first(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    refused = await recover(router)
    assert refused.status_code == 409
    assert "nothing was ever heard of session default" in refused.json()["detail"]
    waha.messages = [payload("start_realty_2", sent=NOW - 2000)] + [
        payload(f"{number}", sent=NOW - 1000 + number) for number in range(250)
    ]
    first = (await recover(router, hours=1)).json()
    assert first == {
        "status": "recovered", "routed": 251, "unknown_user": 0, "duplicate": 0, "ignored": 0,
    }  # fmt: skip
    again = (await recover(router, hours=1)).json()
    assert (again["routed"], again["duplicate"]) == (0, 251)
    await wait_until(lambda: len(backend.received) == 251, seconds=30)
    assert texts(backend.received) == ["start_realty_2", *map(str, range(250))]
    metrics = (await asyncio.to_thread(httpx.get, f"{router.url}/metrics")).text
    assert 'gateway_recovered_messages_total{outcome="routed"} 251.0' in metrics
    await stop(router)


async def report_status(router: Router, name: str) -> None:
    body = json.loads(webhook(None, sent=time.time(), event="session.status"))
    body["payload"] = {"name": "default", "status": name}
    assert await post(router, json.dumps(body).encode()) == "ignored"


async def metrics_of(router: Router) -> str:
    return (await asyncio.to_thread(httpx.get, f"{router.url}/metrics")).text


async def test_a_session_that_breaks_off_while_its_gap_is_asked_for_is_asked_once_more(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    """From where the gap began: what came live meanwhile must not hide it."""
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW - 500)) == "routed"
    await stop(router)
    waha.delay = 1.5
    await start(router)
    await wait_until(lambda: waha.listed == 1)
    await report_status(router, "FAILED")
    assert await post(router, webhook("live", sent=time.time() + 1)) == "routed"
    waha.delay = 0.0
    await wait_until(lambda: "🩹" in router.log.read_text("utf-8"))
    waha.messages = [payload("missed", sent=NOW - 200)]
    await report_status(router, "WORKING")
    await wait_until(lambda: "missed" in texts(backend.received), seconds=20)
    await stop(router)


@pytest.mark.parametrize("knows_order", [True, False])
async def test_what_came_a_moment_before_the_last_one_is_asked_for_too(
    tmp_path: Path, waha: StandIn, backend: FakeBackend, knows_order: bool
) -> None:
    """WAHA knows no order: the last one that came need not be the last one before the gap. Those of
    one second keep WAHA's order, in which they came, whether it lists oldest or newest first."""
    waha.knows_order = knows_order
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW - 100)) == "routed"
    waha.messages = [payload(f"{number}", sent=NOW - 130) for number in (1, 2, 3)]
    waha.messages += [payload("0", sent=NOW - 131)]
    assert (await recover(router)).json()["routed"] == 4
    assert waha.queries[-1]["sortOrder"] == "asc"
    await wait_until(lambda: len(backend.received) == 5)
    assert texts(backend.received)[1:] == ["0", "1", "2", "3"]
    metrics = await metrics_of(router)
    assert 'gateway_lock_changes_total{kind="locked",why="link"} 1.0' in metrics
    waha.messages = [payload("start_realty_3", OMAR, sent=NOW - 90)]
    assert (await recover(router)).json()["routed"] == 1
    assert 'gateway_lock_changes_total{kind="locked",why="link"} 2.0' in await metrics_of(router)
    await stop(router)


async def test_more_messages_than_memory_holds_are_taken_in_all_the_same(
    tmp_path: Path, waha: StandIn, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.inbound.recovery._BATCH_MAX_MESSAGES", 200)
    waha.messages = [
        payload(f"start_realty_2 {number}", sent=NOW - 1000 + number) for number in range(450)
    ]
    settings = {"waha_api_url": waha.url, "backend_api_url": backend.url}
    app = create_app(settings_of(tmp_path, **settings), limits=LIMITS)
    async with app.router.lifespan_context(app):
        way = httpx.ASGITransport(app, client=("testclient", 1))
        async with httpx.AsyncClient(transport=way, base_url="http://localhost") as client:
            answer = await client.post("/router/recover", json={"hours": 1}, timeout=60)
    assert answer.json()["routed"] == 450


@dataclass
class Asked:
    """A recovery whose clocks we set, with what it asked WAHA for and what was taken in."""

    recovery: Recovery
    sessions: Sessions
    taken: list[str]
    since: list[int]


@contextlib.asynccontextmanager
async def recovery_of(
    store: Store, pages: Callable[[int], list[Any]], **how: Any
) -> AsyncIterator[Asked]:
    """pages: what WAHA answers to the n-th question."""
    taken: list[str] = []
    since: list[int] = []

    class Asking:
        async def session_info(self, _: str) -> SessionInfo:
            return SessionInfo("WORKING", frozenset(), {})

        async def messages(self, _: str, *, since: int, **__: int | None) -> list[Any]:
            asked.since.append(since)
            return pages(len(asked.since))

    class Taking:
        async def are_known(self, bodies: list[bytes]) -> list[bool]:
            return [False] * len(bodies)

        async def recover(self, body: bytes) -> Ignored:
            taken.append(json.loads(body)["payload"]["body"])
            return Ignored("test")

    metrics = Metrics()
    sessions = Sessions(metrics)
    waha: Any = Asking()
    ingest: Any = Taking()
    made = Recovery(waha, store, sessions, ingest, metrics, **{"hours": 24} | how)
    asked = Asked(made, sessions, taken, since)
    await made.start()
    yield asked
    await made.stop()


async def test_a_list_that_shifts_while_it_is_read_is_read_to_its_end(store: Store) -> None:
    """The newest stand first: with a hundred that come meanwhile page two is page one again."""
    first = [payload(f"a{n}", sent=NOW - n) for n in range(100)]
    second = [payload(f"b{n}", sent=NOW - 500 - n) for n in range(100)]
    answers = [first, first, second, [], []]
    async with recovery_of(store, lambda n: answers[n - 1]) as asked:
        await asked.recovery.recover("default", NOW - 1000)
    assert len(asked.taken) == 200


async def test_an_engine_that_knows_no_offset_is_not_asked_for_ever(store: Store) -> None:
    page = [payload(f"{n}", sent=NOW - n) for n in range(100)]
    async with recovery_of(store, lambda _: page) as asked:
        await asked.recovery.recover("default", NOW - 1000)
    assert (len(asked.taken), len(asked.since)) == (100, 4)


async def test_a_waha_that_was_away_is_asked_when_it_is_back(store: Store) -> None:
    """Its sessions worked before and after, so no status tells of it."""
    await store.note_heard({"default": NOW - 300})
    async with recovery_of(store, lambda _: []) as asked:
        await wait_until(lambda: not asked.recovery.gaps_since())
        before = len(asked.since)
        asked.recovery.waha_lost()
        assert asked.recovery.gaps_since() == {"default": pytest.approx(NOW - 300, abs=1)}
        asked.recovery.waha_back()
        await wait_until(lambda: not asked.recovery.gaps_since())
        assert len(asked.since) == before + 2


async def test_a_message_that_was_not_stored_is_asked_for_once_waha_gives_up_on_it(
    store: Store,
) -> None:
    now = 1000.0
    async with recovery_of(store, lambda _: [], monotonic=lambda: now) as asked:
        asked.recovery.message_refused("default", NOW - 50)
        asked.recovery.message_refused("default", NOW - 90)
        assert asked.recovery.gaps_since() == {}, "WAHA repeats it: nothing is missing yet"
        now += 3601
        assert asked.recovery.gaps_since() == {"default": NOW - 90}
        asked.recovery.session_status_changed("default", "WORKING")
        await wait_until(lambda: not asked.recovery.gaps_since())
        assert set(asked.since) == {int(NOW - 150)}


async def test_a_session_that_waha_has_no_more_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.inbound.recovery._FAST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr("gateway.inbound.recovery._MIN_RETRY_SECONDS", 0.01)
    await store.note_heard({"sales": NOW - 300})

    def gone(_: int) -> list[Any]:
        raise WahaRefused("no such session", 404)

    async with recovery_of(store, gone) as asked:
        await wait_until(lambda: not asked.recovery.gaps_since())
    assert len(asked.since) == 3


async def test_what_was_heard_by_a_clock_that_was_ahead_hides_nothing(store: Store) -> None:
    await store.note_heard({"default": time.time() + 86_400})
    async with recovery_of(store, lambda _: []) as asked:
        await wait_until(lambda: asked.since)
    assert asked.since[0] < time.time() - 23 * 3600


async def test_an_order_without_hours_asks_from_where_the_gap_begins_and_closes_it(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    heard_at = time.time() - 3000
    assert await post(router, webhook("start_realty_2", sent=heard_at)) == "routed"
    await stop(router)
    waha.odd_answer = lambda: web.Response(status=401)  # a wrong key
    await start(router)
    assert await post(router, webhook("live", sent=NOW)) == "routed"
    await wait_until(lambda: "is not to be had" in router.log.read_text("utf-8"))
    (age,) = (
        float(line.split()[1])
        for line in (await metrics_of(router)).splitlines()
        if line.startswith('gateway_recovery_gap_seconds{session="default"}')
    )
    assert abs(age - (time.time() - heard_at)) < 10
    ready = (await asyncio.to_thread(httpx.get, f"{router.url}/ready")).json()
    assert ready["recovery"].startswith("degraded: what came of session default in the last 30")
    waha.odd_answer = None
    waha.messages = [payload("missed", sent=NOW - 1000)]
    assert (await recover(router)).json()["routed"] == 1
    assert "gateway_recovery_gap_seconds{" not in await metrics_of(router)
    await wait_until(lambda: "missed" in texts(backend.received))
    await stop(router)


async def test_one_tenant_that_is_full_holds_up_its_own_messages_only(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    backend.answer = lambda one: 503 if one.tenant == 2 else 200
    full = {"max_backlog_per_tenant": "1"}
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url, **full)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW - 900)) == "routed"
    waha.messages = [
        payload("second", sent=NOW - 300),
        payload("third", sent=NOW - 200),
        payload("start_realty_5", OMAR, sent=NOW - 100),
    ]
    asked = asyncio.create_task(recover(router, hours=1))
    await wait_until(lambda: 5 in [one.tenant for one in backend.received])
    assert not asked.done()
    backend.answer = lambda _: 200
    assert (await asked).json()["routed"] == 3
    await wait_until(lambda: "third" in texts(backend.received))
    got = list(dict.fromkeys(text for text in texts(backend.received) if "_5" not in text))
    assert got == ["start_realty_2", "second", "third"]
    await stop(router)


async def test_where_waha_cannot_report_nothing_else_is_harmed(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW)) == "routed"
    await stop(router)
    waha.can_report = False
    await start(router)
    await wait_until(lambda: waha.listed >= 1)
    refused = await recover(router, hours=1)
    assert refused.status_code == 409
    assert "501" in refused.json()["detail"]
    assert await post(router, webhook("hello", sent=NOW)) == "routed"
    await stop(router)
    log = router.log.read_text("utf-8")
    assert "WAHA cannot say what came while nobody listened" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("status", [401, 503])
async def test_a_gap_that_waha_did_not_report_of_outlives_a_restart(
    tmp_path: Path, waha: StandIn, backend: FakeBackend, status: int
) -> None:
    """What came behind it must not hide it."""
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    assert await post(router, webhook("start_realty_2", sent=NOW - 900)) == "routed"
    await stop(router)
    waha.messages = [payload("missed", sent=NOW - 500)]
    waha.odd_answer = lambda: web.Response(status=status)
    await start(router)
    assert await post(router, webhook("live", sent=NOW)) == "routed"
    await wait_until(lambda: len(backend.received) == 2)
    await stop(router)  # which notes what was heard
    waha.odd_answer = None
    await start(router)
    await wait_until(lambda: "missed" in texts(backend.received), seconds=20)
    await stop(router)


async def test_whatever_a_message_lacks_each_is_taken_in_once(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url)
    await start(router)
    link = webhook("start_realty_2", sent=NOW - 900, bare_id="A1")
    assert await post(router, link) == "routed"
    known = payload("start_realty_2", sent=NOW - 900, bare_id="A1")
    known["id"] = {"_serialized": known["id"], "fromMe": False}
    nameless = [payload(text, sent=NOW - 100 + n) for n, text in enumerate(("one", "two", "three"))]
    for one in nameless:
        del one["id"]
    own = payload("start_realty_7", "971557357753", sent=NOW - 50)
    odd = [payload("odd", sent=NOW - 10) for _ in range(4)]
    odd[0]["timestamp"], odd[1]["timestamp"] = 10**400, None
    odd[2]["timestamp"], odd[3]["timestamp"] = "soon", {"low": 1}
    shown = json.dumps([*nameless, known, own, *odd])
    waha.odd_answer = lambda: web.Response(text=shown, content_type="application/json")
    first = (await recover(router, hours=1)).json()
    assert (first["routed"], first["duplicate"], first["ignored"]) == (7, 1, 1)
    again = (await recover(router, hours=1)).json()
    assert (again["routed"], again["duplicate"]) == (0, 8)
    await wait_until(lambda: len(backend.received) == 8)
    received = texts(backend.received)[1:]
    assert [one for one in received if one != "odd"] == ["one", "two", "three"]
    await stop(router)


async def test_one_message_that_makes_us_stumble_hides_no_other(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    page = [payload(f"{n}", sent=NOW - 100 + n) for n in range(3)]

    async with recovery_of(store, lambda n: page if n == 1 else []) as asked:
        take = asked.recovery._ingest.recover

        async def fails(body: bytes) -> Any:
            if json.loads(body)["payload"]["body"] == "1":
                raise TypeError("unforeseen")
            return await take(body)

        asked.recovery._ingest.recover = fails  # type: ignore[method-assign]
        outcomes = await asked.recovery.recover("default", NOW - 1000)
    assert asked.taken == ["0", "2"]
    assert outcomes["ignored"] == 3
    assert "a message failed unexpectedly" in caplog.text


async def test_the_own_number_is_asked_for_before_any_event_reported_it(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    how = {
        "waha_api_url": waha.url,
        "backend_api_url": backend.url,
        "gateway_phone": "971500000000",
    }
    router = Router(tmp_path, **how)
    await start(router)
    waha.messages = [payload("start_realty_7", "971557357753", sent=NOW - 50)]  # its `me`
    assert (await recover(router, hours=1)).json()["ignored"] == 1
    await stop(router)


async def test_switched_off_it_asks_for_nothing(
    tmp_path: Path, waha: StandIn, backend: FakeBackend
) -> None:
    off = {"recover_hours": "0"}
    router = Router(tmp_path, waha_api_url=waha.url, backend_api_url=backend.url, **off)
    for _ in range(2):
        await start(router)
        assert await post(router, webhook("start_realty_2", sent=NOW)) == "routed"
        assert (await recover(router, hours=1)).status_code == 409
        await report_status(router, "FAILED")
        assert "gateway_recovery_gap_seconds{" not in await metrics_of(router)
        await stop(router)
    assert waha.listed == 0


# reconciliation


class Clocks:
    """Of a recovery; time passes only when the test says so."""

    def __init__(self) -> None:
        self.now, self.monotonic = NOW, 100_000.0

    def forward(self, seconds: float) -> None:
        self.now += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    monkeypatch.setattr("gateway.inbound.recovery._SCHEDULE_SECONDS", 0.01)
    return Clocks()


async def test_one_webhook_that_was_never_sent_is_found_without_a_reason(
    tmp_path: Path, waha: StandIn, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is known already is skipped without a write."""
    monkeypatch.setattr("gateway.inbound.recovery._SCHEDULE_SECONDS", 0.05)
    monkeypatch.setattr("gateway.inbound.recovery._IN_TRANSIT_SECONDS", 0.0)
    monkeypatch.setattr("gateway.inbound.recovery._RECONCILE_SECONDS", 0.3)
    how = {"waha_api_url": waha.url, "backend_api_url": backend.url}
    app = create_app(settings_of(tmp_path, **how), limits=LIMITS)
    async with app.router.lifespan_context(app):
        way = httpx.ASGITransport(app, client=("testclient", 1))
        async with httpx.AsyncClient(transport=way, base_url="http://localhost") as client:
            link = webhook("start_realty_2", sent=NOW - 60, bare_id="A1")
            await client.post("/webhook/waha", content=link)
            waha.messages = [json.loads(link)["payload"], payload("never sent", sent=NOW - 40)]
            await client.post("/webhook/waha", content=webhook("newest", sent=NOW - 20))
            async with asyncio.timeout(20):
                while not texts(backend.received)[2:]:
                    await asyncio.sleep(0.05)
            assert texts(backend.received)[2:] == ["never sent"]
            assert backend.received[-1].headers["X-Recovered"] == "true"
            async with asyncio.timeout(20):
                while "reconciled up to 20" not in (await client.get("/ready")).json()["recovery"]:
                    await asyncio.sleep(0.05)
            scraped = (await client.get("/metrics")).text
            assert "gateway_reconciled_messages_total 1.0" in scraped
    assert len(backend.received) == 3


async def test_the_last_hour_is_looked_through_every_quarter_and_all_once_a_day(
    store: Store, clocks: Clocks
) -> None:
    await store.note_heard({"default": NOW - 10})
    how: Any = {"clock": lambda: clocks.now, "monotonic": lambda: clocks.monotonic}
    async with recovery_of(store, lambda _: [], **how) as asked:
        await wait_until(lambda: asked.recovery.reconciled_up_to() is not None)
        assert min(asked.since) == int(NOW - 120 - 24 * 3600), "all of it at the start"
        assert asked.recovery.reconciled_up_to() == NOW - 120, "a webhook may be on its way"
        for seconds, window in ((901, 3600), (86_400, 24 * 3600)):
            asked.since.clear()
            clocks.forward(seconds)
            await wait_until(lambda: len(asked.since) >= 2)
            assert asked.since == [int(clocks.now - 120 - window)] * 2
            await wait_until(lambda: asked.recovery.reconciled_up_to() == clocks.now - 120)


async def test_what_waha_has_from_before_the_first_message_is_none_of_ours(
    store: Store, clocks: Clocks
) -> None:
    how: Any = {"clock": lambda: clocks.now, "monotonic": lambda: clocks.monotonic}
    async with recovery_of(store, lambda _: [], **how) as asked:
        asked.sessions.heard_before("default", NOW - 30)
        await asked.recovery._note()
        clocks.forward(900)
        await wait_until(lambda: asked.since)
    assert min(asked.since) >= int(NOW - 30)
    assert await store.heard() == {"default": NOW - 30, "default/first": NOW - 30}


async def test_a_waha_that_cannot_report_is_not_asked_every_quarter(
    store: Store, clocks: Clocks
) -> None:
    def cannot(_: int) -> list[Any]:
        raise WahaRefused("not implemented", 501)

    how: Any = {"clock": lambda: clocks.now, "monotonic": lambda: clocks.monotonic}
    async with recovery_of(store, cannot, **how) as asked:
        asked.sessions.heard_before("default", NOW - 30)
        await wait_until(lambda: asked.recovery.unsupported)
        clocks.forward(1000)
        await asyncio.sleep(0.1)  # that nothing happens can only be waited for
        assert len(asked.since) == 1


async def test_a_session_that_does_not_send_to_us_is_asked_at_each_look(store: Store) -> None:
    await store.note_heard({"default": NOW - 300})
    async with recovery_of(store, lambda _: []) as asked:
        await wait_until(lambda: not asked.recovery.gaps_since())
        asked.since.clear()
        asked.recovery.webhook_missing("default")
        assert asked.recovery.gaps_since() == {"default": pytest.approx(NOW - 300, abs=1)}
        await wait_until(lambda: not asked.recovery.gaps_since())
        assert set(asked.since) == {int(NOW - 360)}
