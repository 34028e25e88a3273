"""One clock decides when something is due: the store's. Routers' clocks may be off, and its own may
be set back."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import redis
from redis._parsers import _RESP2Parser

from gateway.domain.model import InboundMessage, Retry
from gateway.errors import StoreUnavailable
from gateway.store.redis import scripts
from gateway.store.redis.store import RedisStore
from tests.clients import HOOK, client_of
from tests.conftest import LIMITS
from tests.messages import ALI, OMAR, SARA, by_the_rules, message, tenant, user, webhook

REAL = time.time


class Clock:
    """Of a Redis server, which we can set."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def is_ahead(self, seconds: float) -> None:
        self._client.set("test:ahead", repr(seconds))


@pytest.fixture
def clock(redis_socket: str, monkeypatch: pytest.MonkeyPatch) -> Clock:
    real = scripts._text
    reported = "local NOW = tonumber(clock[1])"

    def with_our_clock() -> str:
        text = real()
        assert reported in text
        return text.replace(
            reported,
            "local NOW = tonumber(redis.call('GET', 'test:ahead') or 0) + tonumber(clock[1])",
        )

    monkeypatch.setattr(scripts, "_text", with_our_clock)
    client = redis.Redis(unix_socket_path=redis_socket)
    client.flushall()
    return Clock(client)


@pytest.fixture
async def store(clock: Clock, redis_socket: str) -> AsyncIterator[RedisStore]:
    clock.is_ahead(0)
    opened = await RedisStore.open(f"unix:{redis_socket}", LIMITS)
    yield opened
    await opened.close()


async def say(store: RedisStore, text: str, who: str = ALI) -> InboundMessage:
    now = store.now()
    inbound = message(text, who, sent=now, raised=now, now=now)
    await store.accept(inbound, by_the_rules(inbound))
    return inbound


async def renew(store: RedisStore) -> None:
    for session in list(store._sessions):
        await store._renew(session)
    await store._heal_clocks()


@pytest.mark.parametrize("ahead", [-1000.0, 0.0, 1000.0])
async def test_what_time_it_is_redis_says(store: RedisStore, clock: Clock, ahead: float) -> None:
    clock.is_ahead(ahead)
    await renew(store)
    assert abs(store.now() - time.time() - ahead) < 1


@pytest.mark.parametrize("ahead", [1000.0, -1000.0])
def test_a_router_whose_clock_is_off_delivers_at_once_and_loses_nothing(
    tmp_path: Path, redis_socket: str, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """N s ahead it delivered N s late; 1000 s behind it lost what it held."""
    redis.Redis(unix_socket_path=redis_socket).flushall()
    monkeypatch.setattr(time, "time", lambda: REAL() + ahead)
    got: list[tuple[str, str]] = []

    def backend(request: httpx.Request) -> httpx.Response:
        said = json.loads(request.content)["payload"]["body"]
        got.append((request.headers["X-User-ID"], said))
        # The first attempt at one fails: the next is due a second later, by Redis' clock.
        return httpx.Response(500 if said == "again" and got.count((SARA, said)) == 1 else 200)

    url = f"unix:{redis_socket}"
    with client_of(tmp_path, handler=backend, store_url=url) as client:
        sent = REAL() - 10

        def post(text: str, who: str, at: float) -> None:
            answer = client.post(HOOK, content=webhook(text, who, sent=at, raised=at))
            assert answer.status_code == 200

        post("I saw the flat", ALI, sent + 2)
        post("start_realty_2", ALI, sent + 1)
        post("start_realty_3", SARA, sent)
        post("again", SARA, sent + 1)
        deadline = time.monotonic() + 10
        while len(got) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert {text for who, text in got if who == ALI} == {"start_realty_2", "I saw the flat"}
    assert [text for who, text in got if who == SARA] == ["start_realty_3", "again", "again"]


async def test_what_was_put_off_is_due_when_redis_clock_has_gone_back(
    store: RedisStore, clock: Clock
) -> None:
    """The queues stood for as long as it had been ahead."""
    clock.is_ahead(3000)
    await renew(store)
    await say(store, "start_realty_2", ALI)
    await say(store, "start_realty_2", SARA)
    for one in await store.claim(1, wait=0):
        failed = Retry(20.0, "x", poison=False, tried_at=store.now(), age=0.0)
        await store.settle(one, failed)
    clock.is_ahead(0)
    assert await store.claim(10, wait=0) == []
    await renew(store)
    assert {one.user for one in await store.claim(10, wait=0)} == {ALI, SARA}


async def test_a_backoff_of_a_clock_that_is_right_stays(store: RedisStore, clock: Clock) -> None:
    await say(store, "start_realty_2", ALI)
    (one,) = await store.claim(1, wait=0)
    await store.settle(one, Retry(500.0, "x", poison=False, tried_at=store.now() - 9, age=0.0))
    clock.is_ahead(-5)
    await renew(store)
    assert await store.claim(10, wait=0) == []


async def test_decisions_of_a_clock_that_was_ahead_make_no_later_link_stale(
    store: RedisStore, clock: Clock
) -> None:
    year = 365 * 86_400.0
    clock.is_ahead(year)
    await renew(store)
    for who in (ALI, SARA, OMAR):
        await store.lock(user(who), tenant(2))
    await store.unlock(user(SARA))
    await store.move(tenant(2), tenant(5))
    clock.is_ahead(0)
    await renew(store)
    await asyncio.sleep(1.1)  # a link of the very second of the decision is no later one
    for who in (ALI, SARA, OMAR):
        await say(store, "start_realty_7", who)
        assert (await store.lock_of(user(who)))[1].tenant == 7
    assert max(one.at for one in await store.history(user(ALI), limit=10)) < time.time() + 5


async def test_a_clock_that_is_behind_whatsapps_redates_nothing(
    store: RedisStore, clock: Clock
) -> None:
    """It is wrong itself: what WhatsApp has said lies in its future."""
    await say(store, "start_realty_2", ALI)
    now = store.now()
    link = message("start_realty_3", SARA, sent=now - 5, raised=now - 5, now=now)
    await store.accept(link, by_the_rules(link))
    before = [(await store.lock_of(user(who)))[1] for who in (ALI, SARA)]
    clock.is_ahead(-3600)
    await renew(store)
    assert [(await store.lock_of(user(who)))[1] for who in (ALI, SARA)] == before


async def test_a_clock_that_goes_back_again_and_again_is_forgiven_each_time(
    store: RedisStore, clock: Clock
) -> None:
    for ahead in (100, 50, 10):
        clock.is_ahead(ahead + 1000)
        await renew(store)
        await store.lock(user(ALI), tenant(2))
        clock.is_ahead(ahead)
        await renew(store)
        changed = (await store.lock_of(user(ALI)))[1].changed.fraction
        assert changed < time.time() + ahead + 3


# what Redis refuses


@pytest.mark.parametrize(
    ("reported", "of_the_server"),
    [
        ("NOREPLICAS Not enough good replicas to write.", True),
        ("OOM command not allowed when used memory > 'maxmemory'.", True),
        ("MISCONF Redis is configured to save RDB snapshots, but is unable to persist", True),
        ("READONLY You can't write against a read only replica.", True),
        ("LOADING Redis is loading the dataset in memory", True),
        ("CLUSTERDOWN The cluster is down", True),
        ("TRYAGAIN Multiple keys request during rehashing of slot", True),
        ("MASTERDOWN Link with MASTER is down", True),
        ("ERR Error running script: @user_script:35: -NOREPLICAS Not enough good replicas", True),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False),
        ("ERR user_script:12: attempt to compare nil with number", False),
    ],
)
def test_errors_that_concern_the_server(reported: str, of_the_server: bool) -> None:
    """As redis-py reads them: it takes the code off those for which it has a class."""
    error = _RESP2Parser.parse_error(reported)  # type: ignore[no-untyped-call]
    assert scripts._is_of_the_server(error) is of_the_server


