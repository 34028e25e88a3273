"""What becomes of the promises when Redis is slow, its disk is full, or a replica takes over."""

import asyncio
import contextlib
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


class Wire:
    """Between routers and Redis: cut, so that calls fail at once; dead, so that no answer comes."""

    def __init__(self, to: int) -> None:
        self.port = 0
        self._to = to
        self._alive = asyncio.Event()
        self._alive.set()
        self._cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return f"redis://127.0.0.1:{self.port}/0"

    def die(self) -> None:
        self._alive.clear()

    def cut(self) -> None:
        self._cut = True
        for writer in list(self._open):
            writer.transport.abort()

    def repair(self) -> None:
        self._cut = False
        self._alive.set()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        self._alive.set()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        there = await asyncio.open_connection("127.0.0.1", self._to)
        self._open |= {writer, there[1]}
        await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):
            while some := await reader.read(65_536):
                await self._alive.wait()
                writer.write(some)
                await writer.drain()
        self._open.discard(writer)
        writer.close()


@pytest.mark.parametrize("how", ["cut", "dead"])
async def test_a_network_that_fails_between_router_and_redis_loses_and_turns_nothing(
    tmp_path: Path, backend: FakeBackend, how: str
) -> None:
    """Dead for longer than a lease, while another router has its own way to Redis: what the first
    one had claimed goes on there, and what it says of it afterwards is refused."""
    port = free_port()
    server = RedisServer(tmp_path / "redis", "--port", str(port), "--bind", "127.0.0.1").start()
    wire = Wire(port)
    url = await wire.start()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    acked: list[bytes] = []
    one = Router(tmp_path / "one", store_url=url, backend_api_url=backend.url)
    two = Router(tmp_path / "two", store_url=server.url, backend_api_url=backend.url)
    try:
        for router in (one, two):
            await asyncio.to_thread(router.start)
        people = [f"97150{n:07}" for n in range(1, 6)]

        async def say(router: Router, number: int) -> None:
            for who in people:
                body = said(f"start_realty_2 {number}", who)
                await post_until_taken(router, body, seconds=60)
                acked.append(body)

        await say(one, 0)
        wire.cut() if how == "cut" else wire.die()
        refused = await post(one, said("start_realty_2 lost?", people[0]))
        assert refused.status_code == 503
        assert (await asyncio.to_thread(httpx.get, f"{one.url}/health")).status_code == 503
        for number in range(1, 4):
            await say(two, number)
        await wait_until(lambda: set(acked) <= set(backend.bodies), seconds=40)
        wire.repair()
        for number in range(4, 7):
            await say(one, number)
        await wait_until(lambda: set(acked) <= set(backend.bodies), seconds=40)
    finally:
        await wire.stop()
        await asyncio.to_thread(one.stop)
        await asyncio.to_thread(two.stop)
        server.stop()
    for who in people:
        first_seen = list(dict.fromkeys(r.body for r in backend.received if r.user == who))
        wanted = [body for body in acked if f'"from":"{who}@'.encode() in body]
        assert [body for body in first_seen if body in wanted] == wanted, "in order"
    assert {one.tenant for one in backend.received} == {2}
    keys = {one.body: one.key for one in backend.received}
    assert all(keys[received.body] == received.key for received in backend.received)


async def test_a_replica_that_was_behind_takes_over_and_nobody_is_served_wrongly(
    tmp_path: Path, backend: FakeBackend, watched: tuple[str, RedisServer, RedisServer]
) -> None:
    """What had not reached it is lost with the master, as Redis has it; no queue stands for it, no
    id that is given once more settles another's message, and who was moved is where he was."""
    url, master, replica = watched
    backend.answer = lambda _: 500
    people = [f"97150{n:07}" for n in range(1, 9)]
    with running(tmp_path, store_url=url, backend_api_url=backend.url) as router:
        for who in people:
            await post_until_taken(router, said("start_realty_2", who))
        with master.client() as client:
            assert client.wait(1, 5000) == 1
        replica.signal(signal.SIGSTOP)
        with master.client() as client:  # what comes now reaches the master alone
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        for who in people[:4]:
            await post_until_taken(router, said("start_realty_3", who))
        for who in people[4:]:
            await post_until_taken(router, said("never seen again", who))
        master.kill()
        replica.signal(signal.SIGCONT)
        later = [said("start_realty_5", who) for who in people[:4]]
        later += [said("and now?", who) for who in people[4:]]
        for body in later:
            await post_until_taken(router, body)
        before = len(backend.received)
        backend.answer = lambda _: 200
        await wait_until(lambda: set(later) <= set(backend.bodies[before:]), seconds=60)
        await wait_until(
            lambda: httpx.get(f"{router.url}/router/pending").json()["waiting"] == 0, seconds=60
        )
        reported = backend.received[before:]
        for place, body in enumerate(later):
            tenants = {one.tenant for one in reported if one.body == body}
            assert tenants == ({5} if place < 4 else {2})
        assert all(b"never seen again" not in one.body for one in reported)
