"""Whether WAHA is there, and how its sessions stand: asked once a minute.

A WAHA that has died tells nothing, and of several routers one alone is told of a session's status.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from gateway.errors import WahaError
from gateway.log import masked
from gateway.metrics import Metrics
from gateway.sessions import Sessions
from gateway.waha.client import Waha

_EVERY_SECONDS = 60.0
_SILENT_SECONDS = 5.0  # while it does not answer
_NOT_FOUND = 404
_AT_ONCE = 4  # sessions

log = logging.getLogger(__name__)


class Watch:
    """silent_since: Unix seconds; None while WAHA answers, or was not asked yet. ever: whether it
    has answered since the start. refused: why it tells us nothing of WAHA_SESSION, None if it
    does."""

    def __init__(
        self,
        waha: Waha,
        sessions: Sessions,
        metrics: Metrics,
        *,
        home_session: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.silent_since: float | None = None
        self.ever = False
        self.refused: str | None = None
        self.lost: Callable[[], None] = lambda: None  # called when WAHA falls silent
        self.back: Callable[[], None] = lambda: None  # and when it answers again
        self._waha = waha
        self._sessions = sessions
        self._metrics = metrics
        self._home_session = home_session
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._look_again_and_again())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    async def look(self) -> None:
        """Ask once: of the home session, and if WAHA is there of the others."""
        if await self._look_at(self._home_session):
            others = [name for name in self._sessions.all() if name != self._home_session]
            few = asyncio.Semaphore(_AT_ONCE)

            async def look_at(name: str) -> None:
                async with few:
                    await self._look_at(name)

            await asyncio.gather(*map(look_at, others))

    async def _look_at(self, name: str) -> bool:
        """Whether WAHA answered."""
        asked_at, is_home = self._clock(), name == self._home_session
        try:
            status, own_ids = await self._waha.look_at(name)
        except WahaError as exc:
            if exc.status is not None:  # it is there, whatever it says
                self._refused(name, exc, asked_at)
            elif is_home:
                self._silent(exc)
                return False
        else:
            self._sessions.asked(name, status, own_ids, asked_at)
            if is_home:
                self.refused = None
        if is_home:
            self._there()
        return True

    async def _look_again_and_again(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:  # whatever WAHA answers
                log.exception("the look at WAHA stumbled", extra={"event": "waha.error"})
            await asyncio.sleep(_EVERY_SECONDS if self.silent_since is None else _SILENT_SECONDS)

    def _refused(self, name: str, exc: WahaError, at: float) -> None:
        if exc.status == _NOT_FOUND and name != self._home_session:
            self._sessions.forget(name)
        elif exc.status == _NOT_FOUND:
            self.refused = None
            self._sessions.asked(name, "NOT_FOUND", frozenset(), at)
        elif name == self._home_session:
            if self.refused is None:
                log.warning(
                    "📵 WAHA refuses us: %s", masked(str(exc)), extra={"event": "waha.refused"}
                )
            self.refused = str(exc)

    def _there(self) -> None:
        if self.silent_since is not None:
            log.info("📱 WAHA answers again", extra={"event": "waha.back"})
            self.back()
        self.ever, self.silent_since = True, None
        self._metrics.waha_up(True)

    def _silent(self, exc: WahaError) -> None:
        if self.silent_since is None:
            self.silent_since = self._clock()
            self.lost()
            log.warning(
                "📵 WAHA does not answer: %s", masked(str(exc)), extra={"event": "waha.silent"}
            )
        self._metrics.waha_up(False)