@pytest.mark.parametrize(
    ("setting", "bad", "good"),
    [("min-replicas-to-write", 1, 0), ("maxmemory", 1, 0)],
    ids=["NOREPLICAS", "OOM"],
)
async def test_a_redis_that_takes_no_writes_is_said_once_until_it_does(
    store: RedisStore,
    redis_socket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    bad: int,
    good: int,
) -> None:
    """/ready said that all was well, and the log grew by 22 lines a second."""
    client = redis.Redis(unix_socket_path=redis_socket)
    await say(store, "start_realty_2", ALI)
    client.config_set(setting, bad)
    try:
        for number in range(30):
            with pytest.raises(StoreUnavailable):
                await say(store, "start_realty_2", f"9715000000{number:02}")
            assert store.health().refusing
            await store.backlog()  # reading goes on, and heals nothing
            await store.claim(0, wait=0)
            assert store.health().refusing
    finally:
        client.config_set(setting, good)
    reported = [one for one in caplog.records if one.name.startswith("gateway.store")]
    assert len(reported) == 1, [one.getMessage() for one in reported]
    await store._test()  # without traffic
    assert store.health().refusing is None
    assert "Redis answers again" in caplog.text


async def test_an_operation_that_redis_refused_has_counted_nothing(
    store: RedisStore, redis_socket: str
) -> None:
    client = redis.Redis(unix_socket_path=redis_socket)
    await say(store, "start_realty_2", ALI)
    before = (await store.backlog()).by_tenant
    client.config_set("maxmemory", 1)
    try:
        for text in ("hello", "start_realty_3"):
            with pytest.raises(StoreUnavailable):
                await say(store, text, ALI)
            assert store.health().refusing
            await store.backlog()
            assert store.health().refusing, "what only reads heals nothing"
    finally:
        client.config_set("maxmemory", 0)
    await store._test()
    assert (await store.backlog()).by_tenant == before
    assert {tenant: its.users for tenant, its in (await store.tenant_totals()).items()} == {2: 1}


# long histories


async def test_a_long_history_is_read_in_pages(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client's 20,000 links blocked Redis for a second."""
    monkeypatch.setattr("gateway.store.base._HISTORY_AT_ONCE", 7)
    lid = "158764321000005@lid"
    for number in range(15):
        await say(store, f"start_realty_{number % 3 + 1}", lid)
        await say(store, f"start_realty_{number % 3 + 1}", ALI)
    now = store.now()
    shown = message("hello", lid, other_id=ALI, sent=now, raised=now, now=now)
    await store.accept(shown, by_the_rules(shown))
    whole = await store.history(user(ALI), limit=1000)
    assert len(whole) >= 30
    assert [one.id for one in whole] == sorted((one.id for one in whole), reverse=True)
    assert (await store.export(user(ALI))).history == tuple(whole)
    for limit in (1, 3, 40):
        paged, before = [], None
        while some := await store.history(user(lid), limit=limit, before=before):
            assert len(some) <= limit
            paged += some
            before = some[-1].id
        assert paged == whole
