"""Whether WAHA is there, what its sessions' statuses are, and whether they still send to us.

WAHA is asked once a minute.

A WAHA that has died says nothing, and of several routers one alone hears of a session's status. A
session whose webhook has vanished from its config is WORKING and silent: WAHA Core before 2026.6
keeps a session's config in memory and loses it with a restart.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.domain.model import HASHED_SESSION
from gateway.errors import WahaError
from gateway.log import masked
from gateway.metrics import Metrics
from gateway.settings import WEBHOOK_PATH
from gateway.waha import webhook_config
from gateway.waha.client import PROXY_STATUSES, SessionInfo, Waha
from gateway.waha.sessions import Sessions

_EVERY_SECONDS = 60.0
_SILENT_SECONDS = 5.0  # while it does not answer
_UNHOOKED_SECONDS = 15.0  # while a session does not send to us: what it has is fetched each time
_NOT_THERE = frozenset({404, 422})  # of a session; Core before 2026.6 says 422
_AT_ONCE = 4  # sessions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """What the router asks of a webhook; empty: nothing. Several while they are rotated."""

    hmac: tuple[str, ...] = ()
    api: str = ""


class Listener(Protocol):
    """Is called when messages may be missing."""

    def waha_lost(self) -> None:
        """WAHA has stopped answering."""

    def waha_back(self) -> None:
        """It answers again."""

    def session_gone(self, session: str) -> None:
        """WAHA has no such session any more."""

    def webhook_missing(self, session: str) -> None:
        """At each look at a session that does not send to us."""


@dataclass(slots=True)
class _Hook:
    """What the looks at a session's config showed. Times are Unix seconds."""

    was_there: bool = False
    gone_since: float = 0.0  # when it was missing for the first time after it was there


