"""The kill campaign: python -m tests.e2e.campaign --kills 100 [--seed N] [--scenario NAME]
[--routers N]

With --routers N so many share a Redis, and each kill is of one of them or of Redis itself.

Several hundred messages a second from many users, over many connections, with WAHA's rule (again
until 2xx); kill -9 at random moments, start again. At the end the backend's log is held against
what was acknowledged: nothing lost, no wrong tenant, no inversion, doubles only of what was in
flight at a kill, under the same key. When an attempt began is read in the router's own log, so that
an inversion is told exactly: y came before x although x, which stands before y in their line, was
acknowledged before y's first attempt began.

Scenarios: kills; delays (messages arrive up to a second late, in any order); outages (the router is
also paused by SIGSTOP, and the backend goes away and comes back).
"""

import argparse
import asyncio
import bisect
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

from tests.e2e.redis import RedisServer
from tests.e2e.router import Router

USERS, TENANTS, CONNECTIONS = 150, 20, 48
RATE = 300  # messages per second while the router is up


@dataclass
class Message:
    user: int
    number: int
    event_time: float  # what orders the line
    text: str
    acked: float | None = None  # Unix time, as all times here
    tenant: int | None = None  # as acknowledged; None if only the copy was


@dataclass
class Arrival:
    at: float
    tenant: int
    key: str


