"""What a Redis shared by routers costs.

redis      end to end, a router on Redis beside one on files; Redis' own processor time a message
move       a folder of 1,000,000 locks, and one of as many waiting messages, move into Redis: how
           long that takes, and Redis' memory
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from load import ROOT, ROUTER_PORT, SINK_PORT, USERS, Row, Sink, batch, router, spread
from size import OTHER_PORT, fill_locks, fill_waiting
from throughput import LINKS, MESSAGES, ROUNDS, counted, delivered, running

sys.path.insert(0, str(ROOT))
from gateway.store.migration import migrate
from tests.e2e.redis import RedisServer


async def shared(folder: Path) -> AsyncIterator[Row]:
    sink = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", SINK_PORT)
    server = RedisServer(folder / "server").start()
    for name in ("files", "redis"):
        (folder / name).mkdir()
    try:
        async with (
            running(router(folder / "files"), ROUTER_PORT),
            running(
                router(folder / "redis", store_url=server.url, port=str(OTHER_PORT)), OTHER_PORT
            ),
        ):
            for port in (ROUTER_PORT, OTHER_PORT):
                await delivered(port, batch(USERS, LINKS))
            ratios, costs = [], []
            for round_ in range(1, ROUNDS + 1):
                files = await counted(ROUTER_PORT, MESSAGES)
                before = _processor_seconds(server)
                ours = await counted(OTHER_PORT, MESSAGES)
                costs.append((_processor_seconds(server) - before) / MESSAGES * 1e6)
                ratios.append(ours / files)
                print(
                    f"  round {round_}: on Redis {ours:6.0f}/s, on files {files:6.0f}/s, ratio"
                    f" {ratios[-1]:.2f}; Redis took {costs[-1]:.0f} µs a message",
                    flush=True,
                )
    finally:
        server.stop()
        sink.close()
    ratio, cost = sorted(ratios)[ROUNDS // 2], sorted(costs)[ROUNDS // 2]
    yield Row("end to end, one router on Redis ÷ on files", "≥ 0.5", spread(ratios), ratio >= 0.5)
    yield Row("Redis' processor time a message", "≤ 100 µs", f"{spread(costs, '.0f')} µs",
              cost <= 100)  # fmt: skip


def _processor_seconds(server: RedisServer) -> float:
    with server.client() as client:
        used = client.info("cpu")
    return float(used["used_cpu_sys"] + used["used_cpu_user"])


async def move(folder: Path) -> AsyncIterator[Row]:
    count = 1_000_000
    for name, fill in (("locks", fill_locks), ("waiting messages of 1 kB", fill_waiting)):
        place = folder / name.split()[0]
        fill(place, count)
        server = RedisServer(place / "server", "--appendfsync", "everysec").start()
        try:
            began = time.monotonic()
            await migrate.migrate(f"file:{place / 'data'}", server.url)
            took = time.monotonic() - began
            with server.client() as client:
                used = client.info("memory")["used_memory"] / 2**20
        finally:
            server.stop()
        yield Row(f"{count:,} {name} move into Redis", "said", f"{took:.0f} s", met=True)
        yield Row(f"… Redis' memory for {count:,} {name}", "said", f"{used:.0f} MB", met=True)
