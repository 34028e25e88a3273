"""What must not grow: cost, memory and start with many locks, keys and messages.

locks      new locks, so many a second, while 100,000 and 1,000,000 stand, and others write
cost       a message with 1,000 and with 1,000,000 locks, with 4,000,000 seen keys and with none
start      until it listens, with 1,000,000 locks and 100,000 waiting messages
"""

import asyncio
import hashlib
import json
import sqlite3
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from load import (
    PATH,
    ROOT,
    ROUTER_PORT,
    TENANTS,
    USERS,
    Row,
    batch,
    body,
    memory,
    peak,
    percentile,
    router,
    spread,
)
from throughput import LINKS, NOBODY, answered, running

sys.path.insert(0, str(ROOT))
from gateway.domain.model import DeliveryContent
from gateway.store.files import deliveries, journal

ROUNDS = 5


def fill_locks(folder: Path, count: int) -> None:
    """A predecessor's file with so many locks, beside those of the load's users."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    many = {f"9665{number:08}": number % 1000 + 1 for number in range(count)}
    (data / "router_mappings.json").write_text(json.dumps(many))


def fill_waiting(folder: Path, count: int) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    connection = _database(folder)
    now = time.time()
    for number in range(count):
        user, tenant = number % 100_000, number % 1_000 + 1
        content = body(user, number, f"x {number}")
        one = DeliveryContent(now + number / 1e6, now, f"{number:032}", f"{number}", (), content)
        deliveries.add(connection, one, tenant, f"97150{user:07}", None)  # type: ignore[arg-type]
    connection.execute("COMMIT")
    connection.close()


def fill_seen(folder: Path, count: int) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    connection = _database(folder)
    table = f"dedup_{int(time.time() // (48 * 3600)) % 3}"
    keys = sorted(hashlib.sha256(f"{number}".encode()).digest()[:16] for number in range(count))
    connection.executemany(f"INSERT INTO {table} VALUES (?, 1, 0, 1)", ((key,) for key in keys))
    connection.execute("COMMIT")
    connection.close()


def _database(folder: Path) -> sqlite3.Connection:
    connection = journal.connect(folder / "data" / "router.db")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("BEGIN")
    return connection


async def locks(folder: Path) -> AsyncIterator[Row]:
    for count, bar, slowest in ((100_000, 1_000, 50), (1_000_000, 150, 100)):
        place = folder / str(count)
        fill_locks(place, count)
        process = router(place, backend_api_url=NOBODY)
        async with running(process, ROUTER_PORT, seconds=60):
            # A million locks of a predecessor's open the history at the first start.
            await answered(ROUTER_PORT, batch(USERS, LINKS))
            await asyncio.sleep(5)
            rest = memory(process.pid)
            others = asyncio.create_task(_acks(20.0))
            new = await _new_locks(bar, 20.0)
            acks = await others
            worst, most, stall = percentile(acks, 99), peak(process.pid), await _longest_stall()
            print(f"  {count:,} locks: {new:.0f} new ones per second; others' ack p50"
                  f" {percentile(acks, 50):.1f} ms, p99 {worst:.1f} ms;"
                  f" longest stall {stall * 1e3:.0f} ms; {rest:.0f} MB before, {most:.0f} MB"
                  " at most", flush=True)  # fmt: skip
            yield Row(
                f"new locks, {count:,} stand", f"≥ {bar}/s", f"{new:.0f}/s", new >= 0.98 * bar
            )
            yield Row("… others' ack p99 meanwhile", f"≤ {slowest} ms", f"{worst:.1f} ms",
                      worst <= slowest)  # fmt: skip
            if count == 1_000_000:
                yield Row("memory with 1,000,000 locks, at rest", "≤ 250 MB", f"{rest:.0f} MB",
                          rest <= 250)  # fmt: skip
                yield Row("… peak", "≤ 320 MB", f"{most:.0f} MB", most <= 320)


async def _longest_stall() -> float:
    url = f"http://127.0.0.1:{ROUTER_PORT}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        text = await answer.text()
    return float(text.partition("\ngateway_event_loop_longest_stall_seconds ")[2].split()[0])


async def _new_locks(rate: float, seconds: float) -> float:
    """New users' links, so many a second, each when its time has come; answered per second."""
    begin, posts = time.monotonic(), []

    async def one(session: aiohttp.ClientSession, user: int) -> None:
        data = body(user, user, f"start_realty_{user % TENANTS + 1}")
        async with session.post(f"http://127.0.0.1:{ROUTER_PORT}{PATH}", data=data) as answer:
            assert "new_session_locked" in await answer.text()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=256)) as session:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
            posts.append(asyncio.create_task(one(session, 5_000_000 + next(_unique))))
        await asyncio.gather(*posts)
    return len(posts) / (time.monotonic() - begin)


