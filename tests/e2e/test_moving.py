"""A running system moves house, as the README tells it."""

import asyncio
import time
from pathlib import Path

import httpx

from tests.conftest import FakeBackend, wait_until
from tests.e2e.redis import RedisServer
from tests.e2e.router import Router
from tests.messages import webhook

USERS = 40


async def test_no_message_is_lost_and_order_stays_while_a_running_system_moves(
    tmp_path: Path, backend: FakeBackend
) -> None:
    server = RedisServer(tmp_path / "redis").start()
    backend.answer = lambda _: 500 if len(backend.received) % 2 else 200
    router = Router(tmp_path, backend_api_url=backend.url).start()
    sent: dict[str, list[bytes]] = {f"97150{number:07}": [] for number in range(USERS)}
    over = False

    async def write(who: str) -> None:
        """One message after the other, each repeated as WAHA does until it is taken."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while not over:
                text = f"start_realty_2 {len(sent[who])}" if not sent[who] else f"{len(sent[who])}"
                body = webhook(text, who, sent=time.time())
                sent[who].append(body)
                while True:
                    try:
                        answer = await client.post(f"{router.url}/webhook/waha", content=body)
                        if answer.status_code == 200:
                            break
                    except httpx.TransportError:
                        pass
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.1)

    writers = [asyncio.create_task(write(who)) for who in sent]
    await wait_until(lambda: len(backend.received) > 200)
    await asyncio.to_thread(router.stop)
    moved = await asyncio.to_thread(
        router.run, "migrate", "--from", "file:data", "--to", server.url
    )  # fmt: skip
    assert moved.returncode == 0, moved.stderr
    assert f"{USERS} locks" in moved.stdout
    refused = await asyncio.to_thread(router.run)
    assert refused.returncode != 0
    assert "has been migrated to unix:" in refused.stderr + refused.stdout
    router.env["STORE_URL"] = server.url
    backend.answer = lambda _: 200
    await asyncio.to_thread(router.start)
    before = len(backend.received)
    await wait_until(lambda: len(backend.received) > before + 200, seconds=30)
    over = True
    await asyncio.gather(*writers)
    everything = {body for bodies in sent.values() for body in bodies}
    await wait_until(lambda: everything == set(backend.bodies), seconds=30)
    for who, bodies in sent.items():
        arrived = list(dict.fromkeys(one.body for one in backend.received if one.user == who))
        assert arrived == bodies, "in order"
    assert {one.tenant for one in backend.received} == {2}
    await asyncio.to_thread(router.stop)
    server.stop()


async def test_a_move_says_what_is_wrong(tmp_path: Path) -> None:
    router = Router(tmp_path)
    for ends, reported in (
        (("file:data", "redis://127.0.0.1:9"), "there is nothing to move"),
        (("redis://127.0.0.1:9", "file:data"), "Redis does not answer"),
        (("nonsense", "file:data"), "must begin with file:"),
    ):
        done = await asyncio.to_thread(router.run, "migrate", "--from", ends[0], "--to", ends[1])
        assert (done.returncode, done.stdout) == (1, "")
        assert reported in done.stderr
        assert "Traceback" not in done.stderr
