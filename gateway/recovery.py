"""Asking WAHA for messages that never came: after our start, after a session's, or when told to.

WAHA gives up on a webhook after its retries, and forgets it when it ends itself. What it still has
in its store (GOWS, and NOWEB with its store, can tell; WEBJS cannot) is taken in the ordinary way,
oldest first: what was seen is a duplicate, and an old link acts only as any old link does.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import BadBody, GatewayError, StoreUnavailable, WahaError, WahaRefused
from gateway.ingest import Ingest
from gateway.log import Throttle, masked
from gateway.metrics import Metrics
from gateway.sessions import Sessions
from gateway.store import Store
from gateway.waha import events
from gateway.waha.client import Waha

_MARGIN_SECONDS = 60  # before the last one that came: WAHA knows no order
_PAGE = 100
_MOST, _MOST_BYTES = 50_000, 134_217_728  # of messages that are held in memory at once
_NOTE_SECONDS = 5.0  # between notes of what was heard; a crash recovers so much more
_AGAIN_SECONDS, _SOON_TRIES, _LATER_SECONDS = 30.0, 20, 300.0  # while WAHA does not tell
_LEAST_SECONDS = 5.0  # between two tries, however a session flaps
_RETRIES_SECONDS = 3600.0  # for which WAHA repeats a webhook that was answered 503, as we set it up
_CANNOT_TELL = (400, 501)  # what an engine, or NOWEB without its store, says of the list
_NOT_FOUND, _GONE_TRIES = 404, 3
_STALE_PAGES = 3  # in a row: new messages shift the list, but an engine may know no offset
_SESSIONS_AT_ONCE = 4  # WAHA is asked for other things, too
_STORE_SECONDS, _STORE_TRIES = 5.0, 60  # while the store refuses

log = logging.getLogger(__name__)

Outcomes = Counter[str]


@dataclass(slots=True)
class _Gap:
    """What was sent after since (Unix seconds) may be missing.

    breaks: how often the session has stopped working since then. not_before: until then, monotonic,
    WAHA itself may still bring what is missing. gone: how often WAHA said that it knows no such
    session.
    """

    since: float
    breaks: int = 0
    not_before: float = 0.0
    gone: int = 0
    now: asyncio.Event = field(default_factory=asyncio.Event)  # do not wait with the next try


class Recovery:
    """hours: how far back at most; 0: never."""

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
        self.cannot_tell = False  # some engine said that it has no list
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
        self._noting: asyncio.Task[None] | None = None
        self._complaints = Throttle(3600)

    async def start(self) -> None:
        """Nothing is recovered of a session of which nothing was ever heard."""
        self._noted = await self._store.heard()
        self._sessions.told = self._status_told
        self._sessions.refused = self._message_refused
        for session, heard in self._noted.items():
            now = self._clock()
            # A clock that was ahead tells nothing of when.
            at = heard if heard <= now else now - self.hours * 3600
            self._sessions.heard_before(session, at)
            if self.hours:
                self._gaps[session] = _Gap(at)
                self._see_to(session)
        self._noting = asyncio.create_task(self._keep_noting())

    async def stop(self) -> None:
        tasks = [*self._closing.values(), *([self._noting] if self._noting else ())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with contextlib.suppress(StoreUnavailable):
            await self._note()

    def gaps_since(self) -> Mapping[str, float]:
        """Sessions of which messages may be missing, and since when, Unix seconds."""
        now = self._monotonic()
        return {name: gap.since for name, gap in self._gaps.items() if gap.not_before <= now}

    def waha_lost(self) -> None:
        """WAHA does not answer: what it sends may not arrive either."""
        for session in self._sessions.all():
            self._status_told(session, "")

    def waha_back(self) -> None:
        for session in self._gaps:
            self._see_to(session)

    def since(self, session: str, hours: float | None) -> float | None:
        """From when on to ask, Unix seconds; None if that is not to be known."""
        if hours is not None:
            return self._clock() - hours * 3600
        gap = self._gaps.get(session)
        return gap.since if gap else self._last_heard(session)

    async def recover(self, session: str, since: float) -> Outcomes:
        """Take in what was sent after since (Unix seconds), as far back as hours allow; how many
        messages were routed, duplicate, unknown_user or ignored.

        Raise WahaError, or StoreUnavailable if the store refused some for minutes.
        """
        now = self._clock()
        begin = int(max(min(since, now) - _MARGIN_SECONDS, now - self.hours * 3600, 0.0))
        if since < begin:
            log.warning(
                "What came of session %s before the last %g hours is not asked for (RECOVER_HOURS)",
                session,
                self.hours,
                extra={"event": "recovery.too_old", "session": session},
            )
        async with self._turns.setdefault(session, asyncio.Lock()), self._few:
            gap = self._gaps.get(session)
            breaks = gap.breaks if gap else 0
            with contextlib.suppress(WahaRefused):  # it may tell of messages all the same
                status, own_ids = await self._waha.look_at(session)
                self._sessions.asked(session, status, own_ids, now)
            outcomes = Outcomes()
            async for messages in self._asked(session, begin):
                await self._take_in(session, messages, outcomes)
            if gap and since <= gap.since and gap.breaks == breaks:
                self._gaps.pop(session, None)
        log.info(
            "🩹 Asked WAHA for messages of session %s since %s: %s new, %s known already",
            session,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin)),
            outcomes["routed"] + outcomes["unknown_user"],
            outcomes["duplicate"],
            extra={"event": "recovery.done", "session": session, **outcomes},
        )
        return outcomes

    async def _asked(self, session: str, since: int) -> AsyncIterator[list[dict[str, Any]]]:
        """Each once, oldest first; those that memory does not hold at once in several parts, where
        that is so in each part only."""
        known: set[str] = set()
        part: list[dict[str, Any]] = []
        offset = size = stale = 0
        while stale < _STALE_PAGES:
            page = await self._waha.messages(session, since=since, limit=_PAGE, offset=offset)
            if not page:
                break
            told = map(_with_id, page)
            fresh = [one for one in told if one["id"] not in known and _sent(one) >= since]
            stale = 0 if fresh else stale + 1
            known.update(one["id"] for one in fresh)
            part += fresh
            offset += len(page)
            try:
                size += len(json.dumps(page))
            except RecursionError as exc:
                raise WahaRefused(f"messages of session {session}: nested too deep", 200) from exc
            if len(part) >= _MOST or size >= _MOST_BYTES:
                yield _oldest_first(part)
                part, size = [], 0
        yield _oldest_first(part)

    async def _take_in(
        self, session: str, messages: list[dict[str, Any]], outcomes: Outcomes
    ) -> None:
        for _ in range(_STORE_TRIES):
            messages = await self._take_in_some(session, messages, outcomes)
            if not messages:
                return
            await asyncio.sleep(_STORE_SECONDS)
        raise StoreUnavailable(f"{len(messages)} messages were refused for minutes: see /ready")

    async def _take_in_some(
        self, session: str, messages: list[dict[str, Any]], outcomes: Outcomes
    ) -> list[dict[str, Any]]:
        """Those that the store refused, which holds up the later ones of the same chats only."""
        left: list[dict[str, Any]] = []
        held_up: set[str] = set()
        for number, message in enumerate(messages):
            if number % _PAGE == 0:
                await asyncio.sleep(0)  # a store that refuses at once would hold up all others
            chat = str(message.get("from"))
            if chat not in held_up:
                try:
                    outcome = (await self._ingest.recover(_webhook(session, message))).outcome
                except BadBody:
                    outcome = "ignored"
                except StoreUnavailable:
                    held_up.add(chat)
            if chat in held_up:
                left.append(message)
                continue
            kind = "routed" if outcome in ("locked", "moved") else outcome
            self._metrics.recovered(kind)
            outcomes[kind] += 1
        return left

    def _see_to(self, session: str) -> None:
        """Ask for the session's gap now, and until it is closed."""
        gap = self._gaps[session]
        gap.not_before = 0.0
        gap.now.set()
        self._begin_closing(session)

    def _begin_closing(self, session: str) -> None:
        before = self._closing.get(session)
        if before is None or before.done():
            self._closing[session] = asyncio.create_task(self._close(session))

    async def _close(self, session: str) -> None:
        tries = 0
        while gap := self._gaps.get(session):
            if (early := gap.not_before - self._monotonic()) > 0:
                await _wait_for(gap.now, early)
                gap.not_before = 0.0
                continue
            gap.now.clear()
            began = self._monotonic()
            try:
                await self.recover(session, gap.since)
            except WahaRefused as exc:
                if exc.status in _CANNOT_TELL:  # else a person can mend it, as a wrong key
                    self.cannot_tell = True
                    self._gaps.pop(session, None)
                    log.info(
                        "WAHA cannot tell what came while nobody listened (%s)",
                        masked(str(exc)),
                        extra={"event": "recovery.refused", "session": session},
                    )
                    return
                gap.gone = gap.gone + 1 if exc.status == _NOT_FOUND else 0
                if gap.gone >= _GONE_TRIES:
                    self._gaps.pop(session, None)
                    log.warning(
                        "WAHA has no session %s any more: what came of it is not asked for",
                        session,
                        extra={"event": "recovery.refused", "session": session},
                    )
                    return
                self._complain(session, exc)
            except (WahaError, StoreUnavailable) as exc:
                if tries >= _SOON_TRIES:
                    self._complain(session, exc)
            except Exception:  # whatever WAHA answers
                log.exception("a recovery stumbled", extra={"event": "recovery.error"})
            if self._gaps.get(session) is gap:
                tries += 1
                soon = tries <= _SOON_TRIES
                await _wait_for(gap.now, _AGAIN_SECONDS if soon else _LATER_SECONDS)
                await asyncio.sleep(max(0.0, began + _LEAST_SECONDS - self._monotonic()))

    def _complain(self, session: str, exc: GatewayError) -> None:
        if self._complaints.passes((session, type(exc))):
            log.warning(
                "What came of session %s while nobody listened is not to be had; asked again every"
                " few minutes (told once an hour): %s",
                session,
                masked(str(exc)),
                extra={"event": "recovery.failed", "session": session},
            )

    def _status_told(self, session: str, status: str) -> None:
        if not self.hours:
            return
        gap = self._gaps.get(session)
        if gap is None and (heard := self._last_heard(session)) is not None:
            # Also if it works: another router may have been told that it did not.
            gap = self._gaps[session] = _Gap(heard)
        if gap and status == "WORKING":
            self._see_to(session)
        elif gap:
            gap.breaks += 1

    def _message_refused(self, session: str, sent: float) -> None:
        """WAHA sends it again, for a while: what comes behind it must not hide it."""
        if not self.hours:
            return
        gap = self._gaps.get(session)
        if gap is None:
            gap = _Gap(sent, not_before=self._monotonic() + _RETRIES_SECONDS)
            self._gaps[session] = gap
            self._begin_closing(session)
        gap.since = min(gap.since, sent)

    def _last_heard(self, session: str) -> float | None:
        known = self._sessions.all().get(session)
        return max(known.last_message if known else 0.0, self._noted.get(session, 0.0)) or None

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
        if news:
            await self._store.note_heard(news)
            self._noted |= news


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    """Not for longer than so many."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _oldest_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Where WAHA gives the newest first, those of one second keep their order when turned.
    turned = messages[::-1]
    turned.sort(key=_sent)
    return turned


def _sent(payload: dict[str, Any]) -> float:
    """Unix seconds; 0 if it does not say."""
    return events.seconds(payload.get("timestamp")) or 0.0


def _with_id(payload: dict[str, Any]) -> dict[str, Any]:
    """WEBJS has objects for ids; a message without one is told from others by what it holds."""
    id_ = payload.get("id")
    if isinstance(id_, dict):
        id_ = id_.get("_serialized")
    if isinstance(id_, str) and id_:
        return payload | {"id": id_}
    packed = json.dumps(payload, sort_keys=True).encode()
    return payload | {"id": hashlib.sha256(packed).hexdigest()[:32]}


def _webhook(session: str, payload: dict[str, Any]) -> bytes:
    """The `message` event that WAHA would have sent, but for its own id."""
    envelope = {
        "id": f"recovered_{payload.get('id')}",
        "timestamp": int(_sent(payload) * 1000),
        "event": "message",
        "session": session,
        "payload": payload,
    }
    try:
        return orjson.dumps(envelope)
    except TypeError:  # half an emoji
        return json.dumps(envelope).encode()
