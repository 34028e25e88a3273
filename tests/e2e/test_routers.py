"""Routers as processes on one Redis: killed, paused, and Redis itself killed."""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gateway.waha.signature import sign
from tests.conftest import FakeBackend, wait_until
from tests.e2e import campaign
from tests.e2e.nginx import nginx
from tests.e2e.redis import RedisServer
from tests.e2e.router import ROOT, Router, free_port
from tests.messages import ALI, SARA, webhook


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path / "redis").start()
    yield made
    made.stop()


@pytest.fixture
def routers(
    request: pytest.FixtureRequest, tmp_path: Path, server: RedisServer, backend: FakeBackend
) -> Iterator[list[Router]]:
    """Two, running; a parameter holds more settings."""
    made = []
    how = {"store_url": server.url, "backend_api_url": backend.url} | getattr(request, "param", {})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made.append(Router(tmp_path / name, **how))
        made[-1].start()
    yield made
    for router in made:
        router.stop()


async def post(router: Router, text: str, who: str = ALI) -> httpx.Response:
    return await asyncio.to_thread(router.post, webhook(text, who, sent=time.time()))


async def test_a_lock_made_at_one_is_served_by_the_other(
    routers: list[Router], backend: FakeBackend
) -> None:
    one, two = routers
    assert (await post(one, "start_realty_2")).json()["action"] == "new_session_locked"
    assert (await post(two, "hello")).json()["action"] == "existing_session"
    await wait_until(lambda: len(backend.received) == 2)
    assert {(r.user, r.tenant) for r in backend.received} == {(ALI, 2)}


async def test_while_redis_is_dead_webhooks_get_503_and_afterwards_nothing_is_lost(
    routers: list[Router], server: RedisServer, backend: FakeBackend
) -> None:
    one, two = routers
    backend.answer = lambda _: 500
    assert (await post(one, "start_realty_2")).status_code == 200
    server.kill()
    refused = await post(two, "hello")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    for _ in range(100):  # it finds out by its next claim
        answer = await asyncio.to_thread(httpx.get, f"{one.url}/health")
        if answer.status_code == 503:
            break
        await asyncio.sleep(0.05)
    assert answer.status_code == 503
    backend.answer = lambda _: 200
    await asyncio.to_thread(server.start)
    for _ in range(200):
        if (await post(two, "hello again")).status_code == 200:
            break
        await asyncio.sleep(0.05)
    await wait_until(lambda: len({r.body for r in backend.received}) == 2, seconds=30)
    for router in routers:  # each finds out by itself, within seconds
        for _ in range(200):
            answer = await asyncio.to_thread(httpx.get, f"{router.url}/health")
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.05)
        assert answer.json()["status"] == "healthy"


async def test_what_a_killed_router_had_in_flight_is_sent_by_the_other(
    routers: list[Router], backend: FakeBackend
) -> None:
    """Once the lease has ended, under the same key."""
    one, two = routers
    two.signal(signal.SIGSTOP)
    backend.may_answer.clear()
    assert (await post(one, "start_realty_2")).status_code == 200
    await wait_until(lambda: len(backend.received) == 1)
    one.kill()
    two.signal(signal.SIGCONT)
    await wait_until(lambda: len(backend.received) == 2, seconds=40)
    backend.may_answer.set()
    assert len({(r.key, r.body) for r in backend.received}) == 1
    assert (await post(two, "next")).status_code == 200
    await wait_until(lambda: len({r.key for r in backend.received}) == 2)


async def test_a_router_that_ends_in_order_leaves_its_claims_at_once(
    routers: list[Router], backend: FakeBackend
) -> None:
    one, two = routers
    two.signal(signal.SIGSTOP)
    backend.answer = lambda _: 500 if len(backend.received) == 1 else 200
    backend.may_answer.clear()
    assert (await post(one, "start_realty_2", SARA)).status_code == 200
    await wait_until(lambda: len(backend.received) == 1)
    one.signal(signal.SIGTERM)
    backend.may_answer.set()
    await asyncio.to_thread(one.wait)
    began = time.monotonic()
    two.signal(signal.SIGCONT)
    await wait_until(lambda: len(backend.received) == 2)
    assert time.monotonic() - began < 10, "it did not wait for a lease to end"


@pytest.fixture
def balancer(tmp_path: Path, routers: list[Router]) -> Iterator[str]:
    """The URL of an nginx in front of both, as deploy/nginx.conf has it."""
    config, port = (ROOT / "deploy" / "nginx.conf").read_text("utf-8"), free_port()
    for name, router in zip(("router-a", "router-b"), routers, strict=True):
        # An address needs no looking up, and nginx before 1.27.3 knows no `resolve`.
        config = config.replace(f"server {name}:8001 resolve", f"server 127.0.0.1:{router.port}")
    config = config.replace("listen 8001", f"listen 127.0.0.1:{port}")
    config = "daemon off;\n" + config.replace("/tmp/", f"{tmp_path}/")
    with nginx(config, tmp_path):
        yield f"http://127.0.0.1:{port}"


KEYS = {"webhook_hmac_key": "h" * 32, "admin_api_key": "a" * 32}


@pytest.mark.parametrize("routers", [KEYS], indirect=True)
async def test_behind_the_balancer_one_router_may_die(
    balancer: str, routers: list[Router], backend: FakeBackend
) -> None:
    async with httpx.AsyncClient(base_url=balancer, trust_env=False, timeout=30) as client:

        async def say(text: str) -> int:
            body = webhook(text, sent=time.time())
            signed = {"X-Webhook-Hmac": sign(body, KEYS["webhook_hmac_key"].encode())}
            return (await client.post("/webhook/waha", content=body, headers=signed)).status_code

        assert [await say(f"start_realty_2 {n}") for n in range(10)] == [200] * 10
        assert (await client.post("/webhook/waha", content=b"{}")).status_code == 401
        await asyncio.to_thread(routers[0].kill)
        assert [await say(f"text {n}") for n in range(20)] == [200] * 20, "nobody noticed"
        await wait_until(lambda: len({one.key for one in backend.received}) == 30, seconds=40)


async def test_kills_of_routers_and_of_redis_lose_nothing() -> None:
    counts = await campaign.play(3, 11, "kills", lambda _: None, routers=3)
    # When an attempt began is read in the router's log, which is after its claim in Redis; what is
    # accepted by another router in between does not call it back.
    for name in ("lost", "wrong tenant", "other key", "stray double"):
        assert counts[name] == 0, counts
    assert counts["acked"] > 200
