"""A store in memory, for tests: what a third store takes beside the rules.

It survives close(), as a disk would: the same URL opened again is the same store.
"""

import asyncio
import bisect
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from gateway.domain import person
from gateway.domain.dedup import Copy
from gateway.domain.lock_events import LockEvent, Why
from gateway.domain.model import (
    ALL_TENANTS,
    Backlog,
    DeadLetter,
    DeadLettered,
    Delivered,
    Delivery,
    DeliveryContent,
    Erased,
    Export,
    Health,
    HistoryEntry,
    InboundMessage,
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
    is_lid,
)  # fmt: skip
from gateway.domain.person import HELP_SECONDS, Changed, HeldMessage, Known, Pair, Person
from gateway.errors import NoBackUp
from gateway.store.base import (
    DECRYPTION_SECONDS,
    DROPPED_BY_UNLOCK,
    MAX_UNREADABLE,
    UNREADABLE_SECONDS,
    Limits,
    LocksPage,
    OnLockEvent,
    backlog_refusal,
    whole_history,
)  # fmt: skip
from gateway.store.person_operations import PersonOperations, Rule

T = TypeVar("T")
Queue = tuple[TenantId, UserId]


@dataclass(slots=True)
class _Row:
    """A delivery. due counts while it is the head of its queue."""

    delivery: Delivery
    arrived: float
    message_id: str | None
    due: float

    @property
    def place(self) -> tuple[float, int]:
        return self.delivery.event_time, self.delivery.id


@dataclass(slots=True)
class _Held:
    user: UserId
    content: DeliveryContent


@dataclass(slots=True)
class _Data:
    persons: dict[UserId, Person] = field(default_factory=dict)
    pairs: dict[UserId, Pair] = field(default_factory=dict)
    seen: defaultdict[bytes, list[Copy]] = field(default_factory=lambda: defaultdict(list))
    held: dict[int, _Held] = field(default_factory=dict)
    rows: dict[int, _Row] = field(default_factory=dict)
    queues: defaultdict[Queue, list[_Row]] = field(default_factory=lambda: defaultdict(list))
    dead: dict[int, tuple[DeadLetter, _Row]] = field(default_factory=dict)
    history: list[LockEvent] = field(default_factory=list)
    unreadable: dict[int, tuple[Unreadable, bytes]] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    totals: defaultdict[TenantId, Totals] = field(default_factory=lambda: defaultdict(Totals))
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


_STORES: defaultdict[str, _Data] = defaultdict(_Data)


