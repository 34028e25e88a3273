"""Webhook bodies that nobody should send, and what may come of them.

    python -m tests.fuzz --bodies 1000000      the long form, against a process of its own

It ends with an error at the first answer that is neither 200 nor 400, at a lock that the text does
not ask for, when the locks at the end are not those that were answered, or when the process died.
The short form is tests/test_fuzz.py.
"""

import argparse
import asyncio
import copy
import json
import random
import re
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import httptools
import httpx

from tests.messages import PAYLOADS, webhook

EXAMPLES = [json.loads(path.read_text("utf-8")) for path in sorted(PAYLOADS.glob("*.json"))]
LINKS = [
    "start_realty_2",
    "START_REALTY_3",
    "start_realty_۴",
    "hello start_realty_5 bye",
    "\u200estart_realty_06",
    "start_realty_7 start_realty_8",
    "start_realty_0",
    "start_realty_2147483648",
    "start_realty_99999999999",
    "start_realty_2x",
    "xstart_realty_2",
    "startrealty2",
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1e308, 10**40, -(10**40), 0.5, 2**63, 1e-9),
    *(
        "",
        "\0",
        "\ud83d",
        "x" * 5000,
        "\u202e",
        "💥",
        "null",
        "@",
        "@c.us",
        "0@c.us",
        "true_",
        "_" * 9,
    ),
    *("status@broadcast", "1@g.us", "1@newsletter", "971557357753@c.us", "message", "message.any"),
    *("false_971501234567@c.us_X", "true_971501234567@c.us_X", "../../etc/passwd", "%s%n", "'; --"),
    *([], {}, [[]], {"a": {"b": None}}, [None] * 100, {"": ""}),
]
# Far deeper than any parser goes: at 2,000 it depends on the stack, and Hypothesis gives more.
DEEP = b"[" * 20_000 + b"]" * 20_000
RAW = [b"NaN", b"1e999", b"9" * 5000, DEEP, b'{"a":' * 50 + b"1" + b"}" * 50]
MARK = "\ufffd raw"
_CALLERS = 32


