"""The store for more than one router: everything in Redis (6.2 or newer), changed by scripts.

Each operation is one step of a script, which nothing interrupts, and all keys of one WAHA session
carry its hash tag, so that it touches one slot of a cluster. What each key holds is said at the
head of the files in lua/. A 200 is as durable as Redis' `appendfsync`.

A router holds a lease on each session's keys (15 s, renewed every 5 s). What it has claimed is free
for others when the lease ends, and what it says afterwards is refused.
"""

import asyncio
import contextlib
import heapq
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import orjson

from gateway.domain import person
from gateway.domain.model import (
    ALL_TENANTS,
    LONGEST_RETRY_AFTER,
    Accepted,
    Backlog,
    Bind,
    DeadLetter,
    DeadLettered,
    Decide,
    Delivered,
    Delivery,
    DryRun,
    Erased,
    Export,
    Forward,
    Health,
    HistoryEntry,
    InboundMessage,
    Moment,
    Outcome,
    PersonSummary,
    Requeue,
    Retry,
    Selection,
    StoredMessage,
    TenantFilter,
    TenantId,
    Totals,
    Unreadable,
    UnreadableReason,
    UserId,
)
from gateway.domain.person import (
    HELP_SECONDS,
    AddDelivery,
    Changed,
    Known,
    MarkSeen,
    PairIds,
    RecordEvent,
    SetLock,
)
from gateway.errors import NoBackUp, StartRefused, StoreUnavailable
from gateway.store.base import (
    DECRYPTION_SECONDS,
    MAX_UNREADABLE,
    MAX_UNREADABLE_BYTES,
    UNREADABLE_SECONDS,
    Limits,
    LocksPage,
    backlog_refusal,
    in_batches,
    whole_history,
)
from gateway.store.files import history, mappings, opening
from gateway.store.files.journal import Committed
from gateway.store.person_operations import PersonOperations, Rule, ids_in, is_known
from gateway.store.redis import history_rows, packing
from gateway.store.redis.scripts import (
    HOME,
    LOOKING,
    MARK,
    UNFINISHED,
    Scripts,
    first_id,
    open_scripts,
    padded,
    session_of,
    why_no_start,
    without_none,
)

LEASE_SECONDS = 15.0
_RENEW_SECONDS = 5.0
_HEAL_SECONDS = 1.0  # after a clock that has gone back was seen
_SEND_SECONDS = 1.0  # before the lease ends nothing new is sent
_POLL_SECONDS = 0.2  # claim() looks again so often: another router may have accepted something
_CHUNK = 500  # changed by one script, which keeps others waiting
_USERS_AT_ONCE = 5_000  # moved by one script: half a second
_MOST_LIDS = 10_000
_MOST_GUESSES = 100_000  # 40 MB
log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class _Lease:
    """On one session's keys. name: ends in its fencing number. until: monotonic seconds."""

    name: str
    until: float


