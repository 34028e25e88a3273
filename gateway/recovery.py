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
from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from gateway.errors import BadBody, StoreUnavailable, WahaError, WahaRefused
from gateway.ingest import Ignored, Ingest
from gateway.metrics import Metrics
from gateway.model import Accepted, AskForLink
from gateway.sessions import Sessions
from gateway.store import Store
from gateway.waha import events
from gateway.waha.client import Waha

_MARGIN_SECONDS = 60  # before the last one that came: WAHA knows no order
_PAGE = 100
_MOST_BYTES = 134_217_728  # of them; what is older than these is not asked for
_MOST = 50_000  # messages of one session at once: an engine that ignores the filter must not flood
_NOTE_SECONDS = 5.0  # between notes of what was heard; a crash recovers so much more
_AGAIN_SECONDS, _TRIES = 30.0, 20  # while WAHA does not answer
_CANNOT_TELL = (200, 400, 501)  # what an engine, or NOWEB without its store, says of the list
_STORE_SECONDS = 5.0  # between tries while the store refuses

log = logging.getLogger(__name__)

Outcomes = Counter[str]


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
    ) -> None:
        self.hours = hours
        self._waha = waha
        self._store = store
        self._sessions = sessions
        self._ingest = ingest
        self._metrics = metrics
        self._clock = clock
        self._noted: dict[str, float] = {}  # as the store has it
        self._gaps: dict[str, float] = {}  # sessions that do not work, and what was heard before
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Nothing is recovered of a session of which nothing was ever heard."""
        self._noted = await self._store.heard()
        self._sessions.changed = self._status_changed
        if self.hours:
            for session, at in self._noted.items():
                self._gaps[session] = at
                self._spawn(self._until_answered(session))
        self._spawn(self._keep_noting())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(StoreUnavailable):
            await self._note()

    def last_heard(self, session: str) -> float | None:
        known = self._sessions.all().get(session)
        return max(known.last_message if known else 0.0, self._noted.get(session, 0.0)) or None

    def since(self, session: str, hours: float | None) -> float | None:
        """From when on to ask, Unix seconds; None if that is not to be known."""
        return self.last_heard(session) if hours is None else self._clock() - hours * 3600

    async def recover(self, session: str, since: float) -> Outcomes:
        """Take in what was sent after since (Unix seconds), as far back as hours allow; how many
        messages were routed, duplicate, unknown_user or ignored. Raise WahaError."""
        now = self._clock()
        begin = int(max(min(since, now) - _MARGIN_SECONDS, now - self.hours * 3600, 0.0))
        async with self._turns.setdefault(session, asyncio.Lock()):
            await self._learn_own_number(session)
            messages = await self._asked(session, begin)
            outcomes = Outcomes()
            for message in messages:
                outcome = await self._take_in(session, message)
                self._metrics.recovered(outcome)
                outcomes[outcome] += 1
        log.info(
            "🩹 Asked WAHA for messages of session %s since %s: %s new, %s known already",
            session,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin)),
            outcomes["routed"] + outcomes["unknown_user"],
            outcomes["duplicate"],
            extra={"event": "recovery.done", "session": session, **outcomes},
        )
        return outcomes

    async def _asked(self, session: str, since: int) -> list[dict[str, Any]]:
        """Oldest first, each once."""
        found: dict[str, dict[str, Any]] = {}
        offset = size = 0
        while len(found) < _MOST and size < _MOST_BYTES:
            page = await self._waha.messages(session, since=since, limit=_PAGE, offset=offset)
            try:
                size += len(json.dumps(page))
            except RecursionError as exc:
                raise WahaRefused(f"messages of session {session}: nested too deep", 200) from exc
            told = map(_with_id, page)
            fresh = {one["id"]: one for one in told if _sent(one) >= since}
            if not fresh.keys() - found.keys():
                break  # nothing more, or an engine that knows no offset
            # Newest first, as WAHA gives them: those of one second keep their order when turned.
            found |= {id_: one for id_, one in fresh.items() if id_ not in found}
            offset += len(page)
        oldest_first = list(found.values())
        oldest_first.reverse()
        oldest_first.sort(key=_sent)
        return oldest_first

    async def _take_in(self, session: str, payload: dict[str, Any]) -> str:
        body = _webhook(session, payload)
        while True:
            try:
                return _outcome(await self._ingest.recover(body))
            except BadBody:
                return "ignored"
            except StoreUnavailable:
                await asyncio.sleep(_STORE_SECONDS)

    async def _until_answered(self, session: str) -> None:
        """Close the session's gap; it stays open where WAHA does not answer for long."""
        for _ in range(_TRIES):
            since = self._gaps.get(session)
            if since is None:
                return
            try:
                await self.recover(session, since)
                self._close_gap(session, since)
                return
            except WahaRefused as exc:
                if exc.status in _CANNOT_TELL:  # else a person can mend it, as a wrong key
                    self._close_gap(session, since)
                log.info(
                    "WAHA cannot tell what came while nobody listened (%s)",
                    exc,
                    extra={"event": "recovery.refused", "session": session},
                )
                return
            except WahaError as exc:
                log.debug("%s", exc, extra={"event": "recovery.failed", "session": session})
            except Exception:  # whatever WAHA answers
                log.exception("a recovery stumbled", extra={"event": "recovery.error"})
                return
            await asyncio.sleep(_AGAIN_SECONDS)
        log.warning(
            "WAHA did not answer which messages of session %s came while nobody listened",
            session,
            extra={"event": "recovery.failed", "session": session},
        )

    def _close_gap(self, session: str, since: float) -> None:
        if self._gaps.get(session) == since:  # else it has broken off once more
            del self._gaps[session]

    async def _learn_own_number(self, session: str) -> None:
        """No event has told it yet, and it is no user."""
        found: dict[str, Any] = {}
        with contextlib.suppress(WahaRefused):  # it may tell of messages all the same
            found = await self._waha.session(session)
        me = found.get("me")
        shown = me if isinstance(me, dict) else {}
        ids = [one for name in ("id", "lid") if (one := events.person(shown.get(name)))]
        self._sessions.own(frozenset(ids))

    def _status_changed(self, session: str, before: str | None, now: str) -> None:
        if now != "WORKING":
            if (heard := self.last_heard(session)) is not None:
                self._gaps.setdefault(session, heard)
        elif session in self._gaps and self.hours:
            self._spawn(self._until_answered(session))

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

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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


def _outcome(taken: Accepted | Ignored) -> str:
    if isinstance(taken, Ignored):
        return "ignored"
    if taken.decision is None:
        return "duplicate"
    return "unknown_user" if isinstance(taken.decision, AskForLink) else "routed"
