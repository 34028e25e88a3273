"""The worker: claim, send, settle; again after a backoff, or a dead letter.

It never forgets a claim: whatever happens to an attempt, its outcome is settled in the store, as
often as that takes. If the process dies in between, the claim dies with it and the message goes
again, with the same Idempotency-Key.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine

from gateway.delivery.attempts import Attempts
from gateway.delivery.circuit_breaker import Signal
from gateway.delivery.targets import Target, Targets
from gateway.domain.backoff import delay
from gateway.domain.model import (
    DeadLettered,
    Delivered,
    Delivery,
    Outcome,
    Requeue,
    Retry,
    TenantFilter,
    TenantId,
    is_lid,
    request_id,
)
from gateway.errors import (
    BackendError,
    BackendRefused,
    BackendUnavailable,
    NotConnected,
    StoreUnavailable,
)
from gateway.log import shown
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.media import Media

_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 300.0
_MAX_POISON_ATTEMPTS = 12  # then it is the message, not the backend
_CLAIM_SECONDS = 5.0  # claim() returns at least so often
# What begins at once ends at once, and keeps webhooks waiting: 256 attempts take 150 ms of a core.
_HANDFUL, _HANDFUL_SECONDS = 32, 0.002  # begun together, and then so long nothing
_PROBE_SPACING = 0.01  # seconds: thousands of backends that are away cost a third of a core
_STORE_SECONDS = 1.0  # between tries while the store fails
_AWAY_STATUSES = frozenset({404, *range(500, 600)})  # a deployment gone wrong answers 404 to all

_NAMES = {
    Delivered: "delivered",
    Retry: "retry",
    DeadLettered: "dead_letter",
    Requeue: "requeue",
}

log = logging.getLogger(__name__)


class DeliveryWorker:
    """Delivers what the store holds, until stopped."""

    def __init__(
        self,
        store: Store,
        targets: Targets,
        lid_lookup: LidLookup,
        media: Media,
        metrics: Metrics,
        *,
        max_in_flight: int,
        max_age: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.targets = targets
        self.attempts = Attempts()
        self._store = store
        self._lid_lookup = lid_lookup
        self._media = media
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._max_age = max_age
        self._clock = clock
        self._monotonic = monotonic
        self._in_flight: set[asyncio.Task[None]] = set()
        self._task_ended = asyncio.Event()
        self._stopped_at: float | None = None
        self._claiming: asyncio.Task[None] | None = None
        self._started = monotonic()
        self._probing: dict[Target, asyncio.Task[None]] = {}
        self._next_probe = 0.0  # of tenants' own backends
        self._making_due: set[asyncio.Task[None]] = set()
        targets.connect(on_breaker_change=self._breaker_changed, on_claimable=store.set_claimable)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def start(self) -> None:
        self._claiming = asyncio.create_task(self._claim_and_send())

    def stop_claiming(self) -> None:
        """No new attempt begins from now on."""
        self._stopped_at = self._stopped_at or self._monotonic()
        for task in (self._claiming, *self._probing.values()):
            if task:
                task.cancel()

    async def stop(self, grace: float) -> None:
        """Let what is in flight finish; what does not stays in the store.

        grace: seconds since stop_claiming(), which this calls if nobody has yet.
        """
        self.stop_claiming()
        assert self._stopped_at is not None
        if claiming := [one for one in (self._claiming, *self._probing.values()) if one]:
            await asyncio.wait(claiming)
        if self._in_flight:
            left_of_grace = self._stopped_at + grace - self._monotonic()
            await asyncio.wait(self._in_flight, timeout=max(0.0, left_of_grace))
        left = self._in_flight | self._making_due
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        await self.targets.close()

    async def _claim_and_send(self) -> None:
        while self._stopped_at is None:
            await self._log_errors(self._send_due())

    async def _log_errors(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except StoreUnavailable:
            await asyncio.sleep(_STORE_SECONDS)
        except Exception:
            log.exception("the worker failed unexpectedly", extra={"event": "delivery.error"})
            await asyncio.sleep(_STORE_SECONDS)

    async def _send_due(self) -> None:
        free = self._max_in_flight - len(self._in_flight)
        if free <= 0:
            await self._wait_for_a_task(_CLAIM_SECONDS)
            return
        some = min(free, _HANDFUL)
        self.targets.admit_waiting()
        for delivery in await self._store.claim(some, wait=_CLAIM_SECONDS):
            if (target := self.targets.admit(delivery.tenant)) is None:
                await self._settle(delivery, Requeue())
            elif self._waits_for_phone(delivery):
                self._start(self._wait_for_phone(delivery))
            else:
                self._send(delivery, target)
        await asyncio.sleep(_HANDFUL_SECONDS)

    async def _probe_until_closed(self, target: Target) -> None:
        """Send one probe at a time, until the breaker closes or no tenant has the URL any more."""
        while self.targets.is_open(target):
            await self._log_errors(self._send_probe(target))
        if self._probing.get(target) is asyncio.current_task():  # else _breaker_changed() did
            del self._probing[target]

    async def _send_probe(self, target: Target) -> None:
        await asyncio.sleep(target.breaker.seconds_to_probe(self._monotonic()))
        if target is not self.targets.shared:
            await asyncio.sleep(self._turn_of_a_probe())
            if not self.targets.has_room(target):
                await asyncio.sleep(_STORE_SECONDS)
                return
        tenants = self.targets.tenants_of(target)
        # Without waiting: each prober would be woken by each webhook.
        claimed = await self._store.claim(1, wait=0, probe=tenants)
        if not claimed:
            if await self._store.waits(tenants):
                await asyncio.sleep(_STORE_SECONDS)  # in flight yet, or not due
            else:
                target.breaker.close(self._monotonic())  # the next message will show
        for delivery in claimed:
            if self._waits_for_phone(delivery):
                probe = self._start(self._wait_for_phone(delivery))
            else:
                target.breaker.start_probe(self._monotonic())
                probe = self._send(delivery, target)
            await asyncio.wait([probe])

    def _turn_of_a_probe(self) -> float:
        """In how many seconds the next one may go to a backend of a tenant's own."""
        now = self._monotonic()
        self._next_probe = max(now, self._next_probe) + _PROBE_SPACING
        return self._next_probe - _PROBE_SPACING - now

    def _send(self, delivery: Delivery, target: Target) -> asyncio.Task[None]:
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "➡️ Attempt %s at Tenant %s backend begins",
                delivery.attempt,
                delivery.tenant,
                extra={
                    "event": "delivery.attempt",
                    "user": shown(delivery.user),
                    "tenant": delivery.tenant,
                    "attempt": delivery.attempt,
                    "key": delivery.idempotency_key,
                },
            )
        self.targets.start_attempt(target)
        task = self._start(self._deliver(delivery, target))
        task.add_done_callback(lambda _: self.targets.end_attempt(target))
        return task

    def _waits_for_phone(self, delivery: Delivery) -> bool:
        # What was counted as an attempt went out under the LID already.
        return (
            is_lid(delivery.user)
            and delivery.attempt == 1
            and self._lid_lookup.ask_and_expect(delivery.user)
        )

    async def _wait_for_phone(self, delivery: Delivery) -> None:
        """And put it back: claimed again it has its user's phone, if WAHA knew it."""
        await self._lid_lookup.wait_for(delivery.user)
        await self._settle(delivery, Requeue())

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._in_flight.add(task)
        task.add_done_callback(self._task_done)
        return task

    async def _wait_for_a_task(self, seconds: float) -> None:
        self._task_ended.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._task_ended.wait()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self._task_ended.set()

    async def _deliver(self, delivery: Delivery, target: Target) -> None:
        began = self._monotonic()
        outcome = await self._attempt(delivery, target)
        self._metrics.attempted(_NAMES[type(outcome)], self._monotonic() - began)
        if isinstance(outcome, Delivered):
            self._metrics.delivered_after(self._clock() - delivery.event_time)
        await self._settle(delivery, outcome)

    async def _attempt(self, delivery: Delivery, target: Target) -> Outcome:
        began = self._clock()
        try:
            fresh = await self._media.made_fresh(delivery)
            # Since the claim a lease may have ended, or tenants.json changed.
            to = self.targets.of(delivery.tenant)
            if to is None or not self._store.may_send(delivery):
                return Requeue()
            backend, target = to
            await backend.post(fresh)
        except BackendError as exc:
            return self._failed(delivery, target, exc, began)
        except Exception as exc:  # unforeseen: the queue must go on all the same
            log.exception("an attempt failed unexpectedly", extra={"event": "delivery.error"})
            unforeseen = BackendUnavailable(f"unforeseen: {exc!r}")
            return self._failed(delivery, target, unforeseen, began)
        target.breaker.record(Signal.SUCCESS, delivery.user, delivery.tenant, self._monotonic())
        if self.attempts.succeeded(delivery.tenant, self._clock()):
            only = TenantFilter(frozenset({delivery.tenant}), others=False)
            self._make_due_soon(only, without_poison=True)
        log.info(
            "✅ Forwarded to Tenant %s backend",
            delivery.tenant,
            extra={
                "event": "delivery.done",
                "user": shown(delivery.user),
                "tenant": delivery.tenant,
                "attempt": delivery.attempt,
                "request_id": request_id(delivery.headers),
            },
        )
        return Delivered()

    def _failed(
        self, delivery: Delivery, target: Target, exc: BackendError, began: float
    ) -> Outcome:
        now = self._clock()
        target.breaker.record(_signal_of(exc), delivery.user, delivery.tenant, self._monotonic())
        if isinstance(exc, BackendRefused):
            return self._dead_letter(delivery, exc, f"refused: {exc}")
        if target.breaker.is_open:
            if not isinstance(exc, NotConnected):
                return Requeue(sent_at=now)
            return Requeue()  # the backend is away: nobody's fault, and nothing to count

        asked = exc.retry_after if isinstance(exc, BackendUnavailable) else None
        was_there = _signal_of(exc) is Signal.ANSWER
        self.attempts.failed(delivery.tenant, now, str(exc), retry_after=asked, was_there=was_there)
        since = began if delivery.tried_at is None else delivery.tried_at
        poison = self.attempts.any_got_through(delivery.tenant, since)
        if delivery.poison_attempts + poison >= _MAX_POISON_ATTEMPTS:
            return self._dead_letter(delivery, exc, f"failed {delivery.attempt} times, last: {exc}")
        age = delivery.age + self._seconds_closed(delivery.tenant, target, since, now)
        if age > self._max_age:
            return self._dead_letter(delivery, exc, f"failed for {age:.0f} s, last: {exc}")

        wait = max(_backoff(delivery.attempt), asked or 0.0)  # "Retry-After: 0" is no invitation
        log.warning(
            "Tenant %s backend failed attempt %s of %s (%s), again in %.1f s",
            delivery.tenant,
            delivery.attempt,
            shown(delivery.user),
            exc,
            wait,
            extra={
                "event": "delivery.retry",
                "user": shown(delivery.user),
                "tenant": delivery.tenant,
                "attempt": delivery.attempt,
                "request_id": request_id(delivery.headers),
            },
        )
        return Retry(wait, str(exc), poison=poison, tried_at=now, age=age)

    def _dead_letter(self, delivery: Delivery, exc: BackendError, reason: str) -> DeadLettered:
        log.error(
            "☠️ Dead letter %s of Tenant %s, from %s: %s",
            delivery.id,
            delivery.tenant,
            shown(delivery.user),
            reason,
            extra={
                "event": "delivery.dead_letter",
                "user": shown(delivery.user),
                "tenant": delivery.tenant,
                "attempt": delivery.attempt,
                "request_id": request_id(delivery.headers),
            },
        )
        return DeadLettered(reason, self._clock(), exc.status, exc.answer)

    def _seconds_closed(self, tenant: TenantId, target: Target, since: float, now: float) -> float:
        """Seconds from `since` to now in which we ran and the breaker was closed; Unix times."""
        monotonic = self._monotonic()
        start = max(self._started, monotonic - max(0.0, now - since))
        open_ = self.targets.seconds_open(tenant, target, start, monotonic)
        return max(0.0, monotonic - start - open_)

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        while True:
            try:
                await self._store.settle(delivery, outcome)
                return
            except StoreUnavailable:
                pass
            except Exception:  # this outcome cannot be stored: the queue must go on all the same
                log.exception("an outcome was not stored", extra={"event": "delivery.error"})
                outcome = Requeue()
            await asyncio.sleep(_STORE_SECONDS)

    def _breaker_changed(self, target: Target) -> None:
        if before := self._probing.pop(target, None):
            before.cancel()
        if target.breaker.is_open:
            log.error(
                "🚧 The backend is away: %s; messages wait",
                target.url,
                extra={"event": "breaker.opened", "url": target.url},
            )
            if self._stopped_at is None:
                self._probing[target] = asyncio.create_task(self._probe_until_closed(target))
            return
        log.warning(
            "The backend is back: %s",
            target.url,
            extra={"event": "breaker.closed", "url": target.url},
        )
        asked = self.attempts.asked_to_wait(self._clock())
        self._make_due_soon(self.targets.tenants_of(target).without(asked))
        self._task_ended.set()

    def _make_due_soon(self, tenants: TenantFilter, *, without_poison: bool = False) -> None:
        task = asyncio.create_task(self._make_due(tenants, without_poison=without_poison))
        self._making_due.add(task)
        task.add_done_callback(self._making_due.discard)

    async def _make_due(self, tenants: TenantFilter, *, without_poison: bool) -> None:
        while True:
            try:
                await self._store.make_due(tenants, without_poison=without_poison)
                return
            except StoreUnavailable:
                await asyncio.sleep(_STORE_SECONDS)


def _signal_of(exc: BackendError) -> Signal:
    if isinstance(exc, NotConnected):
        return Signal.NO_CONNECTION
    return Signal.FAILURE if exc.status is None or exc.status in _AWAY_STATUSES else Signal.ANSWER


def _backoff(attempt: int) -> float:
    return delay(attempt, first=_FIRST_BACKOFF, longest=_LONGEST_BACKOFF)