class RedisStore(PersonOperations):
    """See base.Store. Any number of routers may share one Redis."""

    @classmethod
    async def open(
        cls,
        url: str,
        limits: Limits,
        committed: Committed = lambda _seconds, _operations: None,
        *,
        beside: Path | None = None,
    ) -> "RedisStore":
        """url: see scripts.open_scripts. beside: the data folder of the same router.

        Raise StartRefused if Redis cannot be reached or used, or is empty while that folder holds
        what a router on files has kept.
        """
        scripts = await open_scripts(url, hold_seconds=limits.hold_seconds, committed=committed)
        store = cls(scripts, limits)
        try:
            await store._start(beside)
        except StoreUnavailable as exc:
            await scripts.close()
            raise StartRefused(f"STORE_URL: {why_no_start(exc.__cause__ or exc)}") from exc
        except StartRefused:
            await scripts.close()
            raise
        return store

    def __init__(self, scripts: Scripts, limits: Limits) -> None:
        self._scripts = scripts
        super().__init__(limits)
        self._router = uuid.uuid4().hex
        self._sessions: dict[str, int] = {}  # each with its number
        self._leases: dict[str, _Lease] = {}
        self._claims: dict[tuple[str, int], tuple[str, str]] = {}  # session, id → lease, key
        self._work = asyncio.Event()
        self._clock = time.time() - time.monotonic()  # Redis' as of the last look, less ours
        self._gone_back: dict[str, float] = {}  # sessions whose clock has, by seconds
        self._claimable = ALL_TENANTS
        self._totals = (0, 0)
        self._counts_begun = 0
        self._counting = asyncio.Lock()
        self._known_as: dict[UserId, UserId] = {}  # LIDs with a phone: one person has one turn
        self._guesses: dict[tuple[UserId, ...], bytes] = {}  # what was known of these last time
        self._refused: tuple[TenantId, str] | None = None
        self._unknown: dict[str, set[str]] = {}  # claims of which nobody here knows, by session
        self._full_sessions: dict[str, str] = {}  # MAX_BACKLOG is reached there, in words
        self._turns: WeakValueDictionary[UserId, asyncio.Lock] = WeakValueDictionary()
        self._dropped_before = 0  # keys that Redis had dropped before we began
        self._lost: str | None = None  # why what it holds is not to be trusted
        self._at_risk: str | None = None  # why it may come to that
        self._tasks: list[asyncio.Task[None]] = []

    async def _start(self, beside: Path | None) -> None:
        await self._refuse_moved()
        if beside and (held := opening.what_it_holds(beside)) and await self._holds_no_lock():
            raise StartRefused(
                f"STORE_URL: this Redis holds no lock, while {beside} holds {held}: carry it over"
                f" with python whatsapp_router.py migrate --from file:{beside} --to …, or move"
                f" router.db and {mappings.FILE_NAME} away to begin with nothing"
            )
        await self._adopt_store(beside)
        self._dropped_before = (await self._scripts.memory()).dropped
        await self._know_session(HOME)
        await self._renew_all()
        await self._refuse_moved()  # again: a migration looks for leases after it has set its mark
        await self._scripts.call(self._scripts.client.delete(MARK))
        await self._count()
        self._tasks = [
            asyncio.create_task(self._keep(work, seconds))
            for work, seconds in (
                (self._renew_all, _RENEW_SECONDS),
                (self._sweep, _RENEW_SECONDS),
                (self._check_memory, _RENEW_SECONDS),
                (self._test, _RENEW_SECONDS),
                (self._heal_clocks, _HEAL_SECONDS),
            )
        ]

    async def _adopt_store(self, beside: Path | None) -> None:
        """And remember which it was: the next start must not take an empty one for it."""
        note = beside / opening.STORE_NOTE_NAME if beside and beside.is_dir() else None
        known = note.read_text("utf-8").strip() if note and note.exists() else None
        if known and known != await self._scripts.store_id():
            raise StartRefused(
                "STORE_URL: this Redis does not hold the store that a router with this DATA_DIR"
                " worked on last: it came back empty, or is another one. Restore it; or, to begin"
                f" with what it holds, delete {note}"
            )
        id_ = await self._scripts.adopt_store()
        if note and id_ != known:
            with contextlib.suppress(OSError):  # a folder that cannot be written notes nothing
                note.write_text(f"{id_}\n", "utf-8")

    async def _holds_no_lock(self) -> bool:
        for session in await self._scripts.sessions():
            if await self._scripts.call(self._scripts.client.hlen(f"gw:{{{session}}}:lock")):
                return False
        return True

    async def _refuse_moved(self) -> None:
        client = self._scripts.client
        place = await self._scripts.call(client.get(f"gw:{{{HOME}}}:closed"))
        if place:
            raise StartRefused(
                f"STORE_URL: all that was in this Redis has been migrated to {place.decode()}, or"
                " is being migrated there; to go on with what it was then: python"
                " whatsapp_router.py migrate --reopen redis://…"
            )
        mark = await self._scripts.call(client.get(MARK))
        if mark == LOOKING:
            raise StartRefused("STORE_URL: a migration to this Redis begins: wait a minute")
        if mark == UNFINISHED:
            raise StartRefused("STORE_URL: a migration to this Redis did not finish: run it again")

    async def _keep(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except StoreUnavailable:
                pass  # the call has said so, and the next look may be luckier
            except Exception:
                log.exception("the watch failed unexpectedly", extra={"event": "store.error"})

    # leases

    async def _renew_all(self) -> None:
        for session, number in (await self._scripts.sessions()).items():
            if session not in self._sessions:  # another router knows it
                await self._scripts.mark(session)
                self._sessions[session] = number
        for session in list(self._sessions):
            await self._renew(session)
            await self._find_the_lost(session)

    async def _find_the_lost(self, session: str) -> None:
        """Free what is claimed by us and nobody here knows of, if that was so last time as well: an
        answer to a claim was lost, or came when nobody waited for it any more."""
        lease = self._leases[session].name
        claimed = await self._scripts.run(session, "claimed", lease=lease)
        unknown = {one.decode() for one in claimed if (session, int(one)) not in self._claims}
        if lost := unknown & self._unknown.get(session, set()):
            await self._scripts.run(session, "release", lease=lease, ids=sorted(lost))
            self._work.set()
        self._unknown[session] = unknown - lost

    async def _renew(self, session: str) -> _Lease:
        began = time.monotonic()
        known = self._leases.get(session)
        name, now, back = await self._scripts.run(
            session,
            "renew",
            router=self._router,
            lease=known.name if known else None,
            milliseconds=int(LEASE_SECONDS * 1000),
            base=first_id(self._sessions[session]),
            step=opening.STEP_SECONDS,
        )
        # From before the question: the lease cannot end sooner there than here.
        lease = self._leases[session] = _Lease(name.decode(), began + LEASE_SECONDS)
        if session == HOME:  # of a cluster this one node's is taken
            self._clock = float(now) - time.monotonic()
        if back:
            self._gone_back[session] = float(back)
        return lease

    async def _heal_clocks(self) -> None:
        while self._gone_back:
            session, back = next(iter(self._gone_back.items()))
            await self._heal_clock(session, back)
            self._gone_back.pop(session, None)

    async def _heal_clock(self, session: str, back: float) -> None:
        """Redis' has gone back by so many seconds."""
        for tenant in await self._scripts.run(session, "waiting_tenants"):
            if tenant:
                await self._due_now(session, TenantId(int(tenant)), "ahead")
        redated, cursor = 0, b"start"
        while cursor != b"0":
            some, cursor = await self._scripts.run(
                session,
                "redate",
                back=back,
                cursor="0" if cursor == b"start" else cursor.decode(),
                chunk=_CHUNK,
                tolerance=history.TOLERANCE_SECONDS,
            )
            redated += some
        log.warning(
            "Redis' clock has gone back by %.1f s: what was put off is due, and %s lock changes"
            " that lay in the future have their own time again",
            back,
            redated,
            extra={"event": "store.clock", "count": redated},
        )
        self._work.set()

    def now(self) -> float:
        return self._clock + time.monotonic()

    async def _lease(self, session: str) -> _Lease:
        lease = self._leases.get(session)
        return lease if lease else await self._renew(session)

    def may_send(self, delivery: Delivery) -> bool:
        session = session_of(delivery.user)
        lease = self._leases.get(session)
        claimed_under = self._claims.get((session, delivery.id))
        return (
            lease is not None
            and (lease.name, delivery.idempotency_key) == claimed_under
            and time.monotonic() < lease.until - _SEND_SECONDS
        )

    async def _test(self) -> None:
        """A quiet night must not leave /health red."""
        if self._scripts.trouble:
            for session in {HOME, *self._scripts.refusing}:
                with contextlib.suppress(StoreUnavailable):
                    await self._scripts.run(session, "test_write")

    async def _sweep(self) -> None:
        gone = 0
        for session in list(self._sessions):
            (some,) = await self._scripts.run(
                session,
                "sweep",
                help_seconds=HELP_SECONDS,
                chunk=_CHUNK,
                unreadable={
                    "most": MAX_UNREADABLE,
                    "most_bytes": MAX_UNREADABLE_BYTES,
                    "seconds": UNREADABLE_SECONDS,
                    "comes_later": UnreadableReason.NOT_DECRYPTED.value,
                    "chunk": _CHUNK,
                },
            )
            gone += some
        if gone:
            log.info(
                "%s held messages got no link and are deleted",
                gone,
                extra={"event": "held.expired", "count": gone},
            )
        await self._count()

    async def _count(self) -> None:
        """Count what is there now. Those who ask while one counts share the next count."""
        begun = self._counts_begun
        async with self._counting:
            if begun == self._counts_begun:
                self._counts_begun += 1
                await self._count_now()

    async def _count_now(self) -> None:
        users, tenants, many = 0, set[bytes](), 0
        for session in list(self._sessions):
            count, its, names, waiting = await self._scripts.run(
                session, "totals", names=len(self._sessions) > 1
            )
            users, many = users + count, max(many, its)
            tenants |= set(names)
            if waiting < self.limits.max_backlog:
                self._full_sessions.pop(session, None)
        self._totals = users, len(tenants) or many

    async def _check_memory(self) -> None:
        """A Redis that drops keys may have been set to only now."""
        memory = await self._scripts.memory()
        # A server that was restarted counts anew.
        self._dropped_before = min(self._dropped_before, memory.dropped)
        dropped = memory.dropped - self._dropped_before
        # For good: what is gone does not come back with another policy.
        lost, at_risk = self._lost, None
        if lost is None and dropped > 0 and (memory.policy or "").startswith("allkeys"):
            lost = (
                f"it has dropped {dropped} keys for want of memory (maxmemory-policy"
                f" {memory.policy}), and locks may be among them: set noeviction, restore it, and"
                " restart the routers"
            )
        elif lost is None and memory.policy:
            at_risk = f"Redis drops keys when its memory is full (maxmemory-policy {memory.policy})"
            at_risk += f", {dropped} so far" if dropped > 0 else ""
            at_risk += ": set noeviction"
        if (lost, at_risk) != (self._lost, self._at_risk) and (lost or at_risk):
            log.error("%s", lost or at_risk, extra={"event": "store.evicts"})
        self._lost, self._at_risk = lost, at_risk

    async def _know(self, user: UserId) -> str:
        """The session of user, from now on among those that are looked through."""
        session = session_of(user)
        if session not in self._sessions:
            await self._know_session(session)
            await self._renew(session)
        return session

    async def _know_session(self, session: str) -> None:
        self._sessions[session] = await self._scripts.number_of(session)

    # accepting

    async def accept(self, message: InboundMessage, decide: Decide) -> Accepted:
        if self._lost:
            raise self.unavailable(f"Redis: {self._lost}")
        user = ids_in(message)[-1]
        # What one router is given is decided in that order, though it may take two calls.
        async with self._turn_of(self._known_as.get(user, user)):
            accepted = await super().accept(message, decide)
        if accepted.user != user:
            self._note_known_as(user, accepted.user)
        self._scripts.retry_after.over()
        return accepted

    def unavailable(self, reason: str) -> StoreUnavailable:
        return self._scripts.retry_after.unavailable(reason)

    def _note_known_as(self, lid: UserId, phone: UserId) -> None:
        if len(self._known_as) >= _MOST_GUESSES:
            self._known_as.clear()
        self._known_as[lid] = phone

    def _turn_of(self, user: UserId) -> asyncio.Lock:
        return self._turns.setdefault(user, asyncio.Lock())

    async def change(
        self, ids: Sequence[UserId], rule: Rule[T], message: InboundMessage | None = None
    ) -> T:
        result, _ = await self._change(ids, rule, message)
        return result

    async def _change(
        self,
        ids: Sequence[UserId],
        rule: Rule[T],
        message: InboundMessage | None = None,
        *,
        drop_waiting_of: Callable[[T], UserId | None] = lambda _: None,
    ) -> tuple[T, int]:
        """As change(); and how many deliveries were dropped."""
        session, key = session_of(ids[0]), tuple(sorted(ids))
        args: dict[str, Any] = {
            "ids": list(ids),
            "digest": _digest(message),
            "newest": _newest(message),
            **self._backlog_limits(),
        }
        # Mostly nothing has changed since, and one call will do.
        facts, seen = self._guesses.pop(key, None), b""
        is_guess = facts is not None
        refused: tuple[TenantId, str] | None = None
        while True:
            if facts is None:
                _, facts, seen = await self._scripts.run(session, "change", **args)
            result, changed = self._ask(rule, packing.known_from(facts, seen), refused)
            dropped_of = drop_waiting_of(result)
            if not (changed.changes or is_guess or dropped_of):
                break
            if changed.changes:
                await self._know(ids[0])
            changes, bodies = packing.packed(changed.changes)
            answer = await self._scripts.run(
                session,
                "change",
                bodies,
                **args,
                known=facts.decode(),
                seen=seen.decode(),
                changes=changes,
                drop=dropped_of,
            )
            if answer[0] == b"changed":
                await self._changed(changed)
                if not _changes_persons(changed):
                    self._guess(key, facts)
                return result, answer[1]
            if answer[0] == b"full":
                added = next(one for one in changed.changes if isinstance(one, AddDelivery))
                refused = self._full(answer[1].decode(), added.tenant, session)
            else:  # what is known is not, or no longer, what was decided on
                (_, facts, seen), is_guess = answer, False
        self._guess(key, facts)
        return result, 0

    def _ask(
        self, rule: Rule[T], known: Known, refused: tuple[TenantId, str] | None
    ) -> tuple[T, Changed]:
        self._refused = refused
        try:
            return rule(known)
        finally:
            self._refused = None

    def refusal(self, tenant: TenantId) -> str | None:
        """The script counts what waits; while a rule is asked again this is what it said."""
        return self._refused[1] if self._refused and self._refused[0] == tenant else None

    def _guess(self, key: tuple[UserId, ...], facts: bytes) -> None:
        if len(self._guesses) >= _MOST_GUESSES:
            self._guesses.clear()
        self._guesses[key] = facts

    async def _changed(self, changed: Changed) -> None:
        for one in changed.changes:
            if isinstance(one, PairIds) and one.pair.phone:
                self._note_known_as(one.pair.lid, one.pair.phone)
        if any(isinstance(one, SetLock) for one in changed.changes):
            await self._count()
        self._work.set()

    async def load(self, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        (known,) = await self._load_each([(ids, message)])
        return known

    async def _load_each(
        self, asked: Sequence[tuple[Sequence[UserId], InboundMessage | None]]
    ) -> list[Known]:
        """Of one session."""
        each = [[list(ids), _digest(message) or False] for ids, message in asked]
        answers = await self._scripts.run(session_of(asked[0][0][0]), "load", each=each)
        return [packing.known_from(facts, seen) for facts, seen in answers]

    async def are_known(self, messages: Sequence[InboundMessage]) -> list[bool]:
        known = [False] * len(messages)
        by_session: dict[str, list[int]] = {}
        for place, message in enumerate(messages):
            if message.dedup_key and (ids := ids_in(message)):
                by_session.setdefault(session_of(ids[0]), []).append(place)
        for places in by_session.values():
            for start in range(0, len(places), _CHUNK):
                some = [messages[place] for place in places[start : start + _CHUNK]]
                found = await self._load_each([(ids_in(one), one) for one in some])
                for place, one, its in zip(places[start:], some, found, strict=False):
                    known[place] = is_known(its, one)
        return known

    async def dry_run(self, message: InboundMessage, decide: Decide) -> DryRun:
        found = await super().dry_run(message, decide)
        decision, session = found.accepted.decision, session_of(found.accepted.user)
        if not isinstance(decision, Bind | Forward):
            return found
        (said,) = await self._scripts.run(
            session, "full", tenant=str(decision.tenant), **self._backlog_limits()
        )
        if not said:
            return found
        return replace(found, refused=self._full(said.decode(), decision.tenant, session)[1])

    def _backlog_limits(self) -> dict[str, Any]:
        return {
            "max_backlog": self.limits.max_backlog,
            "max_backlog_per_tenant": self.limits.max_backlog_per_tenant,
        }

    def _full(self, said: str, tenant: TenantId, session: str) -> tuple[TenantId, str]:
        what, waiting = said.split()
        everything = int(waiting) if what == "all" else 0
        reason = backlog_refusal(self.limits, everything, tenant, int(waiting))
        assert reason is not None
        if what == "all":
            self._full_sessions[session] = reason
        return tenant, reason

    async def add_unreadable(self, message: InboundMessage, reason: UnreadableReason) -> None:
        # Under the user's session as far as there is a user; else all lie together.
        user = message.phone or message.lid
        row = {
            "key": message.dedup_key.digest.hex() if message.dedup_key else None,
            "arrived": repr(message.arrived),
            "session": message.session,
            "event": message.event,
            "reason": reason.value,
            "user": user,
            "message_id": message.message_id,
        }
        session = await self._know(user) if user else HOME
        await self._scripts.run(session, "keep_unreadable", message.body, row=without_none(row))

    async def unreadable(self, *, limit: int, before: int | None = None) -> list[Unreadable]:
        found: list[Unreadable] = []
        for place, session in enumerate(self._by_number()):
            # Ids are counted by each session for itself: here its number distinguishes them.
            many = len(self._sessions)
            own = None if before is None else str((before - place + many - 1) // many)
            rows = await self._scripts.run(session, "unreadable", limit=limit, before=own)
            found += [_unreadable(row, place, many) for row in rows]
        return heapq.nlargest(limit, found, key=lambda one: one.id)

    def _by_number(self) -> list[str]:
        return sorted(self._sessions, key=self._sessions.__getitem__)

    async def held_lids(self) -> list[UserId]:
        found: list[UserId] = []
        for session in list(self._sessions):
            some = await self._scripts.run(session, "held_lids", most=_MOST_LIDS)
            found += [UserId(one.decode()) for one in some]
        return found[:_MOST_LIDS]

    # delivering

    async def claim(
        self,
        limit: int,
        *,
        wait: float,
        probe: TenantFilter | None = None,
    ) -> list[Delivery]:
        deadline = time.monotonic() + wait
        while True:
            self._work.clear()
            found: list[Delivery] = []
            soonest = _POLL_SECONDS
            for session in sorted(self._sessions):
                if len(found) < limit:
                    try:
                        some, soon = await self._claim_of(session, limit - len(found), probe)
                    except StoreUnavailable:
                        if not found:
                            raise
                        break  # those of other sessions are ours, and must be sent
                    except BaseException:  # nobody will send them: they are found and freed
                        for one in found:
                            self._claims.pop((session_of(one.user), one.id), None)
                        raise
                    found += some
                    soonest = min(soonest, soon)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(left, soonest))):
                    await self._work.wait()

    async def _claim_of(
        self, session: str, limit: int, probe: TenantFilter | None
    ) -> tuple[list[Delivery], float]:
        lease, tenants = await self._lease(session), probe or self._claimable
        state, *rest = await self._scripts.run(
            session,
            "claim",
            lease=lease.name,
            limit=limit,
            probe=probe is not None,
            named=[str(tenant) for tenant in tenants.named],
            others=tenants.others,
            max_in_flight=self.limits.max_in_flight,
            cap=self.limits.max_in_flight_per_tenant,
        )
        if state == b"lease":
            await self._renew(session)
            return [], 0.0
        soon, rows = rest
        found = [_delivery(row) for row in rows]
        for one in found:
            self._claims[session, one.id] = lease.name, one.idempotency_key
        return found, float(soon) if soon else _POLL_SECONDS

    async def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        session = session_of(delivery.user)
        args: dict[str, Any] = {"outcome": "requeue"}
        match outcome:
            case Requeue(sent_at=float(sent_at)):
                args["tried_at"] = repr(sent_at)
            case Delivered():
                args = {"outcome": "done"}
            case Retry():
                args = {
                    "outcome": "retry",
                    "poison": outcome.poison,
                    "tried_at": repr(outcome.tried_at),
                    "age": repr(outcome.age),
                    "wait": outcome.wait,
                }
            case DeadLettered():
                args = {
                    "outcome": "dead_letter",
                    "died_at": repr(outcome.died_at),
                    "reason": outcome.reason,
                    "status": "" if outcome.status is None else str(outcome.status),
                }
        answer = outcome.answer if isinstance(outcome, DeadLettered) else b""
        lease, key = self._claims.get((session, delivery.id), ("", ""))
        (state, *_) = await self._scripts.run(
            session,
            "settle",
            answer,
            id=padded(delivery.id),
            lease=lease,
            key=delivery.idempotency_key,
            **args,
        )
        if key == delivery.idempotency_key:
            self._claims.pop((session, delivery.id), None)
        if state != b"ok":  # somebody else has it, or will
            log.warning(
                "The lease ended before delivery %s did: it goes again, with the same key",
                delivery.id,
                extra={"event": "lease.lost", "tenant": delivery.tenant},
            )
        if self._full_sessions:
            await self._count()
        self._work.set()

    def set_claimable(self, tenants: TenantFilter, changed: Collection[TenantId] | None) -> None:
        self._claimable = tenants
        self._work.set()

    async def waits(self, tenants: TenantFilter) -> bool:
        for session in list(self._sessions):
            waiting = await self._scripts.run(session, "waiting_tenants")
            if any(TenantId(int(one)) in tenants for one in waiting if one):
                return True
        return False

    async def make_due(
        self, tenants: TenantFilter = ALL_TENANTS, *, without_poison: bool = False
    ) -> None:
        for session in list(self._sessions):
            some = await self._scripts.run(session, "waiting_tenants") if tenants.others else ()
            waiting = [TenantId(int(one)) for one in some if one]
            which = "without_poison" if without_poison else "all"
            there = [
                one for one in (waiting if tenants.others else tenants.named) if one in tenants
            ]
            for some in in_batches(there, _CHUNK):
                await asyncio.gather(*(self._due_now(session, one, which) for one in some))
        self._work.set()

    async def _due_now(self, session: str, tenant: TenantId, which: str) -> None:
        passed, more = 0, True
        while more:
            passed, more = await self._scripts.run(
                session,
                "due_now",
                tenant=str(tenant),
                which=which,
                longest=LONGEST_RETRY_AFTER,
                passed=passed,
                chunk=_CHUNK,
            )

    async def backlog(self) -> Backlog:
        oldest: float | None = None
        held = unread = dead = 0
        waiting: Counter[TenantId] = Counter()
        for session in list(self._sessions):
            first, counts, some_held, some_unread, some_dead = await self._scripts.run(
                session,
                "backlog",
                wait=DECRYPTION_SECONDS,
                comes_later=UnreadableReason.NOT_DECRYPTED.value,
            )
            held, unread, dead = held + some_held, unread + some_unread, dead + some_dead
            if first and (oldest is None or float(first) < oldest):
                oldest = float(first)
            for tenant, count in _pairs(counts):
                if tenant:
                    waiting[TenantId(int(tenant))] += int(count)
        return Backlog(waiting.total(), oldest, dict(waiting.most_common()), held, unread, dead)

    # locks

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        def rule(known: Known) -> tuple[tuple[UserId, TenantId | None], Changed]:
            unlocked, tenant, changed = person.unlock(known, user, at=at, now=self.now())
            return (unlocked, tenant), changed

        (unlocked, tenant), dropped = await self._change(
            (user,), rule, drop_waiting_of=lambda found: found[0] if drop_waiting else None
        )
        return unlocked, tenant, dropped

    async def move(
        self,
        old: TenantId,
        new: TenantId,
        *,
        with_waiting: bool = True,
        at: float | None = None,
    ) -> tuple[int, int]:
        users = moved = 0
        for session in list(self._sessions):
            some = _USERS_AT_ONCE
            while some == _USERS_AT_ONCE:
                some, along = await self._scripts.run(
                    session,
                    "move",
                    old=str(old),
                    new=str(new),
                    with_waiting=with_waiting,
                    at=_packed_time(at),
                    chunk=_USERS_AT_ONCE,
                )
                users, moved = users + some, moved + along
        await self._count()
        self._work.set()
        return users, moved

    def totals(self) -> tuple[int, int]:
        return self._totals

    async def locks(self, limit: int, after: UserId | None) -> LocksPage:
        pages = [await self._users(session, limit + 1, after) for session in sorted(self._sessions)]
        first = heapq.nsmallest(limit + 1, (pair for page in pages for pair in page))
        page = dict(first[:limit])
        return LocksPage(page, first[limit - 1][0] if len(first) > limit else None)

    async def users_of(
        self, tenant: TenantId, limit: int, after: UserId | None
    ) -> tuple[list[UserId], UserId | None]:
        pages = [
            await self._users(session, limit + 1, after, str(tenant))
            for session in sorted(self._sessions)
        ]
        first = heapq.nsmallest(limit + 1, (user for page in pages for user, _ in page))
        return first[:limit], first[limit - 1] if len(first) > limit else None

    async def _users(
        self, session: str, limit: int, after: UserId | None, tenant: str | None = None
    ) -> list[tuple[UserId, TenantId]]:
        found = await self._scripts.run(session, "users", limit=limit, after=after, tenant=tenant)
        return [(UserId(user.decode()), TenantId(int(its))) for user, its in _pairs(found)]

    async def tenant_totals(self) -> dict[TenantId, Totals]:
        answers: list[tuple[str, list[Any]]] = []
        for session in list(self._sessions):
            for of in ("owners", "delivered", "waiting", "dead", "first_seen", "last_seen"):
                answers.append((of, await self._scripts.run(session, "tenant_totals", of=of)))

        def joined() -> dict[TenantId, Totals]:
            sums: dict[TenantId, dict[str, Any]] = {}
            for of, pairs in answers:
                name = "users" if of == "owners" else of
                for tenant, value in _pairs(pairs):
                    if not tenant:
                        continue
                    mine = sums.setdefault(TenantId(int(tenant)), {})
                    if name == "first_seen":
                        mine[name] = min(mine.get(name, float(value)), float(value))
                    elif name == "last_seen":
                        mine[name] = max(mine.get(name, 0.0), float(value))
                    else:
                        mine[name] = mine.get(name, 0) + int(value)
            return {tenant: Totals(**found) for tenant, found in sums.items()}

        return await asyncio.to_thread(joined)  # anybody who posts links can make them many

    # a person's own

    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]:
        rows = await self._scripts.run(
            session_of(user),
            "history",
            user=user,
            limit=limit,
            before=None if before is None else str(before),
        )
        return [_history_entry(row) for row in rows]

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        ids, *counts = await self._scripts.run(
            session_of(user), "erase", user=user, salt=uuid.uuid4().hex
        )
        for known in (self._guesses, self._known_as):  # the person is in neither any longer
            known.clear()
        await self._count()
        self._work.set()
        return tuple(UserId(one.decode()) for one in ids), Erased(*counts)

    async def export(self, user: UserId) -> Export:
        session = session_of(user)
        ids, tenant, messages, _, help_ = await self._scripts.run(session, "export", user=user)
        entries = await whole_history(self, user)
        return Export(
            tuple(UserId(one.decode()) for one in ids),
            _tenant(tenant),
            tuple(map(_stored_message, messages)),
            tuple(entries),
            _help(help_),
        )

    async def summary(self, user: UserId, *, limit: int) -> PersonSummary:
        ids, _, messages, counts, _ = await self._scripts.run(
            session_of(user), "export", user=user, limit=limit
        )
        known = tuple(UserId(one.decode()) for one in ids)
        return PersonSummary(known, tuple(map(_stored_message, messages)), *map(int, counts))

    # dead letters

    async def dead_letters(
        self, which: Selection, *, limit: int, before: int | None = None
    ) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        for session in self._of(which):
            rows = await self._scripts.run(
                session,
                "letters",
                **_packed_selection(which),
                limit=limit,
                before=None if before is None else str(before),
            )
            found += [_dead_letter(row, with_body=False) for row in rows]
        return heapq.nlargest(limit, found, key=lambda dead_letter: dead_letter.id)

    async def dead_letter(self, id_: int) -> DeadLetter | None:
        for session in list(self._sessions):
            for row in await self._scripts.run(session, "letter", id=padded(id_)):
                return _dead_letter(row, with_body=True)
        return None

    async def replay(self, which: Selection) -> int:
        return await self._each_dead_letter("replay", which)

    async def delete_dead_letters(self, which: Selection) -> int:
        return await self._each_dead_letter("delete_dead_letters", which)

    async def _each_dead_letter(self, op: str, which: Selection) -> int:
        total = 0
        for session in self._of(which):
            newest = await self._scripts.run(session, "newest_letter")
            done = _CHUNK
            while newest and done == _CHUNK:
                # What dies meanwhile is not taken again.
                (done,) = await self._scripts.run(
                    session,
                    op,
                    **_packed_selection(which),
                    up_to=str(int(newest[0])),
                    chunk=_CHUNK,
                )
                total += done
        self._work.set()
        return total

    def _of(self, which: Selection) -> list[str]:
        return [session_of(which.user)] if which.user else sorted(self._sessions)

    # help messages

    async def help_waits(self) -> list[tuple[UserId, float]]:
        found: list[tuple[UserId, float]] = []
        for session in list(self._sessions):
            some = await self._scripts.run(session, "help_waits", help_seconds=HELP_SECONDS)
            found += [(UserId(user.decode()), float(at)) for user, at in _pairs(some)]
        return sorted(found, key=lambda pair: pair[1])

    # the whole

    async def note_heard(self, times: Mapping[str, float]) -> None:
        await self._scripts.run(HOME, "note_heard", times={s: repr(at) for s, at in times.items()})

    async def heard(self) -> dict[str, float]:
        found = await self._scripts.run(HOME, "heard")
        return {session.decode(): float(at) for session, at in _pairs(found)}

    async def back_up(self) -> Path:
        raise NoBackUp("the store is a Redis: back that up, by its append-only file")

    def health(self) -> Health:
        trouble = self._lost or self._scripts.trouble
        refusing = (
            f"Redis: {trouble}" if trouble else next(iter(self._full_sessions.values()), None)
        )
        return Health(refusing, None, has_file=False, at_risk=self._at_risk)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for session, lease in self._leases.items():
            with contextlib.suppress(StoreUnavailable):
                await self._scripts.run(session, "leave", lease=lease.name)
        await self._scripts.close()


