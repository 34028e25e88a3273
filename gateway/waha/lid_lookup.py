"""Which phone a LID is, asked of WAHA beside the messages' way, never in it.

Whatever WAHA answers, or if it does not, messages go on: under the LID.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.domain.model import IdentityLink, UserId, scoped, session_of, unscoped
from gateway.errors import StoreUnavailable, WahaRefused, WahaUnavailable
from gateway.log import Throttle, masked, shown
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.waha.client import Waha
from gateway.waha.own_numbers import OwnNumbers
from gateway.waha.sessions import Sessions

MAX_WAIT_SECONDS = 2.0  # so long the first delivery of a LID waits for its phone
_RETRY_SECONDS = 3600.0  # after which one that WAHA did not know is asked for again
_LATE_SECONDS = 60.0  # after which an answer is not waited for even where there is time
_REST_SECONDS = 30.0  # of a session that failed to answer
_AT_ONCE = 8  # questions to one session
_MOST_SESSIONS = 1000  # more of them share the home session's slots
_MOST = 100_000  # LIDs asked for in that time; of more the messages go on under the LID

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Session:
    """Questions to one WAHA session share its slots, and rest together when it fails."""

    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    rests_until: float = 0.0  # it failed: no question before then
    slow_until: float = 0.0  # somebody waited in vain: nobody does before then


@dataclass(slots=True)
class _Question:
    began: float
    session: _Session
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    moot: bool = False  # the answer is of no use any more


class LidLookup:
    """keep_asking: seconds for which a question is repeated while WAHA fails to answer it."""

    def __init__(
        self,
        waha: Waha,
        store: Store,
        sessions: Sessions,
        own_numbers: OwnNumbers,
        metrics: Metrics,
        *,
        home_session: str,
        keep_asking: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waha = waha
        self._store = store
        self._sessions = sessions
        self._own_numbers = own_numbers
        self._metrics = metrics
        self._home_session = home_session
        self._keep_asking = keep_asking
        self._clock = clock
        self._monotonic = monotonic
        self._questions: dict[UserId, _Question] = {}
        self._asked = Throttle(_RETRY_SECONDS, most=_MOST, clock=monotonic)
        self._by_session: dict[str, _Session] = {}
        self._complaints = Throttle(clock=monotonic)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Ask for those whose messages were held when the process before ended."""
        for lid in await self._store.held_lids():
            self.ask(lid)

    def ask(self, lid: UserId) -> None:
        """See to it that WAHA is asked, unless it was within the hour."""
        if lid in self._questions or not self._asked.passes(lid):
            return
        name = session_of(lid, self._home_session)
        if name not in self._by_session and len(self._by_session) >= _MOST_SESSIONS:
            name = self._home_session
        session = self._by_session.setdefault(name, _Session())
        self._questions[lid] = question = _Question(self._monotonic(), session)
        task = asyncio.create_task(self._find_out(lid, question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def is_being_asked(self, lid: UserId) -> bool:
        """Whether WAHA was asked within the last minute and has not answered."""
        question = self._questions.get(lid)
        return question is not None and self._monotonic() < question.began + _LATE_SECONDS

    def ask_and_expect(self, lid: UserId) -> bool:
        """Whether an answer is worth waiting for, after asking if that was not done yet."""
        self.ask(lid)
        question = self._questions.get(lid)
        return question is not None and self._seconds_left(question) > 0

    async def wait_for(self, lid: UserId) -> None:
        """Return when the answer is there, or has been waited for long enough."""
        question = self._questions.get(lid)
        if question and (seconds := self._seconds_left(question)):
            try:
                async with asyncio.timeout(seconds):
                    await question.answered.wait()
            except TimeoutError:
                question.session.slow_until = self._monotonic() + _REST_SECONDS

    def forget(self, lid: UserId) -> None:
        """What WAHA answers about lid is not kept: its person was erased."""
        if question := self._questions.get(lid):
            question.moot = True
        self._asked.forget(lid)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _seconds_left(self, question: _Question) -> float:
        now, session = self._monotonic(), question.session
        if max(session.rests_until, session.slow_until) > now:
            return 0.0
        return max(0.0, question.began + MAX_WAIT_SECONDS - now)

    async def _find_out(self, lid: UserId, question: _Question) -> None:
        try:
            while not await self._try(lid, question):
                # Held messages of a person with a lock may hang on it: not for one try only.
                if self._monotonic() >= question.began + self._keep_asking:
                    self._asked.forget(lid)
                    return
                await asyncio.sleep(_REST_SECONDS)
        except Exception:
            log.exception("a look-up failed unexpectedly", extra={"event": "lid.error"})
        finally:
            del self._questions[lid]
            question.answered.set()

    async def _try(self, lid: UserId, question: _Question) -> bool:
        """Whether there was an answer, of whatever kind."""
        session = question.session
        name = session_of(lid, self._home_session)
        async with session.slots:
            if session.rests_until > self._monotonic():
                return False
            asked_at = self._clock()
            try:
                phone = await self._waha.phone_of(name, unscoped(lid))
                if not question.moot:
                    await self._link_identity(lid, name, phone, asked_at)
            except WahaRefused as exc:
                self._complain(name, "refused", exc)
            except StoreUnavailable:
                return False  # the store has logged it itself
            except WahaUnavailable as exc:
                session.rests_until = self._monotonic() + _REST_SECONDS
                self._complain(name, "failed", exc)
                return False
            return True

    async def _link_identity(self, lid: UserId, session: str, phone: str | None, at: float) -> None:
        # The gateway's own number is nobody's phone.
        if phone is None or phone in self._own_numbers.all:
            self._metrics.lookup("unknown")
            return
        user = scoped(session, phone, self._home_session)
        await self._store.link_identity(IdentityLink(lid, user, at, asked=True))
        self._metrics.lookup("found")
        log.info(
            "👤 %s is %s, says WAHA",
            shown(lid),
            shown(user),
            extra={"event": "lid.found", "user": shown(user), "lid": shown(lid)},
        )

    def _complain(self, session: str, outcome: str, exc: Exception) -> None:
        self._metrics.lookup(outcome)
        self._complaints.warn(
            log,
            (session, outcome),
            "WAHA could not be asked whose LIDs these are: %s",
            masked(str(exc)),
            event=f"lid.{outcome}",
            session=session,
        )
