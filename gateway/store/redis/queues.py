"""User queues: claiming from them, settling, and what becomes due."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from gateway.domain.lock_events import LockEvent
from gateway.domain.model import (
    ALL_TENANTS,
    LONGEST_RETRY_AFTER,
    DeadLettered,
    Delivered,
    Delivery,
    Outcome,
    Requeue,
    Retry,
    TenantFilter,
    TenantId,
    UserId,
)
from gateway.domain.person import Known
from gateway.errors import StoreUnavailable
from gateway.store.base import (
    TOLERANCE_SECONDS,
    Limits,
    OnLockEvent,
    in_batches,
)
from gateway.store.redis import history as redis_history
from gateway.store.redis import rows
from gateway.store.redis.commands import Commands
from gateway.store.redis.facts import (
    Command,
    Facts,
)
from gateway.store.redis.scripts import (
    Scripts,
    padded,
    session_of,
)
from gateway.store.redis.sessions import SessionKeys

HEAL_SECONDS = 1.0  # after a clock that has gone back was seen
_SEND_SECONDS = 1.0  # before the lease ends nothing new is sent
_POLL_SECONDS = 0.2  # claim() looks again so often: another router may have accepted something
_CHUNK = 500  # changed by one script, which keeps others waiting

_IsDue = Callable[[float, float | None, int], bool]  # due, tried at, poison attempts

log = logging.getLogger(__name__)


class Queues(SessionKeys):
    def __init__(self, scripts: Scripts, limits: Limits, on_lock_event: OnLockEvent) -> None:
        super().__init__(scripts, limits, on_lock_event)
        self._claimable = ALL_TENANTS

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
        soon, taken = rest
        found = [rows.delivery(row) for row in taken]
        for one in found:
            self._claims[session, one.id] = lease.name, one.idempotency_key
        return found, float(soon) if soon else _POLL_SECONDS

    def may_send(self, delivery: Delivery) -> bool:
        session = session_of(delivery.user)
        lease = self._leases.get(session)
        claimed_under = self._claims.get((session, delivery.id))
        return (
            lease is not None
            and (lease.name, delivery.idempotency_key) == claimed_under
            and time.monotonic() < lease.until - _SEND_SECONDS
        )

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
            if any(one in tenants for one in await self._waiting_tenants(session)):
                return True
        return False

    async def _waiting_tenants(self, session: str) -> list[TenantId]:
        (found,) = await self._scripts.read(session, ["HKEYS", "waiting"])
        return [TenantId(int(one)) for one in found if one]

    async def make_due(
        self, tenants: TenantFilter = ALL_TENANTS, *, without_poison: bool = False
    ) -> None:
        which = _has_no_poison if without_poison else _any
        for session in list(self._sessions):
            there = await self._waiting_tenants(session) if tenants.others else tenants.named
            some = [one for one in there if one in tenants]
            for batch in in_batches(some, _CHUNK):
                await asyncio.gather(*(self._due_now(session, one, which) for one in batch))
        self._work.set()

    async def _due_now(self, session: str, tenant: TenantId, which: "_IsDue") -> None:
        """What of tenant waits for a backoff is due now, as far as which says so."""
        scripts, passed, page = self._scripts, 0, _CHUNK
        while page == _CHUNK:
            now = repr(self.now())
            (found,) = await scripts.read(
                session,
                ["ZRANGEBYSCORE", f"due:{tenant}", f"({now}", "+inf", "WITHSCORES", "LIMIT",
                 str(passed), str(_CHUNK)],
            )  # fmt: skip
            later = [(user.decode(), float(due)) for user, due in rows.pairs(found)]
            page = len(later)
            heads = await scripts.read(
                session, *(["ZRANGE", f"queue:{tenant}:{user}", "0", "0"] for user, _ in later)
            )
            ids = [head[0].decode() if head else "" for head in heads]
            tries = await scripts.read(
                session, *(["HMGET", f"d:{id_}", "tried_at", "poison_attempts"] for id_ in ids)
            )
            due_now: list[Command] = [
                ["due", str(tenant), user]
                for (user, due), (tried_at, poison) in zip(later, tries, strict=True)
                if which(due, float(tried_at) if tried_at else None, int(poison or 0))
            ]
            if due_now:
                await scripts.transact(session, due_now, makes_room=True)
            passed += page - len(due_now)

    def _was_put_off_ahead(self, due: float, tried_at: float | None, _: int) -> bool:
        """By a clock that has gone back since, which no backoff explains."""
        now = self.now()
        return (due if tried_at is None else tried_at) > now or due > now + LONGEST_RETRY_AFTER

    # a clock that has gone back

    async def _heal_clocks(self) -> None:
        while self._gone_back:
            session, back = next(iter(self._gone_back.items()))
            await self._heal_clock(session, back)
            self._gone_back.pop(session, None)

    async def _heal_clock(self, session: str, back: float) -> None:
        """Redis' has gone back by so many seconds."""
        for tenant in await self._waiting_tenants(session):
            await self._due_now(session, tenant, self._was_put_off_ahead)
        redated = await self._redate(session, back)
        log.warning(
            "Redis' clock has gone back by %.1f s: what was put off is due, and %s lock changes"
            " that lay in the future have their own time again",
            back,
            redated,
            extra={"event": "store.clock", "count": redated},
        )
        self._work.set()

    async def _redate(self, session: str, back: float) -> int:
        """Changes of locks that lie in the future get their own time back; how many. A clock that
        is behind what WhatsApp has said is wrong itself: then none do."""
        scripts, now = self._scripts, self.now()
        latest = now + TOLERANCE_SECONDS
        redated, cursor = 0, b"start"
        (sent,) = await scripts.read(session, ["HGET", "numbers", "sent"])
        if float(sent or 0) > latest:
            cursor = b"0"
        while cursor != b"0":
            at = "0" if cursor == b"start" else cursor.decode()
            page = await scripts.read(session, ["HSCAN", "change", at, "COUNT", str(_CHUNK)])
            ((cursor, found),) = page
            for user, change in rows.pairs(found):
                if float(change.split()[0]) > latest:
                    await self._redate_user(session, UserId(user.decode()), back, latest)
                    redated += 1
        await scripts.transact(session, [["HSET", "numbers", "clock", repr(now)]], makes_room=True)
        return redated

    async def _redate_user(self, session: str, user: UserId, back: float, latest: float) -> None:
        now, (texts,) = (
            self.now(),
            await self._scripts.read(session, ["LRANGE", f"h:{user}", "0", "-1"]),
        )
        changes: list[Command] = []
        last: LockEvent | None = None
        for place, one in enumerate(map(redis_history.entry, texts)):
            event = redis_history.redated(one.event, latest, back, now)
            if event != one.event:
                text = redis_history.text_of(one.id, event)
                changes.append(["LSET", f"h:{user}", str(place), text])
            last = event if event.changed else last
        commands = Commands(Facts(Known({}, {})), now)
        if last:
            commands.note_change(last)
        length = str(len(texts))
        await self._scripts.transact(
            session,
            changes + commands.all,
            reads=[["LLEN", f"h:{user}"]],
            expected=[length],
            makes_room=True,
        )


def _any(_due: float, _tried_at: float | None, _poison: int) -> bool:
    return True


def _has_no_poison(_due: float, _tried_at: float | None, poison: int) -> bool:
    return poison == 0