def _pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _tenant(value: bytes) -> TenantId | None:
    return TenantId(int(value)) if value else None


def _packed_time(time: float | None) -> list[str] | None:
    return None if time is None else packing.packed_moment(Moment.of(time))


def _digest(message: InboundMessage | None) -> str | None:
    return message.dedup_key.digest.hex() if message and message.dedup_key else None


def _newest(message: InboundMessage | None) -> str | None:
    """The time that WhatsApp gave to message; None if it is that of its arrival."""
    is_whatsapps = message and message.sent.second < int(message.arrived)
    return str(message.sent.second) if message and is_whatsapps else None


def _changes_persons(changed: Changed) -> bool:
    """Whether what is known of persons is another now."""
    return any(
        not isinstance(one, AddDelivery | MarkSeen)
        and not (isinstance(one, RecordEvent) and one.event.changed is None)
        for one in changed.changes
    )


def _packed_selection(which: Selection) -> dict[str, Any]:
    packed = {
        "id": None if which.id is None else padded(which.id),
        "tenant": None if which.tenant is None else str(which.tenant),
        "user": which.user,
    }
    return without_none(packed)


def _headers(packed: bytes) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in orjson.loads(packed))


def _delivery(row: list[bytes]) -> Delivery:
    (id_, tenant, user, alias, key, headers, body, attempts, poison_attempts, tried_at, age,
     event_time) = row  # fmt: skip
    return Delivery(
        id=int(id_),
        tenant=TenantId(int(tenant)),
        user=UserId(user.decode()),
        alias=UserId(alias.decode()) if alias else None,
        idempotency_key=key.decode(),
        headers=_headers(headers),
        body=body,
        attempt=int(attempts) + 1,
        poison_attempts=int(poison_attempts),
        tried_at=float(tried_at) if tried_at else None,
        age=float(age),
        event_time=float(event_time),
    )


