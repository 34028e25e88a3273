"""The longest stall of the event loop, of the last minute or two."""

import asyncio
import time

from gateway.operations.loop_lag import Pulse
from tests.conftest import wait_until


async def test_a_stall_is_seen() -> None:
    pulse = Pulse()
    pulse.start()
    await asyncio.sleep(0.05)
    time.sleep(0.2)  # noqa: ASYNC251  # what must never happen
    await wait_until(lambda: pulse.longest_stall() > 0.1)
    assert pulse.longest_stall() < 5
    pulse.stop()


async def test_it_is_forgotten_after_two_minutes() -> None:
    now = [30.0]
    pulse = Pulse(lambda: now[0])
    pulse.start()
    await asyncio.sleep(0)  # it sleeps from second 30 on
    now[0] = 33.0
    await wait_until(lambda: pulse.longest_stall() > 2)
    now[0] = 70.0
    assert pulse.longest_stall() > 2
    now[0] = 130.0
    assert pulse.longest_stall() == 0.0
    pulse.stop()
