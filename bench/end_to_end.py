"""End to end, router and plain relay side by side: make bench.

The one under test is pinned to the first core; the load (64 connections) and a sink that answers
at once share the second. Each round sends messages with ids of their own to one, then to the
other; the time runs until the sink has the last. At the end it is checked that everything
acknowledged was delivered once, and in order within each user.
"""

import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import ClassVar, cast

import uvloop
from load import (
    PATH,
    RELAY_PORT,
    ROUTER_PORT,
    SINK_PORT,
    TARGET,
    body,
    listening,
    machine,
    router,
    start,
)

ROUNDS, MESSAGES, CONNECTIONS, USERS, TENANTS = 5, 10_000, 64, 2_000, 50


class Sink(asyncio.Protocol):
    """Answers 200 to every POST; keeps user and number of each, in order of arrival."""

    got: ClassVar[dict[str, list[int]]] = defaultdict(list)
    count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            user, number = json.loads(body)["payload"]["body"].split()[:2]
            Sink.got[user].append(int(number))
            Sink.count += 1
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


async def post_all(port: int, bodies: list[list[bytes]]) -> None:
    """Each list goes over a connection of its own, one body after the other."""

    async def connection(mine: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        for one in mine:
            writer.write(f"{head}{len(one)}\r\n\r\n".encode() + one)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    await asyncio.gather(*(connection(mine) for mine in bodies))


_number = 0


def batch(messages: int, text: str = "{user} {number}") -> list[list[bytes]]:
    """messages bodies in lists for the connections; a user's stay on one connection, in order."""
    global _number
    lists: list[list[bytes]] = [[] for _ in range(CONNECTIONS)]
    for _ in range(messages):
        _number += 1
        user = _number % USERS
        said = text.format(user=user, number=_number, tenant=user % TENANTS + 1)
        lists[user % CONNECTIONS].append(body(user, _number, said))
    return lists


async def measure(port: int, lists: list[list[bytes]]) -> float:
    """Messages per second, from the first POST to the last arrival at the sink."""
    total, before = sum(map(len, lists)), Sink.count
    began = time.perf_counter()
    await post_all(port, lists)
    async with asyncio.timeout(60):
        while Sink.count < before + total:
            await asyncio.sleep(0.001)
    return total / (time.perf_counter() - began)


async def main() -> None:
    os.sched_setaffinity(0, {1})
    loop = asyncio.get_running_loop()
    sink = await loop.create_server(Sink, "127.0.0.1", SINK_PORT)
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    relay_env = {"PORT": str(RELAY_PORT), "TARGET": f"{TARGET}/api/webhook/waha"}
    processes = [
        router(folder),
        start(["bench/peers/plain_relay.py"], relay_env, folder / "relay.log"),
    ]
    try:
        await listening(ROUTER_PORT)
        await listening(RELAY_PORT)
        print(machine())
        await measure(ROUTER_PORT, batch(USERS, "start_realty_{tenant} {number}"))
        await measure(RELAY_PORT, batch(USERS))
        Sink.got.clear()
        ratios = []
        for round_ in range(1, ROUNDS + 1):
            ours = await measure(ROUTER_PORT, batch(MESSAGES))
            relay = await measure(RELAY_PORT, batch(MESSAGES))
            ratios.append(ours / relay)
            print(f"round {round_}: router {ours:6.0f}/s  plain relay {relay:6.0f}/s"
                  f"  ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
        print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        check()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
        sink.close()
        shutil.rmtree(folder)


def check() -> None:
    for user, numbers in Sink.got.items():
        assert numbers == sorted(set(numbers)), f"user {user}: out of order or twice: {numbers}"
    total = sum(map(len, Sink.got.values()))
    assert total == 2 * ROUNDS * MESSAGES, f"{total} arrived of {2 * ROUNDS * MESSAGES}"
    print(f"all {total} messages arrived once, each user's in order")


if __name__ == "__main__":
    uvloop.run(main())