def _dead_letter(row: list[bytes], *, with_body: bool) -> DeadLetter:
    (id_, tenant, user, message_id, key, arrived, died_at, attempts, reason, status, answer,
     body) = row  # fmt: skip
    return DeadLetter(
        id=int(id_),
        tenant=TenantId(int(tenant)),
        user=UserId(user.decode()),
        message_id=message_id.decode() or None,
        idempotency_key=key.decode(),
        arrived=float(arrived),
        died_at=float(died_at),
        attempts=int(attempts),
        reason=reason.decode(),
        status=int(status) if status else None,
        answer=answer,
        body=body if with_body else None,
    )


def _stored_message(row: list[bytes]) -> StoredMessage:
    where, tenant, arrived, message_id, body = row
    known = message_id.decode() or None
    return StoredMessage(where.decode(), _tenant(tenant), float(arrived), known, body)


def _unreadable(row: list[bytes], place: int, many: int) -> Unreadable:
    id_, arrived, session, event, reason, user, message_id, body = row
    return Unreadable(
        int(id_) * many + place,
        float(arrived),
        session.decode(),
        event.decode(),
        UnreadableReason(reason.decode()),
        UserId(user.decode()) if user else None,
        message_id.decode() or None,
        body,
    )


def _history_entry(row: list[bytes]) -> HistoryEntry:
    id_, at, user, kind, from_, to, _, _, message_id, text = (part.decode() for part in row)
    cause = history_rows.unpack(text, user=user, kind=kind)
    return HistoryEntry(
        int(id_),
        float(at),
        UserId(user),
        kind,
        TenantId(int(from_)) if from_ else None,
        TenantId(int(to)) if to else None,
        message_id or None,
        cause.why,
        cause.who,
        UserId(cause.other) if cause.other else None,
    )


def _help(value: bytes) -> tuple[float, float | None] | None:
    if not value:
        return None
    queued, sent = value.decode().split()
    return float(queued), None if sent == "-" else float(sent)