class HealthCheck:
    """silent_since: Unix seconds; None while WAHA answers, or was not asked yet. ever: whether it
    has answered since the start. refused: why it says nothing of WAHA_SESSION, None if it
    does."""

    def __init__(
        self,
        waha: Waha,
        sessions: Sessions,
        metrics: Metrics,
        listener: Listener,
        *,
        home_session: str,
        keys: Keys = Keys(),  # frozen
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.silent_since: float | None = None
        self.ever = False
        self.refused: str | None = None
        self._waha = waha
        self._sessions = sessions
        self._metrics = metrics
        self._listener = listener
        self._home_session = home_session
        self._keys = keys
        self._clock = clock
        self._waha_started_at = 0.0  # Unix seconds, as far as that is known
        self._hooks: dict[str, _Hook] = {}  # by session
        self._unhooked: dict[str, str] = {}  # sessions that do not send to us, and why
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._check_forever())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def unhooked(self) -> dict[str, str]:
        """Sessions that do not send to us, and why; without those of which an event came since."""
        return {
            name: why
            for name, why in self._unhooked.items()
            if not self._has_proof(name, self._hooks[name])
        }

    def was_hooked(self, name: str) -> bool:
        """Whether the session is known to have sent to us, or to have had a webhook to us: else
        WHATSAPP_HOOK_URL may have set one, and the first event is still to come."""
        session, hook = self._sessions.all().get(name), self._hooks.get(name)
        return bool(session and session.last_event) or bool(hook and hook.gone_since)

    async def check(self) -> None:
        """Ask once: of the home session, and if WAHA is there of the others."""
        if await self._check_session(self._home_session):
            others = [
                name
                for name in self._sessions.all()
                # WAHA does not know by its hash what could not be kept by its name.
                if name != self._home_session and not name.startswith(HASHED_SESSION)
            ]
            few = asyncio.Semaphore(_AT_ONCE)

            async def check_session(name: str) -> None:
                async with few:
                    await self._check_session(name)

            await asyncio.gather(*map(check_session, others))

    async def _check_session(self, name: str) -> bool:
        """Whether WAHA answered."""
        asked_at, is_home = self._clock(), name == self._home_session
        try:
            if is_home:
                await self._ask_since_when()
            info = await self._waha.session_info(name)
        except WahaError as exc:
            if exc.status is not None and exc.status not in PROXY_STATUSES:
                self._refused(name, exc, asked_at)
            elif is_home:
                self._silent(exc)
                return False
        else:
            self._sessions.asked(name, info.status, info.own_ids, asked_at)
            if is_home:
                self.refused = None
            self._check_webhook(name, info, asked_at)
        if is_home:
            self._there()
        return True

    async def _ask_since_when(self) -> None:
        with contextlib.suppress(WahaError):  # the session's status says the rest
            uptime = await self._waha.uptime()
            if uptime is not None:
                self._waha_started_at = self._clock() - uptime

    def _check_webhook(self, name: str, info: SessionInfo, at: float) -> None:
        if info.status != "WORKING":  # which is said already, and no event is to be expected
            self._unhooked.pop(name, None)
            self._metrics.session_hook_unknown(name)
            return
        hook = self._hooks.setdefault(name, _Hook())
        why = self._why_nothing_comes(info)
        if why is None:
            hook.was_there, hook.gone_since = True, 0.0
        elif hook.was_there:
            hook.was_there, hook.gone_since = False, at
        if why is not None and not self._has_proof(name, hook):
            self._missing(name, why)
        else:
            self._found(name)

    def _why_nothing_comes(self, info: SessionInfo) -> str | None:
        reasons = [
            webhook_config.why_nothing_comes(
                info.config, path=WEBHOOK_PATH, hmac_key=key, api_key=self._keys.api
            )
            for key in self._keys.hmac or ("",)
        ]
        return None if None in reasons else reasons[0]

    def _has_proof(self, name: str, hook: _Hook) -> bool:
        """Whether WHATSAPP_HOOK_URL must have set a webhook, which WAHA's API does not show: an
        event came since WAHA, the session or this state of its config began."""
        session = self._sessions.all().get(name)
        if session is None or not session.last_event:
            return False
        return session.last_event >= max(self._waha_started_at, session.started_at, hook.gone_since)

    def _missing(self, name: str, why: str) -> None:
        if name not in self._unhooked:
            log.warning(
                "📵 WAHA session %s sends us nothing: %s, and no event has come since it began."
                " Run connect-waha, unless WHATSAPP_HOOK_URL sets the webhook",
                name,
                why,
                extra={"event": "waha.webhook_missing", "session": name},
            )
        self._unhooked[name] = why
        if self.was_hooked(name):
            self._metrics.session_hooked(name, False)
        self._listener.webhook_missing(name)

    def _found(self, name: str) -> None:
        if self._unhooked.pop(name, None):
            log.info(
                "📱 WAHA session %s sends to us again",
                name,
                extra={"event": "waha.webhook_found", "session": name},
            )
        self._metrics.session_hooked(name, True)

    async def _check_forever(self) -> None:
        while True:
            try:
                await self.check()
            except Exception:  # whatever WAHA answers
                log.exception("the health check failed", extra={"event": "waha.error"})
            await asyncio.sleep(self._seconds_to_next_check())

    def _seconds_to_next_check(self) -> float:
        if self.silent_since is not None:
            return _SILENT_SECONDS
        return _UNHOOKED_SECONDS if self._unhooked else _EVERY_SECONDS

    def _refused(self, name: str, exc: WahaError, at: float) -> None:
        if exc.status in _NOT_THERE and name != self._home_session:
            self._sessions.forget(name)
            self._listener.session_gone(name)
            self._hooks.pop(name, None)
            self._unhooked.pop(name, None)
        elif exc.status in _NOT_THERE:
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
            self._listener.waha_back()
        self.ever, self.silent_since = True, None
        self._metrics.waha_up(True)

    def _silent(self, exc: WahaError) -> None:
        if self.silent_since is None:
            self.silent_since = self._clock()
            self._listener.waha_lost()
            log.warning(
                "📵 WAHA does not answer: %s", masked(str(exc)), extra={"event": "waha.silent"}
            )
        self._metrics.waha_up(False)
