"""Taking in what WAHA has and the router has not.

WAHA gives up on a webhook after its retries, forgets it when it ends itself, and now and then
sends none. What it still has in its store (GOWS, and NOWEB with its store, can say; WEBJS and WPP
cannot) is taken in the ordinary way, oldest first: an old link acts only as any old link does, and
what is known already is skipped without a write.

Two things ask for messages. A *gap* opens when messages may be missing (our start, a session that
did not work, a WAHA that was away, a webhook that was missing or answered 503) and closes when WAHA
was asked for all since its beginning. *Reconciliation* needs no reason: it looks every quarter of
an hour through the last hour, and once a day through all of RECOVER_HOURS.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.domain.model import HASHED_SESSION
from gateway.errors import BadBody, GatewayError, StoreUnavailable, WahaError, WahaRefused
from gateway.inbound.ingest import Ingest
from gateway.log import Throttle, masked
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.waha import events
from gateway.waha.client import Waha
from gateway.waha.sessions import Sessions

_MARGIN_SECONDS = 60  # before the last message that came: WAHA knows no order
_PAGE_SIZE = 100
_BATCH_MAX_MESSAGES = 50_000
_BATCH_MAX_BYTES = 128 * 1024 * 1024
_MAX_EMPTY_PAGES = 2  # in a row: WAHA filters after it has cut a page off
_MAX_STALE_PAGES = 3  # in a row: new messages shift the list, but an engine may know no offset
_NOTE_SECONDS = 5.0  # between notes of what was heard; a crash recovers so much more
_FAST_RETRIES = 20
_FAST_RETRY_SECONDS = 30.0
_SLOW_RETRY_SECONDS = 300.0
_MIN_RETRY_SECONDS = 5.0  # between two tries, however a session flaps
_WEBHOOK_RETRIES_SECONDS = 3600.0  # for which WAHA repeats a 503, as connect-waha sets it up
_UNSUPPORTED_STATUSES = (400, 501)  # of an engine, or of NOWEB without its store, about the list
_NOT_FOUND = 404
_NOT_FOUND_TRIES = 3
_SESSIONS_AT_ONCE = 4  # WAHA is asked for other things, too
_STORE_RETRY_SECONDS = 5.0
_STORE_TRIES = 60
_RECONCILE_SECONDS = 900.0
_RECONCILE_RETRY_SECONDS = 60.0
_RECONCILE_WINDOW_SECONDS = 3600.0
_FULL_RECONCILE_SECONDS = 86_400.0
_IN_TRANSIT_SECONDS = 120.0  # so long a webhook may be on its way
_SCHEDULE_SECONDS = 5.0  # between looks at what is due
_MAX_IGNORED = 10_000  # messages of WAHA's lists that are remembered as none for a tenant
_FIRST = "/first"  # behind a session's name: when the first message of it was heard

log = logging.getLogger(__name__)

Outcomes = Counter[str]
Message = dict[str, Any]  # the payload of a `message` event


@dataclass(slots=True)
class _Gap:
    """What was sent after since (Unix seconds) may be missing.

    breaks: how often the session has stopped working since then. not_before: until then, monotonic,
    WAHA itself may still bring what is missing. not_found: how often WAHA said that it knows no
    such session.
    """

    since: float
    breaks: int = 0
    not_before: float = 0.0
    not_found: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # do not wait with the next try


@dataclass(slots=True)
class _Schedule:
    """When a session is reconciled next. due_at and full_at are monotonic seconds; up_to: until
    when it was, Unix seconds."""

    due_at: float = 0.0
    full_at: float = 0.0
    up_to: float | None = None


class Recovery:
    """hours: how far back WAHA is asked at most; 0: never."""

    def __init__(
        self,
        waha: Waha,
        store: Store,
        sessions: Sessions,
        ingest: Ingest,
        metrics: Metrics,
        *,
        hours: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hours = hours
        self._waha = waha
        self._store = store
        self._sessions = sessions
        self._ingest = ingest
        self._metrics = metrics
        self._clock = clock
        self._monotonic = monotonic
        self._few = asyncio.Semaphore(_SESSIONS_AT_ONCE)
        self._noted: dict[str, float] = {}  # as the store has it
        self._gaps: dict[str, _Gap] = {}  # by session
        self._turns: dict[str, asyncio.Lock] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}  # by session
        self._schedules: dict[str, _Schedule] = {}  # by session
        self._unsupported: set[str] = set()  # sessions whose engine said that it has no list
        self._ignored: OrderedDict[tuple[str, str], None] = OrderedDict()  # session, id
        self._tasks: list[asyncio.Task[None]] = []
        self._complaints = Throttle(3600)

    # start and stop

    async def start(self) -> None:
        """Nothing is recovered of a session of which nothing was ever heard."""
        self._noted = await self._store.heard()
        self._sessions.on_status(self.session_status_changed)
        self._sessions.on_refused(self.message_refused)
        for session, heard in self._noted.items():
            if session.endswith(_FIRST) or session.startswith(HASHED_SESSION):
                continue
            now = self._clock()
            # A clock that was ahead says nothing of when.
            at = heard if heard <= now else now - self.hours * 3600
            self._sessions.heard_before(session, at)
            if self.hours:
                self._gaps[session] = _Gap(at)
                self._ask_now(session)
        self._tasks = [asyncio.create_task(self._keep_noting())]
        if self.hours:
            self._tasks.append(asyncio.create_task(self._keep_reconciling()))

    async def stop(self) -> None:
        tasks = [*self._closing.values(), *self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with contextlib.suppress(StoreUnavailable):
            await self._note()

    # what is known of what is missing

    def gaps_since(self) -> Mapping[str, float]:
        """Sessions of which messages may be missing, and since when, Unix seconds."""
        now = self._monotonic()
        return {name: gap.since for name, gap in self._gaps.items() if gap.not_before <= now}

    @property
    def unsupported(self) -> bool:
        """Whether an engine said that it has no list of messages."""
        return bool(self._unsupported)

    def reconciled_up_to(self) -> float | None:
        """Until when, Unix seconds, WAHA was asked for all that it has of every session that can
        tell; None if it was not yet."""
        times = [
            one.up_to
            for name, one in self._schedules.items()
            if not name.startswith(HASHED_SESSION) and name not in self._unsupported
        ]
        known = [at for at in times if at is not None]
        return min(known) if known and len(known) == len(times) else None

    def since(self, session: str, hours: float | None) -> float | None:
        """From when on to ask, Unix seconds; None if that is not to be known."""
        if hours is not None:
            return self._clock() - hours * 3600
        gap = self._gaps.get(session)
        return gap.since if gap else self._last_heard(session)

    # what may be missing: see Sessions

    def waha_lost(self) -> None:
        for session in self._sessions.all():
            self.session_status_changed(session, "")

    def waha_back(self) -> None:
        for session in self._gaps:
            self._ask_now(session)

    def session_gone(self, session: str) -> None:
        for known in (self._gaps, self._schedules):
            known.pop(session, None)
        self._unsupported.discard(session)

    def webhook_missing(self, session: str) -> None:
        if self.hours and self._open_gap(session):
            self._ask_now(session)

    def session_status_changed(self, session: str, status: str) -> None:
        if not self.hours:
            return
        # Also if it works: another router may have heard that it did not.
        gap = self._open_gap(session)
        if gap and status == "WORKING":
            self._ask_now(session)
        elif gap:
            gap.breaks += 1

    def message_refused(self, session: str, sent: float) -> None:
        """WAHA sends it again, for a while: what comes behind it must not hide it."""
        if not self.hours or session.startswith(HASHED_SESSION):
            return
        gap = self._gaps.get(session)
        if gap is None:
            gap = _Gap(sent, not_before=self._monotonic() + _WEBHOOK_RETRIES_SECONDS)
            self._gaps[session] = gap
            self._begin_closing(session)
        else:
            gap.breaks += 1  # an answer that is under way does not close it
        gap.since = min(gap.since, sent)

    def _open_gap(self, session: str) -> _Gap | None:
        """The session's gap, from the last message that was heard on; None if none ever was."""
        gap = self._gaps.get(session)
        if session.startswith(HASHED_SESSION):
            return None  # WAHA does not know it by that name
        if gap is None and (heard := self._last_heard(session)) is not None:
            gap = self._gaps[session] = _Gap(heard)
        return gap

    # closing gaps

    def _ask_now(self, session: str) -> None:
        """Ask for the session's gap now, and until it is closed."""
        gap = self._gaps[session]
        gap.not_before = 0.0
        gap.wake.set()
        self._begin_closing(session)

    def _begin_closing(self, session: str) -> None:
        before = self._closing.get(session)
        if before is None or before.done():
            self._closing[session] = asyncio.create_task(self._close(session))

    async def _close(self, session: str) -> None:
        tries = 0
        while gap := self._gaps.get(session):
            if (early := gap.not_before - self._monotonic()) > 0:
                await _wait_for(gap.wake, early)
                gap.not_before = 0.0
                continue

            gap.wake.clear()
            began = self._monotonic()
            if await self._try_to_close(session, gap, is_late=tries >= _FAST_RETRIES):
                return

            if self._gaps.get(session) is gap:
                tries += 1
                is_fast = tries <= _FAST_RETRIES
                await _wait_for(gap.wake, _FAST_RETRY_SECONDS if is_fast else _SLOW_RETRY_SECONDS)
                await asyncio.sleep(max(0.0, began + _MIN_RETRY_SECONDS - self._monotonic()))

    async def _try_to_close(self, session: str, gap: _Gap, *, is_late: bool) -> bool:
        """Whether asking again is of no use. is_late: a failure is worth a line."""
        try:
            await self.recover(session, gap.since)
        except WahaRefused as exc:
            return self._give_up(session, gap, exc)
        except (WahaError, StoreUnavailable) as exc:
            if is_late:
                self._complain(session, exc)
        except Exception:  # whatever WAHA answers
            log.exception("a recovery failed unexpectedly", extra={"event": "recovery.error"})
        return False

    def _give_up(self, session: str, gap: _Gap, exc: WahaRefused) -> bool:
        """Close the gap if WAHA will never say; whether it was closed."""
        if exc.status in _UNSUPPORTED_STATUSES:
            self._note_unsupported(session, exc)
            self._gaps.pop(session, None)
            return True
        gap.not_found = gap.not_found + 1 if exc.status == _NOT_FOUND else 0
        if gap.not_found >= _NOT_FOUND_TRIES:
            self._gaps.pop(session, None)
            log.warning(
                "WAHA has no session %s any more: what came of it is not asked for",
                session,
                extra={"event": "recovery.refused", "session": session},
            )
            return True
        self._complain(session, exc)  # a person can put it right, as a wrong key
        return False

    def _note_unsupported(self, session: str, exc: WahaRefused) -> None:
        if session not in self._unsupported:
            log.info(
                "WAHA cannot say what came while nobody listened (%s)",
                masked(str(exc)),
                extra={"event": "recovery.refused", "session": session},
            )
        self._unsupported.add(session)

    def _complain(self, session: str, exc: GatewayError) -> None:
        self._complaints.warn(
            log,
            (session, type(exc)),
            "What came of session %s while nobody listened is not to be had; asked again every"
            " few minutes: %s",
            session,
            masked(str(exc)),
            event="recovery.failed",
            session=session,
        )

    # reconciliation

    async def _keep_reconciling(self) -> None:
        while True:
            await asyncio.sleep(_SCHEDULE_SECONDS)  # at first: gaps are closed before it
            for session in self._sessions.all():
                schedule = self._schedules.setdefault(session, _Schedule())
                if self._is_due(session, schedule):
                    await self._reconcile(session, schedule)
            for session in self._schedules.keys() - self._sessions.all().keys():
                del self._schedules[session]

    def _is_due(self, session: str, schedule: _Schedule) -> bool:
        has_name = not session.startswith(HASHED_SESSION)  # or WAHA does not know it by it
        is_quiet = session not in self._gaps and self._sessions.can_send(session)
        return has_name and is_quiet and schedule.due_at <= self._monotonic()

    async def _reconcile(self, session: str, schedule: _Schedule) -> None:
        """Look through the last hour, or through all hours if that was not done for a day."""
        now = self._monotonic()
        is_full = schedule.full_at <= now
        seconds = self.hours * 3600 if is_full else _RECONCILE_WINDOW_SECONDS
        until = self._clock() - _IN_TRANSIT_SECONDS
        # Also what earlier looks have failed to see.
        since = min(until - seconds, schedule.up_to or until)
        since = max(since, until - self.hours * 3600, self._first_heard(session))
        schedule.due_at = now + _RECONCILE_RETRY_SECONDS
        try:
            outcomes = await self._take_in_all(session, int(since), until=int(until))
        except WahaRefused as exc:
            if exc.status in _UNSUPPORTED_STATUSES:
                self._note_unsupported(session, exc)
                schedule.due_at = now + _FULL_RECONCILE_SECONDS
            else:
                self._complain(session, exc)
            return
        except (WahaError, StoreUnavailable) as exc:
            self._complain(session, exc)
            return
        except Exception:  # whatever WAHA answers
            log.exception("a reconciliation failed unexpectedly", extra={"event": "recovery.error"})
            return
        self._unsupported.discard(session)
        self._note_reconciled(session, outcomes)
        schedule.up_to, schedule.due_at = until, now + _RECONCILE_SECONDS
        if is_full:
            schedule.full_at = now + _FULL_RECONCILE_SECONDS

    def _note_reconciled(self, session: str, outcomes: Outcomes) -> None:
        found = outcomes["routed"] + outcomes["unknown_user"]
        self._metrics.reconciled(found)
        if found:
            log.warning(
                "🩹 WAHA had sent no webhook for %s messages of session %s: they are taken in now",
                found,
                session,
                extra={"event": "recovery.reconciled", "session": session, **outcomes},
            )

    # taking messages in

    async def recover(self, session: str, since: float) -> Outcomes:
        """Take in what was sent after since (Unix seconds), as far back as hours allow; how many
        messages were routed, duplicate, unknown_user or ignored.

        Raise WahaError, or StoreUnavailable if the store refused some for minutes.
        """
        now = self._clock()
        begin = int(max(min(since, now) - _MARGIN_SECONDS, now - self.hours * 3600, 0.0))
        if since < begin:
            self._complaints.warn(
                log,
                (session, "too old"),
                "What came of session %s before the last %g hours is not asked for (RECOVER_HOURS)",
                session,
                self.hours,
                event="recovery.too_old",
                session=session,
            )
        gap = self._gaps.get(session)
        breaks = gap.breaks if gap else 0
        outcomes = await self._take_in_all(session, begin, until=None)
        if gap and since <= gap.since and gap.breaks == breaks and self._gaps.get(session) is gap:
            del self._gaps[session]
        log.info(
            "🩹 Asked WAHA for messages of session %s since %s: %s new, %s known already",
            session,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin)),
            outcomes["routed"] + outcomes["unknown_user"],
            outcomes["duplicate"],
            extra={"event": "recovery.done", "session": session, **outcomes},
        )
        return outcomes

    async def _take_in_all(self, session: str, since: int, *, until: int | None) -> Outcomes:
        async with self._turns.setdefault(session, asyncio.Lock()), self._few:
            asked_at = self._clock()
            with contextlib.suppress(WahaRefused):  # it may list messages all the same
                info = await self._waha.session_info(session)
                self._sessions.asked(session, info.status, info.own_ids, asked_at)
            outcomes = Outcomes()
            async for batch in self._fetch_batches(session, since=since, until=until):
                await self._take_in(session, batch, outcomes)
        return outcomes

    async def _fetch_batches(
        self, session: str, *, since: int, until: int | None
    ) -> AsyncIterator[list[Message]]:
        """Yield WAHA's messages in batches, each message once.

        A batch is sorted oldest first, messages of one second in WAHA's order. Order across batches
        is WAHA's own: oldest first where it knows sortOrder.
        """
        known: set[str] = set()
        batch: list[Message] = []
        offset = size = empty = stale = 0
        while empty < _MAX_EMPTY_PAGES and stale < _MAX_STALE_PAGES:
            page = await self._waha.messages(
                session, since=since, until=until, limit=_PAGE_SIZE, offset=offset
            )
            offset += _PAGE_SIZE
            empty = 0 if page else empty + 1
            if not page:
                continue

            with_ids = map(_with_id, page)
            fresh = [
                one for one in with_ids if one["id"] not in known and _sent(one, since) >= since
            ]
            stale = 0 if fresh else stale + 1
            known.update(one["id"] for one in fresh)
            batch += fresh
            size += _size(session, page)
            if len(batch) >= _BATCH_MAX_MESSAGES or size >= _BATCH_MAX_BYTES:
                yield _oldest_first(batch)
                batch, size = [], 0
        yield _oldest_first(batch)

    async def _take_in(self, session: str, messages: list[Message], outcomes: Outcomes) -> None:
        """Accept those that are not known; wait while the store refuses some."""
        is_sifted = False
        for _ in range(_STORE_TRIES):
            with contextlib.suppress(StoreUnavailable):
                if not is_sifted:
                    messages, is_sifted = await self._unknown(session, messages, outcomes), True
                messages = await self._take_in_some(session, messages, outcomes)
                if not messages:
                    return
            await asyncio.sleep(_STORE_RETRY_SECONDS)
        raise StoreUnavailable(f"{len(messages)} messages were refused for minutes: see /ready")

    async def _unknown(
        self, session: str, messages: list[Message], outcomes: Outcomes
    ) -> list[Message]:
        """Those that were neither accepted before nor ignored by this process."""
        messages = [one for one in messages if (session, one["id"]) not in self._ignored]
        unknown: list[Message] = []
        known_count = 0
        for place in range(0, len(messages), _PAGE_SIZE):
            page = messages[place : place + _PAGE_SIZE]
            try:
                known = await self._ingest.are_known([_webhook(session, one) for one in page])
            except StoreUnavailable:
                raise
            except Exception:  # one that cannot be read is found when each is taken in
                known = [False] * len(page)
            unknown += [one for one, is_known in zip(page, known, strict=True) if not is_known]
            known_count += sum(known)
        self._count("duplicate", outcomes, known_count)
        return unknown

    def _note_ignored(self, session: str, message: Message) -> None:
        self._ignored[session, message["id"]] = None
        while len(self._ignored) > _MAX_IGNORED:
            self._ignored.popitem(last=False)

    def _count(self, outcome: str, outcomes: Outcomes, count: int = 1) -> None:
        outcomes[outcome] += count
        self._metrics.recovered(outcome, count)

    async def _take_in_some(
        self, session: str, messages: list[Message], outcomes: Outcomes
    ) -> list[Message]:
        """Those that the store refused, which holds up the later ones of the same chats only."""
        left: list[Message] = []
        held_up: set[str] = set()
        for number, message in enumerate(messages):
            if number % _PAGE_SIZE == 0:
                await asyncio.sleep(0)  # a store that refuses at once would hold up all others
            chat = str(message.get("from"))
            if chat not in held_up:
                try:
                    outcome = (await self._ingest.recover(_webhook(session, message))).outcome
                except BadBody:
                    outcome = "ignored"
                except StoreUnavailable:
                    held_up.add(chat)
                except Exception:  # it must not hide those behind it
                    log.exception(
                        "a message failed unexpectedly", extra={"event": "recovery.error"}
                    )
                    outcome = "ignored"
            if chat in held_up:
                left.append(message)
                continue
            if outcome == "ignored":
                self._note_ignored(session, message)
            self._count("routed" if outcome in ("locked", "moved") else outcome, outcomes)
        return left

    # what was heard

    def _last_heard(self, session: str) -> float | None:
        known = self._sessions.all().get(session)
        return max(known.last_message if known else 0.0, self._noted.get(session, 0.0)) or None

    def _first_heard(self, session: str) -> float:
        """Unix seconds: what WAHA has from before is none of ours."""
        if session not in self._noted:
            return self._clock()
        return self._noted.get(session + _FIRST, 0.0)

    async def _keep_noting(self) -> None:
        while True:
            await asyncio.sleep(_NOTE_SECONDS)
            with contextlib.suppress(StoreUnavailable):
                await self._note()

    async def _note(self) -> None:
        news = {
            name: session.last_message
            for name, session in self._sessions.all().items()
            # While there is a gap what is behind it must not hide it from the next start.
            if session.last_message > self._noted.get(name, 0.0) and name not in self._gaps
        }
        if unknown := news.keys() - self._noted.keys():
            self._noted |= await self._store.heard()  # another router may know them
            for name in unknown - self._noted.keys():
                news[name + _FIRST] = self._sessions.all()[name].first_message or news[name]
        if news:
            await self._store.note_heard(news)
            self._noted |= news


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    """Not for longer than so many."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _oldest_first(messages: list[Message]) -> list[Message]:
    # Stable: WAHA gives those of one second as they came, whichever way it sorts.
    return sorted(messages, key=_sent)


def _sent(payload: Message, otherwise: float = 0.0) -> float:
    """Unix seconds; otherwise if it does not say."""
    return events.seconds(payload.get("timestamp")) or otherwise


def _size(session: str, page: list[Message]) -> int:
    try:
        return len(json.dumps(page))
    except RecursionError as exc:
        raise WahaRefused(f"messages of session {session}: nested too deep", 200) from exc


def _with_id(payload: Message) -> Message:
    """WEBJS has objects for ids; a message without one is distinguished by what it holds."""
    id_ = payload.get("id")
    if isinstance(id_, dict):
        id_ = id_.get("_serialized")
    if isinstance(id_, str) and id_:
        return payload | {"id": id_}
    packed = json.dumps(payload, sort_keys=True).encode()
    return payload | {"id": hashlib.sha256(packed).hexdigest()[:32]}


def _webhook(session: str, payload: Message) -> bytes:
    """The `message` event that WAHA would have sent, but for its own id."""
    envelope = {
        "id": f"recovered_{payload.get('id')}",
        "timestamp": int(_sent(payload) * 1000) or None,
        "event": "message",
        "session": session,
        "payload": payload,
    }
    return events.encoded(envelope)
