"""What becomes of the promises when Redis is slow, its disk is full, or a replica takes over."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import FakeBackend, wait_until
from tests.e2e.redis import RedisServer, executable
from tests.e2e.router import Router, free_port, running
from tests.messages import ALI, webhook


async def post(router: Router, body: bytes) -> httpx.Response:
    return await asyncio.to_thread(router.post, body)


async def post_until_taken(router: Router, body: bytes, *, seconds: float = 30) -> int:
    """Post as WAHA does, again until 2xx; how often it was refused."""
    deadline, refused = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        answer = await post(router, body)
        if answer.status_code == 200:
            return refused
        assert answer.status_code == 503
        refused += 1
        await asyncio.sleep(0.1)
    raise AssertionError(f"refused for {seconds} s")


def said(text: str, who: str = ALI) -> bytes:
    return webhook(text, who, sent=time.time())


async def test_a_slow_redis_is_waited_for_and_doubles_nothing(
    tmp_path: Path, backend: FakeBackend
) -> None:
    server = RedisServer(tmp_path / "redis").start()
    with running(tmp_path, store_url=server.url, backend_api_url=backend.url) as router:
        assert (await post(router, said("start_realty_2"))).status_code == 200
        await wait_until(lambda: len(backend.received) == 1)
        server.signal(signal.SIGSTOP)
        posts = [asyncio.create_task(post(router, said(f"text {n}"))) for n in range(5)]
        await asyncio.sleep(2)
        assert not any(one.done() for one in posts), "nothing is promised meanwhile"
        server.signal(signal.SIGCONT)
        assert {(await one).status_code for one in posts} == {200}
        await wait_until(lambda: len(backend.received) >= 6)
    assert len({one.key for one in backend.received}) == len(backend.received) == 6
    server.stop()


async def test_a_full_disk_under_redis_takes_nothing_that_was_acknowledged(
    tmp_path: Path, backend: FakeBackend
) -> None:
    """With appendfsync always Redis ends itself rather than answer what it could not write."""
    backend.answer = lambda _: 500
    server = RedisServer(tmp_path / "redis", largest_file=400).start()
    acked: list[bytes] = []
    with running(tmp_path, store_url=server.url, backend_api_url=backend.url) as router:
        for number in range(500):
            body = said(f"start_realty_2 {number}", f"97150{number:07}")
            if (await post(router, body)).status_code != 200:
                break
            acked.append(body)
        assert 10 < len(acked) < 500
        assert server.wait() != 0
        server.largest_file = None
        await asyncio.to_thread(server.start)
        backend.answer = lambda _: 200
        await post_until_taken(router, body)
        await wait_until(lambda: {*acked, body} <= set(backend.bodies), seconds=30)
    server.stop()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[str, RedisServer, RedisServer]]:
    """A URL of a Sentinel; the master it watches, and that one's replica."""
    ports = [free_port() for _ in range(3)]
    master, replica = (
        RedisServer(tmp_path / f"redis{port}", "--port", str(port), "--bind", "127.0.0.1", *more)
        for port, more in (
            (ports[0], ()),
            (ports[1], ("--replicaof", "127.0.0.1", str(ports[0]))),
        )
    )
    master.start()
    replica.start()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {ports[2]}\nbind 127.0.0.1\ndir {tmp_path}\n"
        f"sentinel monitor realty 127.0.0.1 {ports[0]} 1\n"
        "sentinel down-after-milliseconds realty 500\nsentinel failover-timeout realty 3000\n"
    )
    sentinel = subprocess.Popen(
        [executable(), str(config), "--sentinel"], stdout=subprocess.DEVNULL
    )
    with replica.client() as client:
        for _ in range(400):
            if client.info("replication").get("master_link_status") == "up":
                break
            time.sleep(0.025)
    yield f"redis+sentinel://127.0.0.1:{ports[2]}/realty", master, replica
    sentinel.terminate()
    sentinel.wait(10)
    replica.stop()
    master.stop()


async def test_a_replica_takes_over_with_all_that_had_reached_it(
    tmp_path: Path, backend: FakeBackend, watched: tuple[str, RedisServer, RedisServer]
) -> None:
    url, master, replica = watched
    backend.answer = lambda _: 500
    with running(tmp_path, store_url=url, backend_api_url=backend.url) as router:
        bodies = [said(f"start_realty_2 {n}", f"97150{n:07}") for n in range(20)]
        for body in bodies:
            await post_until_taken(router, body)
        with master.client() as client:
            assert client.wait(1, 5000) == 1, "the replica has it all"
        master.kill()
        assert await post_until_taken(router, said("start_realty_3")) > 0
        with replica.client() as client:
            assert client.info("replication")["role"] == "master"
        backend.answer = lambda _: 200
        await wait_until(lambda: len(set(backend.bodies)) == 21, seconds=40)
        assert (await post(router, bodies[0])).json()["status"] == "duplicate"
