"""The longest stall of the event loop, of the last minute or two."""

import asyncio
import time

from gateway.operations.loop_lag import LoopLag
from tests.conftest import wait_until


async def test_a_stall_is_seen() -> None:
    loop_lag = LoopLag()
    loop_lag.start()
    await asyncio.sleep(0.05)
    time.sleep(0.2)  # noqa: ASYNC251  # what must never happen
    await wait_until(lambda: loop_lag.longest_stall() > 0.1)
    assert loop_lag.longest_stall() < 5
    loop_lag.stop()


async def test_it_is_forgotten_after_two_minutes() -> None:
    now = [30.0]
    loop_lag = LoopLag(lambda: now[0])
    loop_lag.start()
    await asyncio.sleep(0)  # it sleeps from second 30 on
    now[0] = 33.0
    await wait_until(lambda: loop_lag.longest_stall() > 2)
    now[0] = 70.0
    assert loop_lag.longest_stall() > 2
    now[0] = 130.0
    assert loop_lag.longest_stall() == 0.0
    loop_lag.stop()
