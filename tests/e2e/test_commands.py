"""doctor, connect-waha, link and a tenant's move as a person runs them: the process, its status."""

import asyncio
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from examples.waha import StandIn
from gateway.tenants import qr
from tests.conftest import FakeBackend, wait_until
from tests.e2e.router import ROOT, Router, running
from tests.messages import webhook

KEYS = {"webhook_hmac_key": "h" * 32, "admin_api_key": "a" * 32, "waha_api_key": "k" * 32}


@pytest.fixture
def router(tmp_path: Path, waha: StandIn, backend: FakeBackend) -> Iterator[Router]:
    """Started by the test."""
    waha.key = KEYS["waha_api_key"]
    how = KEYS | {"waha_api_url": waha.url, "backend_api_url": backend.url}
    made = Router(tmp_path, **how)
    yield made
    made.stop()


async def run(router: Router, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(router.run, *arguments)


async def test_all_is_well_with_what_connect_waha_set_up(
    router: Router, backend: FakeBackend
) -> None:
    await asyncio.to_thread(router.start)
    before = await run(router, "doctor")
    assert before.returncode == 1
    assert "WRONG webhook: no webhook to http://127.0.0.1:" in before.stdout
    connected = await run(router, "connect-waha", "--yes")
    assert connected.returncode == 0, connected.stderr
    assert (await run(router, "say", "971501234567", "start_realty_2")).returncode == 0
    after = await run(router, "doctor")
    assert after.returncode == 0, after.stdout
    for line in (
        "ok    session default: WORKING",
        "ok    events of default: the last ",
        "ok    webhook: once, to http://127.0.0.1:",
        f"ok    backend {backend.url}/api/webhook/waha: answers",
        "is ready, 1 users locked",
        "ok    clock, WAHA's: agrees with ours",
    ):
        assert line in after.stdout
    shown = before.stdout + connected.stdout + after.stdout
    assert not [key for key in KEYS.values() if key in shown]


async def test_the_doctor_finds_what_is_wrong_and_names_the_cure(
    router: Router, waha: StandIn, backend: FakeBackend
) -> None:
    waha.statuses["default"] = "SCAN_QR_CODE"
    router.env["BACKEND_API_URL"] = "http://127.0.0.1:9"
    (router.folder / "data").mkdir()
    (router.folder / "data" / "tenants.json").write_text(
        json.dumps({"2": {"backend_url": f"{backend.url}/two"}})
    )
    found = await run(router, "doctor")
    assert found.returncode == 1
    for line in (
        f"WRONG router: http://127.0.0.1:{router.port}/health: ",
        "WRONG session default: SCAN_QR_CODE -> scan the QR code",
        "WRONG backend http://127.0.0.1:9/api/webhook/waha: ",
        f"ok    backend {backend.url}/two: answers",
        "ok    tenants.json: 1 tenants",
        "mind  events of default: none since the router's start",
    ):
        assert line in found.stdout
    waha.key = "another"
    (router.folder / "data" / "tenants.json").write_text("{")
    del router.env["WEBHOOK_HMAC_KEY"]
    found = await run(router, "doctor")
    assert "-> set WAHA_API_KEY" in found.stdout
    assert "WRONG tenants.json: " in found.stdout
    assert "mind  webhook access: the key alone" in found.stdout


async def test_a_link_at_the_shell_and_its_card(router: Router) -> None:
    card = router.folder / "out.svg"
    made = await run(router, "link", "2", "--text", "سلام", "--qr", str(card))
    address = "https://wa.me/971557357753?text=start_realty_2%0A%D8%B3%D9%84%D8%A7%D9%85"
    assert (made.returncode, made.stdout.strip()) == (0, address)
    assert card.read_bytes() == qr.svg(address, size=512)
    for arguments, status, reported in (
        (("0",), 2, "0 is no tenant"),
        (("2", "--qr", "card.pdf"), 2, ".svg or .png"),
        (("2", "--qr", "x.svg", "--text", "ا" * 1000), 1, "more than a QR code holds"),
        (("2", "--qr", "nowhere/x.svg"), 1, "nowhere"),
    ):
        refused = await run(router, "link", *arguments)
        assert (refused.returncode, reported in refused.stderr) == (status, True), refused.stderr
    assert not (router.folder / "x.svg").exists()


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.3, 0.6, 1.2])
def test_a_move_that_is_killed_moved_all_or_none(tmp_path: Path, delay: float) -> None:
    users = 100_000
    (tmp_path / "data").mkdir()
    locks = {str(971_500_000_000 + number): 2 for number in range(users)}
    (tmp_path / "data" / "router_mappings.json").write_text(json.dumps(locks))
    router = Router(tmp_path).start()
    for text in ("tried", "fresh"):  # nobody listens, so the second never has its turn
        router.post(webhook(text, "971500000007", sent=time.time()))
    moving = subprocess.Popen(
        ["curl", "-s", "-X", "POST", f"{router.url}/router/tenants/2/move",
         "-H", "Content-Type: application/json", "-d", '{"to": 7}'],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(delay)
    router.kill()
    moving.wait(30)
    with running(tmp_path) as again, httpx.Client(base_url=again.url, timeout=30) as client:
        stats = client.get("/router/stats?limit=1").json()
        assert (stats["total_locked_users"], stats["unique_tenants"]) == (users, 1)
        (home,) = set(stats["mappings"].values())
        waiting = client.get("/router/pending").json()["tenants"]
        if home == 7:
            waiting.sort(key=lambda one: one["tenant_id"])
            assert waiting == [{"tenant_id": tenant, "waiting": 1} for tenant in (2, 7)]
        else:
            assert waiting == [{"tenant_id": 2, "waiting": 2}]
        reported = client.get("/router/user/971500000007/history").json()["history"]
        assert [one["what"] for one in reported] == (["moved"] if home == 7 else []) + ["imported"]
        file = json.loads((tmp_path / "data" / "router_mappings.json").read_text())
        for _ in range(200):
            if set(file.values()) == {home}:
                break
            time.sleep(0.05)
            file = json.loads((tmp_path / "data" / "router_mappings.json").read_text())
        assert (len(file), set(file.values())) == (users, {home})


def at_a_terminal(router: Router, *arguments: str) -> str:
    """What a person sees: the process writes to a terminal, not into a pipe."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "whatsapp_router.py"), *arguments],
        cwd=router.folder,
        env=router.env,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    shown = b""
    try:
        while some := os.read(ours, 65_536):
            shown += some
    except OSError:
        pass  # Linux says so when the other side has ended
    finally:
        os.close(ours)
    assert process.wait(30) == 0, shown
    return shown.decode()


async def test_recovering_and_replaying_show_how_far_they_are(
    router: Router, waha: StandIn, backend: FakeBackend
) -> None:
    backend.answer = lambda _: 422
    await asyncio.to_thread(router.start)
    now = time.time()
    waha.delay = 0.5  # of each page: there is something to look at
    waha.messages = [
        json.loads(webhook(f"start_realty_2 {number}", sent=now - number))["payload"]
        for number in range(1, 251)
    ]
    shown = await asyncio.to_thread(at_a_terminal, router, "recover", "--hours", "1")
    assert shown.endswith("250 routed, 0 unknown_user, 0 duplicate, 0 ignored\r\n")
    assert " messages [00:0" in shown
    assert "messages" not in (await run(router, "recover", "--hours", "1")).stderr

    async def dead() -> int:
        url, headers = f"{router.url}/metrics", {"X-Api-Key": KEYS["admin_api_key"]}
        text = (await asyncio.to_thread(httpx.get, url, headers=headers)).text
        return int(float(text.split("\ngateway_dead_letters ")[1].split()[0]))

    while await dead() < 250:
        await asyncio.sleep(0.05)
    backend.answer = lambda _: 200
    backend.received.clear()
    shown = await asyncio.to_thread(at_a_terminal, router, "replay", "--tenant", "2")
    assert shown.endswith("250 replayed\r\n")
    assert " messages [00:0" in shown
    await wait_until(lambda: len(backend.received) == 250, seconds=30)
    assert (await run(router, "replay", "--all")).stdout == "0 replayed\n"
    assert (await run(router, "replay")).returncode == 2
    router.env["ADMIN_API_KEY"] = "b" * 32
    refused = await run(router, "replay", "--all")
    assert refused.returncode == 1
    assert "401" in refused.stderr
