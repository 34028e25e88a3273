"""How many messages a second, side by side with others.

forward    end to end: the time runs until the sink has the last message
accept     the answer alone: the router's circuit breaker is open, an empty endpoint keeps nothing
"""

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

from load import (
    PEER_PORT,
    ROOT,
    ROUTER_PORT,
    SINK_PORT,
    USERS,
    Row,
    Sink,
    batch,
    listening,
    peer,
    post_all,
    router,
    spread,
)

ROUNDS = 5
# name: file, messages a round, how many times as fast the router must be
PEERS = {
    "plain relay": ("plain_relay.py", 10_000, 1.0),
    "tuned relay": ("tuned_relay.py", 10_000, 1.0),
    "Express + axios": ("express/server.js", 10_000, 1.8),
    "literal version": ("literal.py", 150, 60.0),
}
MESSAGES = 10_000
NOBODY = "http://127.0.0.1:9"


@contextlib.asynccontextmanager
async def running(
    process: subprocess.Popen[bytes], port: int, seconds: float = 10.0
) -> AsyncIterator[None]:
    """process is killed at the end; seconds: until it must listen."""
    try:
        await listening(port, seconds)
        yield
    finally:
        process.terminate()
        process.wait(40)


async def delivered(port: int, lists: list[list[bytes]]) -> float:
    """Messages per second, from the first POST to the last arrival at the sink."""
    total, before = sum(map(len, lists)), Sink.count
    began = time.perf_counter()
    await post_all(port, lists)
    async with asyncio.timeout(120):
        while Sink.count < before + total:
            await asyncio.sleep(0.001)
    return total / (time.perf_counter() - began)


async def answered(port: int, lists: list[list[bytes]]) -> float:
    """Messages per second, from the first POST to the last answer."""
    began = time.perf_counter()
    await post_all(port, lists)
    return sum(map(len, lists)) / (time.perf_counter() - began)


LINKS = "start_realty_{tenant} {number}"


async def forward(folder: Path) -> AsyncIterator[Row]:
    sink = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", SINK_PORT)
    async with running(router(folder), ROUTER_PORT):
        await delivered(ROUTER_PORT, batch(USERS, LINKS))
        for name, (file, messages, bar) in PEERS.items():
            if why := _missing(file):
                yield Row(f"end to end ÷ {name}", f"≥ {bar}", why, met=False)
                continue
            async with running(peer(file, folder), PEER_PORT):
                # Who keeps locks must know the users; unpaced, 2,000 would take a minute.
                await delivered(PEER_PORT, batch(min(USERS, messages), LINKS))
                ratios = []
                for round_ in range(1, ROUNDS + 1):
                    ours = await counted(ROUTER_PORT, MESSAGES)
                    text = LINKS if file == "literal.py" else "{user} {number}"
                    theirs = await delivered(PEER_PORT, batch(messages, text))
                    ratios.append(ours / theirs)
                    print(f"  round {round_}: router {ours:6.0f}/s, {name} {theirs:6.0f}/s,"
                          f" ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
            median = sorted(ratios)[ROUNDS // 2]
            yield Row(f"end to end ÷ {name}", f"≥ {bar}", spread(ratios), median >= bar)
    sink.close()


async def counted(port: int, messages: int) -> float:
    """As delivered(), and each message came once and in the order of its user."""
    Sink.got.clear()
    rate = await delivered(port, batch(messages))
    for user, numbers in Sink.got.items():
        assert numbers == sorted(set(numbers)), f"user {user}: out of order or twice: {numbers}"
    assert sum(map(len, Sink.got.values())) == messages
    return rate


def _missing(file: str) -> str | None:
    if not file.endswith(".js"):
        return None
    if not shutil.which("node"):
        return "not measured: node is not installed"
    modules = (ROOT / "bench" / "peers" / file).parent / "node_modules"
    return None if modules.exists() else f"not measured: npm install in {modules.parent}"


async def accept(folder: Path) -> AsyncIterator[Row]:
    async with (
        running(router(folder, backend_api_url=NOBODY), ROUTER_PORT),
        running(peer("empty.py", folder), PEER_PORT),
    ):
        await answered(ROUTER_PORT, batch(USERS, LINKS))
        await answered(PEER_PORT, batch(USERS))
        ratios = []
        for round_ in range(1, ROUNDS + 1):
            ours = await answered(ROUTER_PORT, batch(MESSAGES))
            theirs = await answered(PEER_PORT, batch(MESSAGES))
            ratios.append(ours / theirs)
            print(f"  round {round_}: router {ours:6.0f}/s, empty endpoint {theirs:6.0f}/s,"
                  f" ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
    log = (folder / "router.log").read_text("utf-8")
    assert "The backend is away" in log, "the breaker was to be open"
    median = sorted(ratios)[ROUNDS // 2]
    yield Row("accepting ÷ empty endpoint", "≥ 1.0", spread(ratios), median >= 1.0)
