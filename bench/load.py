"""What the measurements share: bodies as WAHA sends them, a router of their own, the machine."""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

ROOT = Path(__file__).resolve().parent.parent
SINK_PORT, PEER_PORT, ROUTER_PORT = 18090, 18091, 18092
PATH = "/webhook/waha"
TARGET = f"http://127.0.0.1:{SINK_PORT}"
HOOK = "/api/webhook/waha"
CONNECTIONS, USERS, TENANTS = 64, 2_000, 50


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what was measured, what it must reach, what it was."""

    what: str
    bar: str
    got: str
    met: bool


def spread(values: list[float], form: str = ".2f") -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def machine() -> str:
    return f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores"


def body(user: int, number: int, text: str) -> bytes:
    chat, now = f"97150{user:07}@c.us", time.time()
    envelope = {
        "id": f"evt_{number:026d}",
        "timestamp": int(now * 1000),
        "event": "message",
        "session": "default",
        "metadata": {},
        "me": {"id": "971557357753@c.us", "pushName": "Gateway"},
        "payload": {
            "id": f"false_{chat}_3EB0{number:016X}",
            "timestamp": int(now),
            "from": chat,
            "fromMe": False,
            "source": "app",
            "body": text,
            "hasMedia": False,
            "media": None,
            "_data": {"key": {"remoteJid": chat, "fromMe": False}, "pushName": "x" * 400},
        },
        "engine": "NOWEB",
        "environment": {"version": "2026.7.1", "engine": "NOWEB", "tier": "CORE"},
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def router(folder: Path, **settings: str) -> subprocess.Popen[bytes]:
    """A router on ROUTER_PORT with its data and router.log in folder; its backend is TARGET."""
    ours = {"PORT": str(ROUTER_PORT), "DATA_DIR": str(folder / "data"), "BACKEND_API_URL": TARGET}
    named = {name.upper(): value for name, value in settings.items()}
    return start([sys.executable, "whatsapp_router.py"], ours | named, folder / "router.log")


def peer(name: str, folder: Path, target: str = TARGET + HOOK) -> subprocess.Popen[bytes]:
    """bench/peers/<name>, on PEER_PORT."""
    env = {"PORT": str(PEER_PORT), "TARGET": target, "DATA": str(folder)}
    command = ["node"] if name.endswith(".js") else [sys.executable]
    return start([*command, f"bench/peers/{name}"], env, folder / "peer.log")


def start(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["taskset", "-c", "0", *command],
        cwd=ROOT,
        env=os.environ | env,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def percentile(values: list[float], which: int) -> float:
    return statistics.quantiles(values, n=100)[which - 1]


def memory(pid: int, what: str = "VmRSS") -> float:
    """Resident, in MB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def peak(pid: int) -> float:
    """The most that was ever resident, in MB."""
    return memory(pid, "VmHWM")


async def listening(port: int, seconds: float = 10.0) -> None:
    for _ in range(int(seconds * 20)):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise SystemExit(f"nothing listens on port {port}")


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
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nContent-Length: "
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
