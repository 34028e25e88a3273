"""A real process between a WAHA and a backend: two numbers, look-ups, help, a WAHA that fails."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.waha import StandIn
from tests.conftest import FakeBackend, wait_until
from tests.e2e.router import Router
from tests.messages import ALI, LID, OMAR, SARA, webhook


@pytest.fixture
def router(tmp_path: Path, backend: FakeBackend, waha: StandIn) -> Iterator[Router]:
    """Started by the test."""
    made = Router(
        tmp_path,
        backend_api_url=backend.url,
        waha_api_url=waha.url,
        waha_api_key="the key",
        help_message="open the link",
        help_per_minute="600",
    )
    waha.key = "the key"
    yield made
    made.stop()


async def post(router: Router, text: str, user: str, session: str = "default", **how: Any) -> Any:
    body = webhook(text, user, **{"sent": time.time()} | how, session=session)
    return (await asyncio.to_thread(router.post, body)).json()


async def report_status(router: Router, session: str, status: str) -> Any:
    body = {
        "event": "session.status",
        "session": session,
        "timestamp": int(time.time() * 1000),
        "payload": {"name": session, "status": status},
        "engine": "GOWS",
    }
    return (await asyncio.to_thread(router.post, json.dumps(body).encode())).json()


async def get(router: Router, path: str) -> Any:
    return (await asyncio.to_thread(httpx.get, router.url + path)).json()


async def start(router: Router) -> None:
    await asyncio.to_thread(router.start)


async def test_two_numbers_on_one_router(
    router: Router, backend: FakeBackend, waha: StandIn
) -> None:
    waha.phones[LID.removesuffix("@lid")] = OMAR
    await start(router)
    # One person, two numbers, two agents.
    await post(router, "start_realty_2", ALI)
    await post(router, "start_realty_7", ALI, "sales")
    await post(router, "to the first", ALI)
    await post(router, "to the second", ALI, "sales")
    # The same LID is asked for by each number's own session.
    await post(router, "start_realty_3", LID, "sales")
    assert (await post(router, "hello", OMAR))["status"] == "unknown_user"
    await wait_until(lambda: len(backend.received) == 5)
    reported = {
        (
            json.loads(one.body)["session"],
            one.user,
            one.tenant,
            json.loads(one.body)["payload"]["body"],
        )
        for one in backend.received
    }
    assert reported == {
        ("default", ALI, 2, "start_realty_2"),
        ("default", ALI, 2, "to the first"),
        ("sales", ALI, 7, "start_realty_7"),
        ("sales", ALI, 7, "to the second"),
        ("sales", OMAR, 3, "start_realty_3"),
    }
    assert waha.asked == [("sales", LID)]
    file = router.folder / "data" / "router_mappings.json"
    locks = {ALI: 2, f"sales/{ALI}": 7, f"sales/{OMAR}": 3}
    await wait_until(lambda: json.loads(file.read_text()) == locks)
    assert (await get(router, f"/router/user/{ALI}?session=sales"))["locked_to_tenant"] == 7

    # Help goes out by the number that was written to, and not by one that is down.
    await report_status(router, "default", "SCAN_QR_CODE")
    await report_status(router, "sales", "WORKING")
    await post(router, "hello", SARA, "sales")
    await wait_until(lambda: waha.sent)
    assert [(one["session"], one["chatId"]) for one in waha.sent] == [("sales", f"{SARA}@c.us")]
    ready = await get(router, "/ready")
    assert ready["waha_session default"].startswith("degraded: SCAN_QR_CODE, last event ")
    assert ready["waha_session sales"].startswith("ok: WORKING, last event ")
    assert ready["status"] == "degraded"
    await report_status(router, "default", "WORKING")
    await wait_until(lambda: len(waha.sent) == 2)
    assert waha.sent[1]["session"] == "default"
    assert len(backend.received) == 5, "no status went to a tenant"


async def test_help_survives_kills_and_is_never_sent_twice(router: Router, waha: StandIn) -> None:
    await start(router)
    assert (await post(router, "hello", ALI))["action"] == "sent_help_message"
    assert (await post(router, "hello?", ALI))["action"] == "none"
    router.kill()
    assert waha.sent == []
    await start(router)
    await wait_until(lambda: waha.sent)
    router.kill()
    await start(router)
    assert (await post(router, "anybody?", ALI))["action"] == "none"
    assert (await post(router, "hello", SARA))["action"] == "sent_help_message"
    await wait_until(lambda: len(waha.sent) == 2)
    assert [one["chatId"] for one in waha.sent] == [f"{ALI}@c.us", f"{SARA}@c.us"]


async def test_what_a_lid_said_goes_to_the_tenant_once_waha_knows_it_also_over_a_kill(
    router: Router, backend: FakeBackend, waha: StandIn
) -> None:
    """Nobody writes again: the look-up alone must bring it out, and WAHA is down at first."""
    await start(router)
    await post(router, "start_realty_2", ALI)
    waha.statuses["default"], waha.retry_after = "STARTING", 0.0
    assert (await post(router, "by lid", LID))["status"] == "unknown_user"
    await wait_until(lambda: waha.asked)
    router.kill()
    waha.statuses.clear()
    waha.phones[LID.removesuffix("@lid")] = ALI
    await start(router)
    await wait_until(lambda: len(backend.received) >= 2)
    last = backend.received[-1]
    assert (last.tenant, last.user, last.headers["X-User-Alias"]) == (2, ALI, LID)
    assert json.loads(last.body)["payload"]["body"] == "by lid"


async def test_a_waha_that_hangs_delays_no_answer(
    router: Router, backend: FakeBackend, waha: StandIn
) -> None:
    waha.delay = 60
    await start(router)
    slowest = 0.0
    for number in range(40):
        lid = f"1587643210{number:05}@lid"
        began = time.monotonic()
        assert (await post(router, "start_realty_2", lid))["status"] == "routed"
        assert (await post(router, "hello", f"97150555{number:04}"))["status"] == "unknown_user"
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 2, "two webhooks, and WAHA answers after a minute"
    # Each under its LID, after two seconds and in the end without waiting.
    await wait_until(lambda: len(backend.received) == 40, seconds=20)
    assert all(one.user.endswith("@lid") for one in backend.received)
