"""Stores, and a backend and a WAHA that are real servers."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.metrics import Metrics
from gateway.store import Limits, Store, open_store
from gateway.tenants.registry import Tenants
from gateway.waha.client import Waha
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.media import Media
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.sessions import Sessions
from tests.e2e.redis import RedisServer

# Tests must pass on a full laptop, too; what a full disk does has tests of its own.
LIMITS = Limits(min_free_disk_bytes=0)


async def wait_until(condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    """Return when condition() is true; fail the test if it is not within seconds."""
    for _ in range(int(seconds * 200)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"still not true after {seconds} s")


_SHARED: set[int] = set()  # processes that outlive a test


def _children() -> set[int]:
    """Processes that this one has started and that still run; none where there is no /proc."""
    found: set[int] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found |= set(map(int, children.read_text("ascii").split()))
    return found


def _command_of(pid: int) -> str:
    """Its command line; empty if it has ended, and nobody has asked how."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8").replace("\0", " ")
    return ""


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """What a test has started ends with it, also if it fails: it would be in the next one's way."""
    before = _children()
    yield
    if left := _children() - before - _SHARED:
        names = [_command_of(pid) for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if any(names):
            pytest.fail(f"left running: {names}")


@pytest.fixture(scope="session")
def redis_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server, of this test run alone."""
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    _SHARED.add(server.pid)
    yield str(server.socket)
    server.stop()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Where a store lives; the same url opened again is the same store."""
    return f"file:{tmp_path / 'data'}"


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = await open_store(store_url, LIMITS)
    yield opened
    await opened.close()


@dataclass
class Received:
    path: str
    headers: Mapping[str, str]  # whatever the case of their names
    body: bytes

    @property
    def tenant(self) -> int:
        return int(self.headers["X-Tenant-ID"])

    @property
    def user(self) -> str:
        return self.headers["X-User-ID"]

    @property
    def key(self) -> str:
        return self.headers["Idempotency-Key"]


Answer = int | web.StreamResponse


@dataclass
class FakeBackend:
    """Keeps what it received. answer: the status for a request, or a response, at once or later."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answer: Callable[[Received], Answer | Awaitable[Answer]] = lambda _: 200
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()

    @property
    def bodies(self) -> list[bytes]:
        return [one.body for one in self.received]

    async def take(self, request: web.Request) -> web.StreamResponse:
        one = Received(request.path, request.headers, await request.read())
        self.received.append(one)
        await self.may_answer.wait()
        answer = self.answer(one)
        if isinstance(answer, Awaitable):
            answer = await answer
        return web.Response(status=answer) if isinstance(answer, int) else answer


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    """A backend on a free port. Clear may_answer to let it hold its answers back."""
    fake = FakeBackend()
    app = web.Application(client_max_size=2**30)
    app.router.add_post("/{path:.*}", fake.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    fake.may_answer.set()
    await runner.cleanup()


@pytest.fixture
async def waha() -> AsyncIterator[StandIn]:
    """A WAHA on a free port, with two numbers."""
    stand_in = StandIn(
        many_sessions=True, put_seconds=0.0, configs=dict.fromkeys(("default", "sales"))
    )
    runner = await stand_in.start()
    yield stand_in
    await runner.cleanup()


@pytest.fixture
def sessions() -> Sessions:
    return Sessions(Metrics())


@pytest.fixture
async def client(waha: StandIn) -> AsyncIterator[Waha]:
    """Our side of it."""
    made = Waha(waha.url, waha.key)
    yield made
    await made.close()


def no_media() -> Media:
    """For messages without media: nobody is asked."""
    return Media(Waha("http://127.0.0.1:9/api", ""), home_session="default")


@pytest.fixture
async def lid_lookup(store: Store, client: Waha, sessions: Sessions) -> AsyncIterator[LidLookup]:
    made = LidLookup(
        client,
        store,
        sessions,
        OwnNumbers("971557357753", Tenants(None), sessions),
        Metrics(),
        home_session="default",
        keep_asking=900,
    )
    yield made
    await made.stop()