async def _acks(seconds: float, rate: float = 50.0) -> list[float]:
    """Ack times in ms of users with a lock, so many a second."""
    acks: list[float] = []
    begin, posts = time.monotonic(), []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        data = body(number % USERS, 9_000_000 + next(_unique), "hello")
        began = time.perf_counter()
        async with session.post(f"http://127.0.0.1:{ROUTER_PORT}{PATH}", data=data) as answer:
            assert "existing_session" in await answer.text()
        acks.append((time.perf_counter() - began) * 1e3)

    async with aiohttp.ClientSession() as session:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
            posts.append(asyncio.create_task(one(session, number)))
        await asyncio.gather(*posts)
    return acks


_unique = iter(range(10**9))


async def cost(folder: Path) -> AsyncIterator[Row]:
    """Two routers side by side, one of which has much of something; accepting alone."""
    for name, few, much, bar in (
        ("1,000,000 locks ÷ 1,000", 1_000, 1_000_000, "0.90-1.10"),
        ("4,000,000 seen keys", 0, 4_000_000, "≤ +20 µs"),
    ):
        a, b = folder / f"few{much}", folder / f"much{much}"
        if "locks" in name:
            fill_locks(a, few)
            fill_locks(b, much)
        else:
            fill_seen(a, few)
            fill_seen(b, much)
        ratios, added = [], []
        async with (
            running(router(a, backend_api_url=NOBODY), ROUTER_PORT),
            running(
                router(b, backend_api_url=NOBODY, port=str(OTHER_PORT)), OTHER_PORT, seconds=60
            ),
        ):
            for port in (ROUTER_PORT, OTHER_PORT):
                await answered(port, batch(USERS, LINKS))
            await asyncio.sleep(5)
            for round_ in range(1, ROUNDS + 1):
                one = 1e6 / await answered(ROUTER_PORT, batch(10_000))
                other = 1e6 / await answered(OTHER_PORT, batch(10_000))
                ratios.append(other / one)
                added.append(other - one)
                print(f"  {name}, round {round_}: {one:.0f} µs a message, {other:.0f} µs with them,"
                      f" ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
        if "locks" in name:
            met = 0.9 <= statistics.median(ratios) <= 1.1
            yield Row(f"cost per message, {name}", bar, spread(ratios), met)
        else:
            met = statistics.median(added) <= 20
            yield Row(f"cost per message, {name}", bar, f"{spread(added, '+.0f')} µs", met)


OTHER_PORT = ROUTER_PORT + 1


async def start(folder: Path) -> AsyncIterator[Row]:
    fill_locks(folder, 1_000_000)
    fill_waiting(folder, 100_000)
    times = []
    for round_ in range(4):
        began = time.monotonic()
        process = router(folder, backend_api_url=NOBODY)
        async with running(process, ROUTER_PORT, seconds=60):
            times.append(time.monotonic() - began)
        print(f"  start {round_}: {times[-1]:.2f} s", flush=True)
    # The first one takes a predecessor's locks into the history, once.
    later = times[1:]
    yield Row("start, 1,000,000 locks, 100,000 waiting", "≤ 3 s", f"{spread(later)} s",
              statistics.median(later) <= 3)  # fmt: skip
