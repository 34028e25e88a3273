"""How many messages came and were delivered in each minute of the last hour, by this router."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gateway.metrics import Metrics

MINUTES = 60


class Minute(NamedTuple):
    came: int
    delivered: int


class Traffic:
    """Reads two counters once a minute: nothing is added to a message's way."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._metrics = metrics
        self._clock = clock
        self._past = deque([Minute(0, 0)] * (MINUTES - 1), maxlen=MINUTES - 1)
        self._before = Minute(0, 0)  # what was counted until this minute began
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._turn_pages())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def minutes(self) -> list[Minute]:
        """MINUTES of them, the oldest first; the last one is not over yet."""
        return [*self._past, self._running()]

    def turn(self) -> None:
        """A minute is over."""
        self._past.append(self._running())
        self._before = self._counted()

    async def _turn_pages(self) -> None:
        while True:
            await asyncio.sleep(60 - self._clock() % 60)
            self.turn()

    def _running(self) -> Minute:
        now, before = self._counted(), self._before
        return Minute(now.came - before.came, now.delivered - before.delivered)

    def _counted(self) -> Minute:
        return Minute(self._metrics.messages_in, self._metrics.messages_delivered)