def body(draw: Random) -> bytes:
    """A body made with draw's dice: raw bytes, a damaged one, or an event with odd parts."""
    kind = draw.random()
    if kind < 0.05:
        return draw.randbytes(draw.randrange(200))
    event = _event(draw)
    for _ in range(draw.choice([0, 1, 1, 2, 3, 5])):
        _spoil(event, draw)
    text = json.dumps(event, ensure_ascii=draw.random() < 0.5, separators=(",", ":"))
    if draw.random() < 0.1:
        text = _double_a_key(text, draw)
    data = text.encode(draw.choice(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-32"]), "replace")
    while (mark := json.dumps(MARK).encode()) in data or (mark := f'"{MARK}"'.encode()) in data:
        data = data.replace(mark, draw.choice(RAW), 1)
    return _damaged(data, draw) if kind < 0.15 else data


def _event(draw: Random) -> dict[str, Any]:
    if draw.random() < 0.3:
        chosen: dict[str, Any] = json.loads(json.dumps(draw.choice(EXAMPLES)))
        return chosen
    number = draw.randrange(500)
    person = f"9715{number:08}" if number % 5 else f"1587643210{number:05}@lid"
    event: dict[str, Any] = json.loads(
        webhook(
            draw.choice(LINKS) if draw.random() < 0.5 else draw.choice(["hello", "", None]),
            person,
            bare_id=f"{draw.getrandbits(64):016X}",
            own=draw.random() < 0.1,
            event=draw.choice(["message", "message", "message", "message.any", "message.ack"]),
            sent=time.time() - draw.choice([0, 0, 0, 60, 1e6, -1e6]),
            other_id=f"9715{draw.randrange(500):08}" if draw.random() < 0.1 else None,
        )
    )
    return event


def _spoil(event: dict[str, Any], draw: Random) -> None:
    """Replace, delete or move one part, at whatever depth."""
    holder: Any = event
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            break
        holder = inner
    what = draw.random()
    if what < 0.6:
        holder[key] = copy.deepcopy(draw.choice(ODD))
    elif what < 0.7:
        holder[key] = MARK
    elif what < 0.8:
        holder[key] = draw.choice(LINKS)
    elif what < 0.9:
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw.choice(["body", "from", "id", "fromMe", "event", "session"])] = holder.pop(key)


def _double_a_key(text: str, draw: Random) -> str:
    key, value = draw.choice([("event", "message"), ("payload", {}), ("session", "x"), ("id", "y")])
    pair = f"{json.dumps(key)}:{json.dumps(value)}"
    return f"{{{pair},{text[1:]}" if draw.random() < 0.5 else f"{text[:-1]},{pair}}}"


def _damaged(data: bytes, draw: Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(spoiled) + 1)
        match draw.randrange(4):
            case 0:
                spoiled[at : at + 1] = draw.randbytes(1)
            case 1:
                del spoiled[at : at + draw.randrange(20)]
            case 2:
                spoiled[at:at] = draw.choice(
                    [b"\0", b"\xff", b"{", b'"', b"\\", b"\xed\xa0\xbd", b","]
                )
            case _:
                del spoiled[at:]
    return bytes(spoiled)


class Locks:
    """What the router answered, held against the rules as told here once more."""

    def __init__(self) -> None:
        self.given: dict[str, set[int]] = {}  # by user
        self.paired: set[str] = set()  # numbers that stood in a body with a second id
        self.answers: dict[str, int] = {}  # by kind

    def check(self, sent: bytes, status: int, answer: bytes) -> None:
        assert status in (200, 400), f"{status} {answer!r} to {sent!r}"
        said = json.loads(answer)
        kind = f"{status} {said.get('action') or said.get('reason') or said.get('status') or ''}"
        self.answers[kind] = self.answers.get(kind, 0) + 1
        if b"Alt" in sent or b"senderPn" in sent:
            self.paired.update(re.findall(r"\d{5,20}", sent.decode("utf-8", "replace")))
        if said.get("action") == "new_session_locked":
            assert _may_lock(sent, said["user"], said["tenant_id"]), f"{answer!r} to {sent!r}"
            self.given.setdefault(said["user"], set()).add(said["tenant_id"])

    def check_stored(self, stored: dict[str, int]) -> None:
        """The locks at the end. A lock follows the person from one id to the other: who was ever
        shown with two may have any that was answered, the others only their own."""
        everyone = set().union(*self.given.values())
        for user, tenant in stored.items():
            bare = user.rpartition("/")[2]
            paired = bare.removesuffix("@lid") in self.paired
            allowed = everyone if paired else self.given.get(bare, set())
            assert tenant in allowed, f"{user}: {tenant} was not answered"


def _may_lock(sent: bytes, user: str, tenant: int) -> bool:
    event = json.loads(sent.decode("utf-8-sig", "surrogatepass"))
    payload = event["payload"]
    text = "".join(c for c in payload["body"] if unicodedata.category(c) != "Cf")
    links = re.findall(r"(?<!\w)start_realty_(\d{1,10})(?!\w)", text, re.IGNORECASE)
    number = user.rpartition("/")[2].removesuffix("@lid")
    return (
        event["event"] in ("message", "message.any")
        and payload.get("fromMe") is not True
        and not re.match("true_[^_@]+@", str(payload.get("id")))
        and tenant in map(int, links)
        and 0 < tenant <= 2_147_483_647
        # Who writes by LID may be known by his phone.
        and (number in json.dumps(payload) or "@lid" in json.dumps(payload))
    )


class _Sink(asyncio.Protocol):
    """A backend that takes everything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")  # type: ignore[attr-defined]


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> tuple[int, bytes]:
    head = f"POST /webhook/waha HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(answer.split()[1]), await reader.readexactly(length)


async def attack(folder: Path, bodies: int, seed: int) -> None:
    from tests.e2e.router import Router

    sink = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", 0)
    port = sink.sockets[0].getsockname()[1]
    router = Router(folder, backend_api_url=f"http://127.0.0.1:{port}", log_level="ERROR")
    await asyncio.to_thread(router.start)
    numbers = iter(range(bodies))
    locks = Locks()
    memory: list[float] = []
    started = time.monotonic()

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        for number in numbers:
            data = body(Random(f"{seed} {number}"))
            locks.check(data, *await _post(reader, writer, data))
            if number % max(1, bodies // 20) == 0:
                memory.append(router.megabytes())
                done = number / (time.monotonic() - started)
                print(f"{number:>9,} bodies, {done:,.0f}/s, {memory[-1]:.0f} MB", file=sys.stderr)
        writer.close()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_CALLERS):
                group.create_task(caller())
        stored: dict[str, int] = {}
        after: str | None = ""
        while after is not None:
            url = f"{router.url}/router/stats?limit=10000{f'&after={after}' if after else ''}"
            page = (await asyncio.to_thread(httpx.get, url)).json()
            stored |= page["mappings"]
            after = page.get("next")
        locks.check_stored(stored)
    finally:
        await asyncio.to_thread(router.stop)
        sink.close()
    assert router.wait() == 0
    for kind, count in sorted(locks.answers.items(), key=lambda item: -item[1]):
        print(f"{count:>9,} {kind}")
    print(
        f"{bodies:,} bodies in {time.monotonic() - started:.0f} s with seed {seed}:"
        f" no 5xx, no crash, {len(stored)} locks, all asked for;"
        f" {memory[len(memory) // 4]:.0f} MB after a quarter, {memory[-1]:.0f} MB at the end"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bodies", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(attack(Path(folder), options.bodies, options.seed))


if __name__ == "__main__":
    main()