class MemoryStore(PersonOperations):
    """See base.Store."""

    def __init__(self, url: str, limits: Limits, on_lock_event: OnLockEvent) -> None:
        super().__init__(limits, on_lock_event)
        self._data = _STORES[url]
        self._work = asyncio.Event()
        self._claimable = ALL_TENANTS
        self._served: Counter[TenantId] = Counter()
        self._probed: Counter[TenantId] = Counter()
        self._turn = 0
        self._in_flight: dict[int, Queue] = {}

    # persons

    async def change(
        self, ids: Sequence[UserId], rule: Rule[T], message: InboundMessage | None = None
    ) -> T:
        result, changed = rule(await self.load(ids, message))
        self._apply(changed)
        return result

    async def load(self, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        key = message.dedup_key.digest if message and message.dedup_key else b""
        return Known(self._data.persons, self._data.pairs, tuple(self._data.seen[key]))

    def refusal(self, tenant: TenantId) -> str | None:
        waiting = Counter(one.delivery.tenant for one in self._data.rows.values())
        return backlog_refusal(self.limits, waiting.total(), tenant, waiting[tenant])

    def _apply(self, changed: Changed) -> Counter[str]:
        """Return how much was erased."""
        data, erased = self._data, Counter[str]()
        erased["alias"] = len(data.pairs.keys() - changed.known.pairs.keys())
        erased["person"] = sum(
            one.help is not None and user not in changed.known.persons
            for user, one in data.persons.items()
        )
        data.persons, data.pairs = dict(changed.known.persons), dict(changed.known.pairs)
        for change in changed.changes:
            match change:
                case person.RecordEvent(event):
                    data.history.append(event)
                case person.MarkSeen(key, copy):
                    data.seen[key.digest].append(copy)
                case person.AddDelivery(user, alias, tenant, content):
                    self._add(content, tenant, user, alias)
                case person.Hold(user, sent, content):
                    data.held[id_ := next(data.ids)] = _Held(user, content)
                    known = data.persons[user]
                    held = HeldMessage(id_, content.idempotency_key, sent, content.arrived)
                    data.persons[user] = replace(known, held=(*known.held[:-1], held))
                case person.ReleaseHeld(user, one, alias, tenant):
                    if stored := data.held.pop(one.id, None):
                        self._add(stored.content, tenant, user, alias)
                case person.DropHeld(user):
                    data.held = {n: one for n, one in data.held.items() if one.user != user}
                case person.ForgetHeld(idempotency_key):
                    data.held = {
                        n: one
                        for n, one in data.held.items()
                        if one.content.idempotency_key != idempotency_key
                    }
                case person.RenameUser(old, new, alias):
                    self._rename(old, new, alias)
                case person.RewriteEvent(id_, _, event):
                    data.history[id_ - 1] = event
                case person.ForgetUser(user):
                    erased += self._forget(user)
        self._sweep_unreadable()
        self._work.set()
        self.report(one for one in changed.events if one.why is not Why.TENANT_MOVE)
        return erased

    def _add(
        self, content: DeliveryContent, tenant: TenantId, user: UserId, alias: UserId | None
    ) -> None:
        delivery = Delivery(
            next(self._data.ids), tenant, user, alias, content.idempotency_key, content.headers,
            content.body, attempt=1, poison_attempts=0, tried_at=None, age=0.0,
            event_time=content.event_time,
        )  # fmt: skip
        self._queue(_Row(delivery, content.arrived, content.message_id, content.arrived))
        totals, now = self._data.totals[tenant], self.now()
        first = now if totals.first_seen is None else totals.first_seen
        self._data.totals[tenant] = replace(totals, first_seen=first, last_seen=now)

    def _queue(self, row: _Row) -> None:
        queue = self._data.queues[row.delivery.tenant, row.delivery.user]
        if queue:
            row.due = queue[0].due  # a new head is due no sooner than the one before
        bisect.insort(queue, row, key=lambda one: one.place)
        self._data.rows[row.delivery.id] = row

    def _unqueue(self, row: _Row, due: float) -> None:
        del self._data.rows[row.delivery.id]
        queue = self._data.queues[row.delivery.tenant, row.delivery.user]
        queue.remove(row)
        if queue:
            queue[0].due = due
        else:
            del self._data.queues[row.delivery.tenant, row.delivery.user]

    def _rename(self, old: UserId, new: UserId, alias: UserId | None) -> None:
        data = self._data
        for row in [one for one in data.rows.values() if one.delivery.user == old]:
            due = row.due
            self._unqueue(row, due)
            row.delivery = replace(row.delivery, user=new, alias=alias)
            self._queue(row)
            if row.delivery.id in self._in_flight:
                self._in_flight[row.delivery.id] = (row.delivery.tenant, new)
        for id_, (letter, row) in data.dead.items():
            if letter.user == old:
                row.delivery = replace(row.delivery, user=new, alias=alias)
                data.dead[id_] = replace(letter, user=new), row
        for held in data.held.values():
            held.user = new if held.user == old else held.user

    async def add_unreadable(self, message: InboundMessage, reason: UnreadableReason) -> None:
        key = message.dedup_key.digest if message.dedup_key else b""
        if key and any(key == one for _, one in self._data.unreadable.values()):
            return
        id_ = next(self._data.ids)
        self._data.unreadable[id_] = (
            Unreadable(id_, message.arrived, message.session, message.event, reason,
                       message.phone or message.lid, message.message_id, message.body),
            key,
        )  # fmt: skip
        while len(self._data.unreadable) > MAX_UNREADABLE:
            del self._data.unreadable[min(self._data.unreadable)]

    def _sweep_unreadable(self) -> None:
        pending, since = UnreadableReason.NOT_DECRYPTED, self.now() - UNREADABLE_SECONDS
        self._data.unreadable = {
            id_: (one, key)
            for id_, (one, key) in self._data.unreadable.items()
            if one.arrived > since and not (one.reason is pending and self._data.seen[key])
        }

    async def unreadable(self, *, limit: int, before: int | None = None) -> list[Unreadable]:
        found = [one for one, _ in reversed(self._data.unreadable.values())]
        return [one for one in found if before is None or one.id < before][:limit]

    # locks

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        user, tenant, changed = person.unlock(await self.load((user,)), user, at=at, now=self.now())
        self._apply(changed)
        rows = [one for one in self._data.rows.values() if one.delivery.user == user]
        waiting = [one for one in rows if drop_waiting and one.delivery.id not in self._in_flight]
        for row in waiting:
            outcome = DeadLettered(DROPPED_BY_UNLOCK, self.now())
            self._give_up_on(row, outcome, attempts=0)
        return user, tenant, len(waiting)

    async def move(
        self,
        old: TenantId,
        new: TenantId,
        *,
        with_waiting: bool = True,
        at: float | None = None,
    ) -> tuple[int, int]:
        data, now = self._data, self.now()
        users = [user for user, one in data.persons.items() if one.lock.tenant == old]
        for user in users:
            self._apply(person.move(await self.load((user,)), user, new, at=at, now=now))
        fresh = [
            row
            for row in data.rows.values()
            if row.delivery.tenant == old
            and row.delivery.attempt == 1
            and row.delivery.tried_at is None
            and row.delivery.id not in self._in_flight
        ]
        for row in fresh if with_waiting else ():
            self._unqueue(row, row.due)
            row.delivery = replace(row.delivery, tenant=new)
            self._queue(row)
        return len(users), len(fresh) if with_waiting else 0

    def _locks(self) -> dict[UserId, TenantId]:
        return {u: one.lock.tenant for u, one in self._data.persons.items() if one.lock.tenant}

    def totals(self) -> tuple[int, int]:
        return len(self._locks()), len(set(self._locks().values()))

    async def locks(self, limit: int, after: UserId | None) -> LocksPage:
        some = sorted((u, t) for u, t in self._locks().items() if after is None or u > after)
        page = some[:limit]
        return LocksPage(dict(page), page[-1][0] if len(some) > limit else None)

    async def users_of(
        self, tenant: TenantId, limit: int, after: UserId | None
    ) -> tuple[list[UserId], UserId | None]:
        some = sorted(
            u for u, t in self._locks().items() if t == tenant and (not after or u > after)
        )
        return some[:limit], some[limit - 1] if len(some) > limit else None

    # delivering

    def set_claimable(self, tenants: TenantFilter, changed: Collection[TenantId] | None) -> None:
        self._claimable = tenants
        self._work.set()

    async def claim(
        self, limit: int, *, wait: float, probe: TenantFilter | None = None
    ) -> list[Delivery]:
        until = time.monotonic() + wait
        while not (found := self._pick(1 if probe else limit, probe)):
            if (left := until - time.monotonic()) <= 0:
                break
            self._work.clear()
            with_timeout = asyncio.wait_for(self._work.wait(), min(left, 0.05))
            await asyncio.gather(with_timeout, return_exceptions=True)
        return found

    def _pick(self, limit: int, probe: TenantFilter | None) -> list[Delivery]:
        now, picked = self.now(), list[Delivery]()
        in_flight = Counter(tenant for tenant, _ in self._in_flight.values())
        busy = set(self._in_flight.values())
        who = self._claimable if probe is None else probe
        ready = defaultdict[TenantId, list[_Row]](list)
        for (tenant, user), queue in self._data.queues.items():
            if tenant in who and queue[0].due <= now and (tenant, user) not in busy:
                ready[tenant].append(queue[0])
        for rows in ready.values():
            rows.sort(key=lambda one: (-one.due, -one.delivery.id))
        cap, half = self.limits.max_in_flight_per_tenant, self.limits.max_in_flight / 2
        while ready and len(picked) < limit:
            if probe is None:
                tenant = min(ready, key=lambda t: (in_flight[t], self._served[t], ready[t][-1].due))
                if in_flight[tenant] >= cap and in_flight.total() >= half:
                    break
            else:
                tenant = min(ready, key=lambda t: self._probed[t])
                self._probed[tenant] = self._turn + 1
            row = ready[tenant].pop()
            if not ready[tenant]:
                del ready[tenant]
            self._turn += 1
            self._served[tenant] = self._turn
            in_flight[tenant] += 1
            self._in_flight[row.delivery.id] = (tenant, row.delivery.user)
            picked.append(row.delivery)
        return picked

    def may_send(self, delivery: Delivery) -> bool:
        return True

    async def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        self._work.set()
        self._in_flight.pop(delivery.id, None)
        row = self._data.rows.get(delivery.id)
        if row is None:
            return
        queue = self._data.queues[row.delivery.tenant, row.delivery.user]
        match outcome:
            case Delivered():
                self._unqueue(row, self.now())
                totals = self._data.totals[row.delivery.tenant]
                self._data.totals[row.delivery.tenant] = replace(
                    totals, delivered=totals.delivered + 1
                )
            case DeadLettered():
                self._give_up_on(row, outcome, attempts=1)
            case Requeue(sent_at):
                row.delivery = replace(row.delivery, tried_at=sent_at or row.delivery.tried_at)
            case Retry(wait, _, poison, tried_at, age):
                row.delivery = replace(
                    row.delivery,
                    attempt=row.delivery.attempt + 1,
                    poison_attempts=row.delivery.poison_attempts + poison,
                    tried_at=tried_at,
                    age=age,
                )
                queue[0].due = tried_at + wait

    def _give_up_on(self, row: _Row, outcome: DeadLettered, *, attempts: int) -> None:
        one = row.delivery
        letter = DeadLetter(
            one.id, one.tenant, one.user, row.message_id, one.idempotency_key, row.arrived,
            outcome.died_at, one.attempt - 1 + attempts, outcome.reason, outcome.status,
            outcome.answer, one.body,
        )  # fmt: skip
        self._data.dead[one.id] = letter, row
        self._unqueue(row, self.now())

    async def make_due(
        self, tenants: TenantFilter = ALL_TENANTS, *, without_poison: bool = False
    ) -> None:
        for (tenant, _), queue in self._data.queues.items():
            if tenant in tenants and not (without_poison and queue[0].delivery.poison_attempts):
                queue[0].due = min(queue[0].due, self.now())
        self._work.set()

    async def waits(self, tenants: TenantFilter) -> bool:
        return any(tenant in tenants for tenant, _ in self._data.queues)

    # what a person or an operator asks for

    def _ids(self, user: UserId) -> tuple[UserId, ...]:
        return tuple(one for one in Known(self._data.persons, self._data.pairs).ids_of(user) if one)

    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]:
        ids = self._ids(user)
        found = [
            HistoryEntry(n, e.at, e.user, e.kind.value, e.from_tenant, e.to_tenant, e.message_id,
                         e.why.value if e.why else None, e.who, e.other,)
            for n, e in enumerate(self._data.history, 1)
            if e.user in ids and (before is None or n < before)
        ]  # fmt: skip
        return found[::-1][:limit]

    def _stored(self, ids: tuple[UserId, ...]) -> list[StoredMessage]:
        data = self._data
        rows = [("waiting", one) for one in data.rows.values() if one.delivery.user in ids]
        rows += [("dead_letter", one) for letter, one in data.dead.values() if letter.user in ids]
        return [
            *(StoredMessage(where, one.delivery.tenant, one.arrived, one.message_id,
                            one.delivery.body) for where, one in rows),
            *(StoredMessage("held", None, one.content.arrived, one.content.message_id,
                            one.content.body) for one in data.held.values() if one.user in ids),
            *(StoredMessage("unreadable", None, one.arrived, one.message_id, one.body)
              for one, _ in data.unreadable.values() if one.user in ids),
        ]  # fmt: skip

    async def export(self, user: UserId) -> Export:
        ids = self._ids(user)
        known = self._data.persons.get(ids[0], Person())
        entries = await whole_history(self, user)
        return Export(
            ids, known.lock.tenant, tuple(self._stored(ids)), tuple(entries), known.help_times
        )

    async def summary(self, user: UserId, *, limit: int) -> PersonSummary:
        stored = self._stored(self._ids(user))
        counts = Counter(one.where for one in stored)
        numbers = (counts["waiting"], counts["held"], counts["dead_letter"])
        return PersonSummary(self._ids(user), tuple(stored[:limit]), *numbers)

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        known, ids = await self.load((user,)), self._ids(user)
        users = {*ids, *(one.user for one in self._data.history if one.other in ids)}
        history = enumerate(self._data.history, 1)
        entries = {n: one for n, one in history if one.user in users}
        ids, changed = person.erase(known, user, entries, nobody=self.new_nobody(), now=self.now())
        return ids, self.erased(known, ids, changed, self._apply(changed))

    def _forget(self, user: UserId) -> Counter[str]:
        data, before = self._data, Counter(one.where for one in self._stored((user,)))
        for row in [one for one in data.rows.values() if one.delivery.user == user]:
            self._unqueue(row, self.now())
        data.dead = {n: one for n, one in data.dead.items() if one[0].user != user}
        data.held = {n: one for n, one in data.held.items() if one.user != user}
        data.unreadable = {n: one for n, one in data.unreadable.items() if one[0].user != user}
        before["delivery"] = before["waiting"]
        return before

    # dead letters

    def _selected(self, which: Selection) -> list[DeadLetter]:
        user = self._ids(which.user)[0] if which.user else None
        return [
            one
            for one, _ in self._data.dead.values()
            if which.id in (None, one.id)
            and which.tenant in (None, one.tenant)
            and user in (None, one.user)
        ]

    async def dead_letters(
        self, which: Selection, *, limit: int, before: int | None = None
    ) -> list[DeadLetter]:
        found = sorted(self._selected(which), key=lambda one: -one.id)
        some = [one for one in found if before is None or one.id < before]
        return [replace(one, body=None) for one in some[:limit]]

    async def dead_letter(self, id_: int) -> DeadLetter | None:
        return self._data.dead[id_][0] if id_ in self._data.dead else None

    async def replay(self, which: Selection) -> int:
        found, now = self._selected(which), self.now()
        for letter in found:
            _, row = self._data.dead.pop(letter.id)
            row.delivery = replace(
                row.delivery, id=next(self._data.ids), attempt=letter.attempts + 1,
                poison_attempts=0, tried_at=None, age=0.0, event_time=now,
            )  # fmt: skip
            row.due = now
            self._queue(row)
        self._work.set()
        return len(found)

    async def delete_dead_letters(self, which: Selection) -> int:
        found = self._selected(which)
        for letter in found:
            del self._data.dead[letter.id]
        return len(found)

    # the rest

    async def help_waits(self) -> list[tuple[UserId, float]]:
        waits = [(u, p.help.queued_at) for u, p in self._data.persons.items()
                 if p.help and p.help.sent_at is None]  # fmt: skip
        since = self.now() - HELP_SECONDS
        return sorted((one for one in waits if one[1] > since), key=lambda one: one[1])

    async def held_lids(self) -> list[UserId]:
        users = [one.user for _, one in sorted(self._data.held.items(), reverse=True)]
        return [one for one in dict.fromkeys(users) if is_lid(one)]

    async def tenant_totals(self) -> dict[TenantId, Totals]:
        data = self._data
        users = Counter(self._locks().values())
        waiting = Counter(one.delivery.tenant for one in data.rows.values())
        dead = Counter(one.tenant for one, _ in data.dead.values())
        return {
            one: replace(data.totals[one], users=users[one], waiting=waiting[one], dead=dead[one])
            for one in {*users, *waiting, *dead, *data.totals}
        }

    async def backlog(self) -> Backlog:
        data = self._data
        waiting = Counter(one.delivery.tenant for one in data.rows.values())
        oldest = min((one.arrived for one in data.rows.values()), default=None)
        late = self.now() - DECRYPTION_SECONDS
        pending = UnreadableReason.NOT_DECRYPTED
        unreadable = [
            one
            for one, _ in data.unreadable.values()
            if one.arrived <= late or one.reason is not pending
        ]
        return Backlog(waiting.total(), oldest, dict(waiting.most_common()), len(data.held),
                       len(unreadable), len(data.dead))  # fmt: skip

    async def note_heard(self, times: Mapping[str, float]) -> None:
        for session, at in times.items():
            self._data.heard[session] = max(at, self._data.heard.get(session, 0.0))

    async def heard(self) -> dict[str, float]:
        return dict(self._data.heard)

    def now(self) -> float:
        return time.time()

    def health(self) -> Health:
        full = backlog_refusal(self.limits, len(self._data.rows), TenantId(0), 0)
        return Health(refusing=full, mappings_behind=None, has_file=False)

    async def back_up(self) -> Path:
        raise NoBackUp("memory is not backed up")

    async def close(self) -> None:
        """Nothing to finish."""