@dataclass
class Campaign:
    kills: int
    seed: int
    scenario: str
    folder: Path
    show: Callable[[str], None]
    how_many: int = 0  # routers on a Redis; 0: one on files
    sent: dict[int, Message] = field(default_factory=dict)
    arrivals: dict[int, list[Arrival]] = field(default_factory=lambda: defaultdict(list))
    killed: list[float] = field(default_factory=list)
    answering: bool = True
    over: bool = False

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.latest: dict[int, float] = {}
        self.locked: set[int] = set()  # users of whom a message was routed

    async def run(self) -> dict[str, int]:
        """The counts of the checker; all but acked, kills and doubles should be 0."""
        app = web.Application()
        app.router.add_post("/{path:.*}", self.backend)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        settings = {
            "backend_api_url": f"http://127.0.0.1:{port}",
            "log_level": "DEBUG",
            "log_format": "json",
        }
        self.redis = None
        if self.how_many:
            self.redis = RedisServer(self.folder / "redis").start()
            settings["store_url"] = self.redis.url
        self.routers = []
        for number in range(self.how_many or 1):
            place = self.folder / f"router{number}"
            place.mkdir()
            self.routers.append(Router(place, **settings))
            await asyncio.to_thread(self.routers[-1].start)
        sender = asyncio.create_task(self.send())
        try:
            for number in range(1, self.kills + 1):
                await asyncio.sleep(self.dice.uniform(0.05, 0.8))
                victim: Router | RedisServer = self.dice.choice(self.routers)
                await self.disturb(self.dice.choice(self.routers))
                if self.redis and self.dice.random() < 0.25:
                    victim = self.redis
                await asyncio.to_thread(victim.kill)
                await asyncio.sleep(0.05)  # what it sent with its last breath is read before that
                self.killed.append(time.time())
                await asyncio.to_thread(victim.start)
                if number % 10 == 0:
                    self.show(f"{number} kills, {self.acked} acknowledged")
            self.over, self.answering = True, True
            await asyncio.wait_for(sender, 120)
            await self.settled()
        finally:
            sender.cancel()
            for router in self.routers:
                await asyncio.to_thread(router.stop)  # it waits for our backend's answers
            if self.redis:
                self.redis.stop()
            await runner.cleanup()
        return self.check()

    @property
    def acked(self) -> int:
        return sum(message.acked is not None for message in self.sent.values())

    async def disturb(self, router: Router) -> None:
        if self.scenario != "outages":
            return
        if self.dice.random() < 0.3:
            router.signal(signal.SIGSTOP)
            await asyncio.sleep(self.dice.uniform(0.05, 0.5))
            router.signal(signal.SIGCONT)
        if self.dice.random() < 0.5:
            self.answering = not self.answering

    async def backend(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        number = int(body["payload"]["body"].split("#")[1])
        headers = request.headers
        if not self.answering:
            return web.Response(status=503)
        self.arrivals[number].append(
            Arrival(time.time(), int(headers["X-Tenant-ID"]), headers["Idempotency-Key"])
        )
        await asyncio.sleep(self.dice.uniform(0, 0.02))
        return web.Response()

    async def send(self) -> None:
        slots = asyncio.Semaphore(CONNECTIONS)
        connector = aiohttp.TCPConnector(limit=CONNECTIONS)
        posts: set[asyncio.Task[None]] = set()
        async with aiohttp.ClientSession(connector=connector) as session:
            number = 0
            while not self.over:
                await asyncio.sleep(1 / RATE)
                number += 1
                message = self.make(number)
                self.sent[number] = message
                await slots.acquire()
                task = asyncio.create_task(self.post(session, message))
                posts.add(task)
                task.add_done_callback(posts.discard)
                task.add_done_callback(lambda _: slots.release())
            await asyncio.gather(*posts)

    def make(self, number: int) -> Message:
        user = self.dice.randrange(USERS)
        # Each user's events have times of their own: WAHA's are in milliseconds.
        event_time = max(time.time(), self.latest.get(user, 0.0) + 0.002)
        first = user not in self.latest
        self.latest[user] = event_time
        link = first or self.dice.random() < 0.02
        opening = f"start_realty_{self.dice.randint(1, TENANTS)} " if link else ""
        return Message(user, number, event_time, f"{opening}#{number}")

    async def post(self, session: aiohttp.ClientSession, message: Message) -> None:
        if self.scenario == "delays":
            await asyncio.sleep(self.dice.uniform(0, 1))
        body = self.body(message)
        may_be_held = message.user not in self.locked and "start_realty" not in message.text
        while True:
            url = f"{self.dice.choice(self.routers).url}/webhook/waha"
            try:
                async with session.post(url, data=body) as answer:
                    if answer.status == 200:
                        said = await answer.json()
                        message.acked = time.time()
                        message.tenant = said.get("tenant_id")
                        assert said["status"] != "ignored", said
                        if said["status"] == "routed":
                            self.locked.add(message.user)
                        if said["status"] == "unknown_user" or (
                            said["status"] == "duplicate" and may_be_held
                        ):
                            message.acked = None  # it overtook its link and is held: not promised
                        return
                    assert answer.status == 503, await answer.text()
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.1)

    def body(self, message: Message) -> bytes:
        chat = f"97150{message.user:07}@c.us"
        envelope = {
            "id": f"evt_{message.number:026}",
            "timestamp": int(message.event_time * 1000),
            "event": "message",
            "session": "default",
            "payload": {
                "id": f"false_{chat}_3EB0{message.number:016X}",
                "timestamp": int(message.event_time),
                "from": chat,
                "fromMe": False,
                "body": message.text,
            },
        }
        return json.dumps(envelope).encode()

    async def settled(self) -> None:
        """All that was acknowledged has arrived, or nothing more does for several leases: a Redis
        with a large file takes its time to come back."""
        quiet, before = 0, -1
        while quiet < 900:
            missing = self.missing()
            if not missing:
                return
            arrived = sum(map(len, self.arrivals.values()))
            quiet = quiet + 1 if arrived == before else 0
            before = arrived
            await asyncio.sleep(0.1)
        self.report_of(self.missing())

    def report_of(self, missing: list[Message]) -> None:
        """Where each is: it waits, or is gone."""
        if self.redis is None:
            return
        with self.redis.client() as client:
            waiting = {
                json.loads(client.hget(key, "body"))["payload"]["body"].split("#")[1]: key
                for key in client.scan_iter("gw:*:d:*")
            }
            in_flight = client.hgetall("gw:{~}:in_flight")
        self.show(f"{len(waiting)} wait in Redis, in flight are {in_flight}")
        for one in missing:
            place = waiting.get(str(one.number), "nowhere")
            self.show(f"#{one.number} of user {one.user}, tenant {one.tenant}: {place!r}")

    def missing(self) -> list[Message]:
        return [
            m for m in self.sent.values() if m.acked is not None and m.number not in self.arrivals
        ]

    def check(self) -> dict[str, int]:
        counts = dict.fromkeys(
            ("lost", "wrong tenant", "inversions", "other key", "stray double"), 0
        )
        counts |= {"kills": len(self.killed), "acked": self.acked, "doubles": 0}
        counts["lost"] = len(self.missing())
        began = self.attempts()
        for number, arrivals in self.arrivals.items():
            first, expected = arrivals[0], self.sent[number].tenant
            counts["wrong tenant"] += any(
                one.tenant != (expected or first.tenant) for one in arrivals
            )
            counts["other key"] += any(one.key != first.key for one in arrivals)
            for one, again in itertools.pairwise(arrivals):
                counts["doubles"] += 1
                # When it was sent: this process may come to read it after the kill.
                sent = max((at for at in began[one.key] if at <= one.at), default=one.at)
                place = bisect.bisect_right(self.killed, sent)
                killed_between = place < len(self.killed) and self.killed[place] < again.at
                counts["stray double"] += not killed_between
        counts["inversions"] = self.inversions({key: min(times) for key, times in began.items()})
        return counts

    def inversions(self, began: dict[str, float]) -> int:
        """y before x in spite of x being acknowledged before y's first attempt began."""
        lines: dict[tuple[int, int], list[tuple[Message, Arrival]]] = defaultdict(list)
        for number, arrivals in self.arrivals.items():
            message = self.sent[number]
            lines[message.user, arrivals[0].tenant].append((message, arrivals[0]))
        found = 0
        for line in lines.values():
            line.sort(key=lambda pair: pair[1].at)
            for place, (y, y_arrival) in enumerate(line):
                for x, _ in line[place + 1 :]:
                    earlier = int(x.event_time * 1000) < int(y.event_time * 1000)
                    found += earlier and x.acked is not None and x.acked < began[y_arrival.key]
        return found

    def attempts(self) -> dict[str, list[float]]:
        """When the attempts of each key began, by the routers' logs."""
        began: dict[str, list[float]] = defaultdict(list)
        for router in self.routers:
            with router.log.open("rb") as lines:
                for line in lines:
                    if b'"delivery.attempt"' in line:
                        attempt = json.loads(line)
                        began[attempt["key"]].append(attempt["time"])
        return began


async def play(
    kills: int, seed: int, scenario: str, show: Callable[[str], None], *, routers: int = 0
) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        campaign = Campaign(kills, seed, scenario, Path(folder), show, routers)
        return await campaign.run()


SCENARIOS = ("kills", "delays", "outages")
MUST_BE_ZERO = ("lost", "wrong tenant", "inversions", "other key", "stray double")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--scenario", choices=SCENARIOS, default="kills")
    parser.add_argument("--routers", type=int, default=0, help="on a Redis; 0: one on files")
    options = parser.parse_args()
    print(f"seed {options.seed}, scenario {options.scenario}", flush=True)
    run: Awaitable[dict[str, int]] = play(
        options.kills,
        options.seed,
        options.scenario,
        lambda line: print(line, flush=True),
        routers=options.routers,
    )
    counts: dict[str, int] = uvloop.run(run)  # type: ignore[arg-type]
    print(counts)
    return any(counts[name] for name in MUST_BE_ZERO)


if __name__ == "__main__":
    sys.exit(main())
