"""The worker: claim, forward, settle; again after a backoff, or a dead letter.

It never forgets a claim: whatever happens to an attempt, its outcome is told to the store, as often
as that takes. If the process dies in between, the claim dies with it and the message goes again,
with the same Idempotency-Key.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine

from gateway.delivery.attempts import Attempts
from gateway.delivery.circuit_breaker import Sign
from gateway.delivery.targets import Target, Targets
from gateway.domain.backoff import delay
from gateway.domain.model import (
    Again,
    Among,
    Dead,
    Delivery,
    Done,
    Outcome,
    PutBack,
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
from gateway.waha.lid_lookup import Lids
from gateway.waha.media import Media

_FIRST_BACKOFF, _LONGEST_BACKOFF = 1.0, 300.0
_OWN_FAULTS = 12  # then it is the message, not the backend
_CLAIM_SECONDS = 5.0  # claim() returns at least so often
# What begins at once ends at once, and keeps webhooks waiting: 256 attempts take 150 ms of a core.
_HANDFUL, _HANDFUL_SECONDS = 32, 0.002  # begun together, and then so long nothing
_PROBE_SPACING = 0.01  # seconds: thousands of backends that are away cost a third of a core
_STORE_SECONDS = 1.0  # between tries while the store fails
_AWAY_STATUSES = frozenset({404, *range(500, 600)})  # a deployment gone wrong answers 404 to all

_NAMES = {Done: "delivered", Again: "again", Dead: "dead", PutBack: "put_back"}

log = logging.getLogger(__name__)


class Courier:
    """Delivers what the store holds, until stopped."""

    def __init__(
        self,
        store: Store,
        targets: Targets,
        lids: Lids,
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
        targets.changed = self._gate_changed
        targets.serve = store.serve
        store.serve(targets.serving, None)
        self._store = store
        self._lids = lids
        self._media = media
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._max_age = max_age
        self._clock = clock
        self._monotonic = monotonic
        self._flying: set[asyncio.Task[None]] = set()
        self._landed = asyncio.Event()
        self._stopped_at: float | None = None
        self._claiming: asyncio.Task[None] | None = None
        self._started = monotonic()
        self._probing: dict[Target, asyncio.Task[None]] = {}
        self._next_probe = 0.0  # of tenants' own backends
        self._openings: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        return len(self._flying)

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
        if self._flying:
            left_of_grace = self._stopped_at + grace - self._monotonic()
            await asyncio.wait(self._flying, timeout=max(0.0, left_of_grace))
        left = self._flying | self._openings
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        await self.targets.close()

    async def _claim_and_send(self) -> None:
        while self._stopped_at is None:
            await self._unless_it_stumbles(self._send_due())

    async def _unless_it_stumbles(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except StoreUnavailable:
            await asyncio.sleep(_STORE_SECONDS)
        except Exception:
            log.exception("the worker failed unexpectedly", extra={"event": "delivery.error"})
            await asyncio.sleep(_STORE_SECONDS)

    async def _send_due(self) -> None:
        free = self._max_in_flight - len(self._flying)
        if free <= 0:
            await self._wait_for_landing(_CLAIM_SECONDS)
            return
        some = min(free, _HANDFUL)
        self.targets.make_room()
        for delivery in await self._store.claim(some, wait=_CLAIM_SECONDS):
            if (target := self.targets.admit(delivery.tenant)) is None:
                await self._settle(delivery, PutBack())
            elif self._waits_for_phone(delivery):
                self._fly(self._wait_for_phone(delivery))
            else:
                self._send(delivery, target)
        await asyncio.sleep(_HANDFUL_SECONDS)

    async def _probe_until_open(self, target: Target) -> None:
        """One at a time. Ends with the gate's opening, or when no tenant has the URL any more."""
        while self.targets.is_closed(target):
            await self._unless_it_stumbles(self._send_probe(target))
        if self._probing.get(target) is asyncio.current_task():  # else the gate's change saw to it
            del self._probing[target]

    async def _send_probe(self, target: Target) -> None:
        await asyncio.sleep(target.gate.probe_in(self._monotonic()))
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
                target.gate.open(self._monotonic())  # the next message will tell
        for delivery in claimed:
            if self._waits_for_phone(delivery):
                probe = self._fly(self._wait_for_phone(delivery))
            else:
                target.gate.probing(self._monotonic())
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
        self.targets.begins(target)
        task = self._fly(self._deliver(delivery, target))
        task.add_done_callback(lambda _: self.targets.ends(target))
        return task

    def _waits_for_phone(self, delivery: Delivery) -> bool:
        # What was counted as an attempt went out under the LID already.
        return (
            is_lid(delivery.user)
            and delivery.attempt == 1
            and self._lids.ask_and_expect(delivery.user)
        )

    async def _wait_for_phone(self, delivery: Delivery) -> None:
        """And put it back: claimed again it has its user's phone, if WAHA knew it."""
        await self._lids.wait_for(delivery.user)
        await self._settle(delivery, PutBack())

    def _fly(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._flying.add(task)
        task.add_done_callback(self._land)
        return task

    async def _wait_for_landing(self, seconds: float) -> None:
        self._landed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._landed.wait()

    def _land(self, task: asyncio.Task[None]) -> None:
        self._flying.discard(task)
        self._landed.set()

    async def _deliver(self, delivery: Delivery, target: Target) -> None:
        began = self._monotonic()
        outcome = await self._attempt(delivery, target)
        self._metrics.attempted(_NAMES[type(outcome)], self._monotonic() - began)
        if isinstance(outcome, Done):
            self._metrics.delivered_after(self._clock() - delivery.event_time)
        await self._settle(delivery, outcome)

    async def _attempt(self, delivery: Delivery, target: Target) -> Outcome:
        began = self._clock()
        try:
            fresh = await self._media.made_fresh(delivery)
            # Since the claim a lease may have ended, or tenants.json changed.
            to = self.targets.of(delivery.tenant)
            if to is None or not self._store.may_send(delivery):
                return PutBack()
            backend, target = to
            await backend.post(fresh)
        except BackendError as exc:
            return self._failed(delivery, target, exc, began)
        except Exception as exc:  # unforeseen: the queue must go on all the same
            log.exception("an attempt failed unexpectedly", extra={"event": "delivery.error"})
            unforeseen = BackendUnavailable(f"unforeseen: {exc!r}")
            return self._failed(delivery, target, unforeseen, began)
        target.gate.tell(Sign.SUCCESS, delivery.user, delivery.tenant, self._monotonic())
        if self.attempts.succeeded(delivery.tenant, self._clock()):
            only = Among(frozenset({delivery.tenant}), others=False)
            self._make_due_soon(only, without_own_faults=True)
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
        return Done()

    def _failed(
        self, delivery: Delivery, target: Target, exc: BackendError, began: float
    ) -> Outcome:
        now = self._clock()
        target.gate.tell(_sign(exc), delivery.user, delivery.tenant, self._monotonic())
        if isinstance(exc, BackendRefused):
            return self._bury(delivery, exc, f"refused: {exc}")
        if target.gate.closed:
            if not isinstance(exc, NotConnected):
                return PutBack(sent_at=now)
            return PutBack()  # the backend is away: nobody's fault, and nothing to count

        asked = exc.retry_after if isinstance(exc, BackendUnavailable) else None
        was_there = _sign(exc) is Sign.ANSWER
        self.attempts.failed(delivery.tenant, now, str(exc), retry_after=asked, was_there=was_there)
        since = began if delivery.tried_at is None else delivery.tried_at
        own_fault = self.attempts.any_got_through(delivery.tenant, since)
        if delivery.own_faults + own_fault >= _OWN_FAULTS:
            return self._bury(delivery, exc, f"failed {delivery.attempt} times, last: {exc}")
        age = delivery.age + self._open_seconds(delivery.tenant, target, since, now)
        if age > self._max_age:
            return self._bury(delivery, exc, f"failed for {age:.0f} s, last: {exc}")

        wait = max(_backoff(delivery.attempt), asked or 0.0)  # "Retry-After: 0" is no invitation
        log.warning(
            "Tenant %s backend failed attempt %s of %s (%s), again in %.1f s",
            delivery.tenant,
            delivery.attempt,
            shown(delivery.user),
            exc,
            wait,
            extra={
                "event": "delivery.again",
                "user": shown(delivery.user),
                "tenant": delivery.tenant,
                "attempt": delivery.attempt,
                "request_id": request_id(delivery.headers),
            },
        )
        return Again(wait, str(exc), own_fault=own_fault, tried_at=now, age=age)

    def _bury(self, delivery: Delivery, exc: BackendError, reason: str) -> Dead:
        log.error(
            "☠️ Dead letter %s of Tenant %s, from %s: %s",
            delivery.id,
            delivery.tenant,
            shown(delivery.user),
            reason,
            extra={
                "event": "delivery.dead",
                "user": shown(delivery.user),
                "tenant": delivery.tenant,
                "attempt": delivery.attempt,
                "request_id": request_id(delivery.headers),
            },
        )
        return Dead(reason, self._clock(), exc.status, exc.answer)

    def _open_seconds(self, tenant: TenantId, target: Target, since: float, now: float) -> float:
        """Seconds from `since` to now in which we ran and the gate was open; Unix times."""
        monotonic = self._monotonic()
        start = max(self._started, monotonic - max(0.0, now - since))
        closed = self.targets.seconds_closed(tenant, target, start, monotonic)
        return max(0.0, monotonic - start - closed)

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> None:
        while True:
            try:
                await self._store.settle(delivery, outcome)
                return
            except StoreUnavailable:
                pass
            except Exception:  # this outcome cannot be stored: the line must go on all the same
                log.exception("an outcome was not stored", extra={"event": "delivery.error"})
                outcome = PutBack()
            await asyncio.sleep(_STORE_SECONDS)

    def _gate_changed(self, target: Target) -> None:
        if before := self._probing.pop(target, None):
            before.cancel()
        if target.gate.closed:
            log.error(
                "🚧 The backend is away: %s; messages wait",
                target.url,
                extra={"event": "gate.closed", "url": target.url},
            )
            if self._stopped_at is None:
                self._probing[target] = asyncio.create_task(self._probe_until_open(target))
            return
        log.warning(
            "The backend is back: %s",
            target.url,
            extra={"event": "gate.opened", "url": target.url},
        )
        asked = self.attempts.asked_to_wait(self._clock())
        self._make_due_soon(self.targets.tenants_of(target).without(asked))
        self._landed.set()

    def _make_due_soon(self, among: Among, *, without_own_faults: bool = False) -> None:
        task = asyncio.create_task(self._make_due(among, without_own_faults=without_own_faults))
        self._openings.add(task)
        task.add_done_callback(self._openings.discard)

    async def _make_due(self, among: Among, *, without_own_faults: bool) -> None:
        while True:
            try:
                await self._store.all_due(among, without_own_faults=without_own_faults)
                return
            except StoreUnavailable:
                await asyncio.sleep(_STORE_SECONDS)


def _sign(exc: BackendError) -> Sign:
    if isinstance(exc, NotConnected):
        return Sign.NO_CONNECTION
    return Sign.FAILURE if exc.status is None or exc.status in _AWAY_STATUSES else Sign.ANSWER


def _backoff(attempt: int) -> float:
    return delay(attempt, first=_FIRST_BACKOFF, longest=_LONGEST_BACKOFF)
