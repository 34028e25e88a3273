"""How long the event loop was not to be had: whatever stalls it stalls every webhook."""

import asyncio
import time
from collections.abc import Callable

_BEAT_SECONDS = 0.02
_TURN_SECONDS = 60.0  # what is reported is of the last minute, and up to two


class LoopLag:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._turn = 0
        self._now = self._before = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._beat())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def longest_stall(self) -> float:
        """Seconds, of the last minute or two; to within the length of a beat."""
        self._take_turns()
        return max(self._now, self._before)

    async def _beat(self) -> None:
        while True:
            due = self._monotonic() + _BEAT_SECONDS
            await asyncio.sleep(_BEAT_SECONDS)
            late = self._monotonic() - due
            self._take_turns()
            self._now = max(self._now, late)

    def _take_turns(self) -> None:
        turn = int(self._monotonic() // _TURN_SECONDS)
        if turn != self._turn:
            self._before = self._now if turn == self._turn + 1 else 0.0
            self._now, self._turn = 0.0, turn
