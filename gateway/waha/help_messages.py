"""Help for those without a lock: one text, some seconds after their message, and rarely.

The store keeps who is to get one and who got one; here is only when it goes. WhatsApp bars numbers
that write too much (WAHA docs, "How to avoid blocking"), so the sends are spread evenly.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from gateway.domain.model import (
    MESSAGE_EVENTS,
    Content,
    InboundMessage,
    UserId,
    is_lid,
    session_of,
    unscoped,
)
from gateway.errors import StoreUnavailable, WahaError, WahaRefused, WahaSilent
from gateway.log import Throttle, masked, shown
from gateway.metrics import Metrics
from gateway.store import HELP_SECONDS, Store
from gateway.waha.client import Waha
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.sessions import Sessions

_DELAY_SECONDS = 3.0  # the link may be right behind
_CHECK_SECONDS = 2.0  # between looks at what must be so first
_RETRY_SECONDS = 10.0
_GRACE_SECONDS = 5.0  # for what is being sent at the end

log = logging.getLogger(__name__)


class HelpMessages:
    """text: what is sent; empty: nothing is. per_minute: at most so many in any minute."""

    def __init__(
        self,
        waha: Waha,
        store: Store,
        sessions: Sessions,
        lid_lookup: LidLookup,
        metrics: Metrics,
        *,
        text: str,
        per_minute: int,
        home_session: str,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waha = waha
        self._store = store
        self._sessions = sessions
        self._lid_lookup = lid_lookup
        self._metrics = metrics
        self._text = text
        self._spacing = 60 / per_minute
        self._most = int(HELP_SECONDS / self._spacing)  # more could not be sent in time
        self._home_session = home_session
        self._clock = clock
        self._monotonic = monotonic
        self._next_turn = 0.0
        self._complaints = Throttle(clock=monotonic)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Go on with what waited when the process before ended."""
        self._next_turn = self._monotonic() + self._spacing  # it may have sent just now
        if self._text:
            for user, since in (await self._store.help_waits())[: self._most]:
                self._begin(user, since)

    def why_not(self, message: InboundMessage) -> str | None:
        """Why no help message could follow on message, from any person; None if one could."""
        if message.event not in MESSAGE_EVENTS or message.own:
            return "it is no message of theirs"
        if message.content is not Content.SENT:
            return "it holds nothing that a person is known to send"
        if not self._text:
            return "HELP_MESSAGE is empty"
        if message.sent.second < message.arrived - HELP_SECONDS:
            return f"the message is older than {HELP_SECONDS / 60:g} minutes"
        if len(self._tasks) >= self._most:
            return f"{self._most} wait, more than HELP_PER_MINUTE lets go in time"
        return None

    def queue(self, user: UserId, since: float) -> None:
        """A help message for user waits in the store, since then (Unix seconds)."""
        self._metrics.help("queued")
        self._begin(user, since)

    async def stop(self) -> None:
        """Let what is being sent finish; the rest waits in the store."""
        for task in self._tasks - self._sending:
            task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_GRACE_SECONDS)
            for task in late:
                task.cancel()

    def _begin(self, user: UserId, since: float) -> None:
        # A user with a task already gets another one: the store lets one of them send.
        task = asyncio.create_task(self._see_to(user, max(0.0, self._clock() - since)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_to(self, user: UserId, waited: float) -> None:
        give_up = self._monotonic() + HELP_SECONDS - waited
        await asyncio.sleep(max(0.0, _DELAY_SECONDS - waited))
        while self._monotonic() < give_up:
            if not self._may_go(user):
                await asyncio.sleep(_CHECK_SECONDS)
                continue
            await self._turn()
            if self._may_go(user) and await self._send(user):
                return
            await asyncio.sleep(_RETRY_SECONDS)
        self._note("too_late", user, "Help for %s is too late now")

    def _may_go(self, user: UserId) -> bool:
        session = session_of(user, self._home_session)
        return self._sessions.can_send(session) and not self._lid_lookup.is_being_asked(user)

    async def _turn(self) -> None:
        now = self._monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self._spacing
        await asyncio.sleep(turn - now)

    async def _send(self, user: UserId) -> bool:
        """Whether the matter is settled."""
        task = asyncio.current_task()
        assert task is not None
        self._sending.add(task)
        try:
            known = await self._store.begin_help(user)
            if known is None:
                self._note("not_needed", user, "%s needs no help any more")
                return True
            return await self._post(known)
        except StoreUnavailable:
            return False
        except Exception:
            log.exception("a help message failed unexpectedly", extra={"event": "help.error"})
            return True
        finally:
            self._sending.discard(task)

    async def _post(self, user: UserId) -> bool:
        session = session_of(user, self._home_session)
        number = unscoped(user)
        try:
            await self._waha.send_text(
                session, number if is_lid(user) else f"{number}@c.us", self._text
            )
        except WahaSilent as exc:
            self._complain("perhaps", exc)
            return True
        except WahaError as exc:
            retry = not isinstance(exc, WahaRefused)
            await self._store.undo_help(user, retry=retry)
            self._complain("failed" if retry else "refused", exc)
            return not retry
        self._note("sent", user, "📨 Help sent to %s, who has no lock")
        return True

    def _note(self, outcome: str, user: UserId, sentence: str) -> None:
        self._metrics.help(outcome)
        log.info(sentence, shown(user), extra={"event": f"help.{outcome}", "user": shown(user)})

    def _complain(self, outcome: str, exc: WahaError) -> None:
        self._metrics.help(outcome)
        self._complaints.warn(
            log,
            outcome,
            "WAHA did not send a help message: %s",
            masked(str(exc)),
            event=f"help.{outcome}",
        )
