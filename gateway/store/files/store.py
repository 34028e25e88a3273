"""The store without a server: locks in router_mappings.json, all else in router.db.

A lock change is committed in router.db first, as a row of lock_redo; the JSON is rewritten right
behind, and the row goes only when the new file is durable. At start the rows are applied to what
the JSON says. So one commit decides, and the JSON, which people read with `cat`, follows.
"""

import asyncio
import contextlib
import heapq
import json
import logging
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from gateway.domain import person
from gateway.domain.model import (
    ALL_TENANTS,
    Accepted,
    Backlog,
    DeadLetter,
    DeadLettered,
    Decide,
    Delivered,
    Delivery,
    DryRun,
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
)
from gateway.domain.person import Changed, Known
from gateway.errors import NoBackUp, StoreUnavailable
from gateway.store import person_record
from gateway.store.base import (
    DROPPED_BY_UNLOCK,
    Limits,
    LocksPage,
    OnLockEvent,
    backlog_refusal,
    in_batches,
    whole_history,
)
from gateway.store.files import (
    backup,
    dead_letters,
    deliveries,
    held,
    mappings,
    records,
    unreadable,
)
from gateway.store.files import dedup as dedup_keys
from gateway.store.files import history as history_rows
from gateway.store.files.changes import Effects, apply
from gateway.store.files.counters import Count, Counts
from gateway.store.files.dedup import DedupKeys
from gateway.store.files.identity import Identity
from gateway.store.files.journal import SUSPECT_NAME, Committed, Journal, connect
from gateway.store.files.opening import (
    DATABASE_NAME,
    STEP_SECONDS,
    FolderLock,
    heal_clock_step,
    open_folder,
)
from gateway.store.files.persons import Persons
from gateway.store.files.scheduler import FairScheduler, Head
from gateway.store.person_operations import PersonOperations, Rule
from gateway.store.retry_after import RetryAfter

MAPPINGS_WAIT_SECONDS = 0.05  # who reads the file right after the answer finds the lock in it
_MAINTENANCE_SECONDS = 5.0
_CHECK_SECONDS = 0.5  # between looks whether the files are still there: stat() of five
_SWEEP_SECONDS = 0.2  # between deletions while there is more: 10,000 dedup keys a second
_LATER_SECONDS = 1.0  # at least so often claim() looks at the clock, which may jump

log = logging.getLogger(__name__)

Tx = sqlite3.Connection
Clock = Callable[[], float]
T = TypeVar("T")


@dataclass(slots=True)
class _Staged:
    """What a transaction has changed so far, for the later messages in it."""

    batch: int
    locks: dict[UserId, TenantId | None] = field(default_factory=dict)
    added: Counter[TenantId] = field(default_factory=Counter)  # deliveries
    added_in_all: int = 0


class FileStore(PersonOperations):
    """See base.Store. One process; a second one on the same folder refuses to start."""

    @classmethod
    async def open(
        cls,
        folder: Path,
        limits: Limits,
        on_corruption: Callable[[str], None] = lambda _: None,
        committed: Committed = lambda _seconds, _operations: None,
        on_lock_event: OnLockEvent = lambda _: None,
        *,
        clock: Clock = time.time,
        write_file: Callable[[Path, bytes], None] = mappings.replace_file,
        connect_to: Callable[[Path], Tx] = connect,
    ) -> "FileStore":
        """Raise StartRefused, with file and cure, if the folder's state cannot be trusted.

        on_corruption is called with the reason if that turns out later, committed after each
        commit: see Journal. on_lock_event: see PersonOperations.
        """
        opened = open_folder(folder, clock(), connect_to)
        return cls(
            *opened, folder, limits, on_corruption, committed, on_lock_event, clock, write_file
        )

    def __init__(
        self,
        lock: FolderLock,
        connection: Tx,
        locks: dict[UserId, TenantId],
        folder: Path,
        limits: Limits,
        on_corruption: Callable[[str], None],
        committed: Committed,
        on_lock_event: OnLockEvent,
        clock: Clock,
        write_file: Callable[[Path, bytes], None],
    ) -> None:
        super().__init__(limits, on_lock_event)
        self._lock_of_folder = lock
        self._folder = folder
        self._clock = clock
        self._scheduler = FairScheduler(limits.max_in_flight, limits.max_in_flight_per_tenant)
        for tenant, count in deliveries.counts(connection):
            self._scheduler.add(tenant, count)
        self._scheduler.forget_all()
        self._on_corruption = on_corruption
        self._identity = Identity(folder, folder / DATABASE_NAME)
        self._journal = Journal(connection, self._suspect_corruption, committed, self._identity)
        self._mappings = mappings.Mappings(
            folder / mappings.FILE_NAME, locks, written=self._in_file, write_file=write_file
        )
        self._staged = _Staged(0)
        self._dedup = DedupKeys(connection)
        self._persons = Persons()
        self._counts = Counts(connection)
        self._work = asyncio.Event()  # something may be due that was not
        self._fetching = asyncio.Lock()
        self._low_disk: str | None = None
        self._backing_up = False
        self._retry_after = RetryAfter()
        self._chores: set[asyncio.Task[None]] = set()
        self._check_disk()
        self._maintenance = asyncio.create_task(self._maintain())
        self._file_check = asyncio.create_task(self._check_files())

    def _suspect_corruption(self, reason: str) -> None:
        if self._identity.folder_is_ours():
            with contextlib.suppress(OSError):
                (self._folder / SUSPECT_NAME).touch()
        self._on_corruption(reason)

    # accepting

    async def accept(self, message: InboundMessage, decide: Decide) -> Accepted:
        if self._low_disk:
            raise self.unavailable(self._low_disk)
        accepted = await super().accept(message, decide)
        self._retry_after.over()
        return accepted

    async def dry_run(self, message: InboundMessage, decide: Decide) -> DryRun:
        found = await super().dry_run(message, decide)
        return replace(found, refused=found.refused or self._low_disk)

    def unavailable(self, reason: str) -> StoreUnavailable:
        return self._retry_after.unavailable(reason)

    async def change(
        self, ids: Sequence[UserId], rule: Rule[T], message: InboundMessage | None = None
    ) -> T:
        def work(tx: Tx) -> tuple[Effects, T]:
            known = self._load(tx, ids, message)
            result, changed = rule(known)
            return self._apply(tx, changed, known), result

        effects, result = await self._journal.run(work, lambda done: self._publish(done[0]))
        await self._in_mappings_file(effects)
        return result

    async def load(self, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        return await self._journal.run(lambda tx: self._load(tx, ids, message))

    def _load(self, tx: Tx, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        self._staged_here()
        known = self._persons.load(tx, ids, self._tenant)
        if message is None or message.dedup_key is None:
            return known
        seen = self._dedup.find(tx, message.dedup_key, message.arrived)
        return replace(known, seen=tuple(seen)) if seen else known

    def _apply(self, tx: Tx, changed: Changed, before: Known | None = None) -> Effects:
        effects = Effects(known=changed.known, events=changed.events)
        staged = self._staged_here()
        apply(tx, changed.changes, effects, self._dedup, self._clock())
        if changed.known is not before:
            self._persons.stage(changed.known)
        staged.locks |= {user: tenant for user, tenant, _ in effects.locks}
        for tenant, count in effects.counts:
            staged.added[tenant] += count
            staged.added_in_all += count
        return effects

    async def _in_mappings_file(self, effects: Effects) -> None:
        """Wait a moment until the lock changes are in that file."""
        if effects.locks:
            await self._mappings.in_file(effects.locks[-1][2], MAPPINGS_WAIT_SECONDS)

    async def add_unreadable(self, message: InboundMessage, reason: UnreadableReason) -> None:
        if self._low_disk:
            raise self._retry_after.unavailable(self._low_disk)
        await self._journal.run(lambda tx: unreadable.add(tx, message, reason))

    async def unreadable(self, *, limit: int, before: int | None = None) -> list[Unreadable]:
        return await self._journal.run(lambda tx: unreadable.some(tx, limit=limit, before=before))

    def _ids_of(self, tx: Tx, user: UserId) -> tuple[UserId, UserId | None]:
        self._staged_here()
        return self._persons.ids_of(tx, user)

    def _all_ids_of(self, tx: Tx, user: UserId) -> tuple[UserId, ...]:
        """Return the id that the person is stored under, and the other one if it is known."""
        return tuple(one for one in self._ids_of(tx, user) if one)

    def _by_known_id(self, tx: Tx, which: Selection) -> Selection:
        return replace(which, user=self._ids_of(tx, which.user)[0]) if which.user else which

    # locks

    def _tenant(self, user: UserId) -> TenantId | None:
        """The lock as this transaction has it: not yet in memory what it changed itself."""
        staged = self._staged_here()
        return staged.locks[user] if user in staged.locks else self._mappings.get(user)

    def _staged_here(self) -> "_Staged":
        """What this transaction has changed so far; a new one starts with nothing."""
        if self._staged.batch != self._journal.batch:
            self._staged = _Staged(self._journal.batch)
            self._persons.begin()
        return self._staged

    def _in_file(self, number: int) -> None:
        """The mappings file holds every change up to number: its redo rows are not needed."""

        def forget(tx: Tx) -> None:
            tx.execute("DELETE FROM lock_redo WHERE id <= ?", (number,))

        async def chore() -> None:
            # If that fails they are applied once more at the next start, which changes nothing.
            with contextlib.suppress(StoreUnavailable):
                await self._journal.run(forget)

        task = asyncio.create_task(chore())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        def work(tx: Tx) -> tuple[Effects, UserId, TenantId | None, int]:
            now = self._clock()
            unlocked, tenant, changed = person.unlock(self._load(tx, (user,)), user, at=at, now=now)
            effects = self._apply(tx, changed)
            dropped = self._drop_waiting(tx, unlocked, effects) if drop_waiting else 0
            return effects, unlocked, tenant, dropped

        effects, unlocked, tenant, dropped = await self._journal.run(
            work, lambda result: self._publish(result[0])
        )
        await self._in_mappings_file(effects)
        return unlocked, tenant, dropped

    async def move(
        self,
        old: TenantId,
        new: TenantId,
        *,
        with_waiting: bool = True,
        at: float | None = None,
    ) -> tuple[int, int]:
        now = self._clock()
        decided_at = now if at is None else at

        def prepare() -> Callable[[Tx], tuple[list[UserId], int, int]]:
            # Nothing of theirs is claimed before the commit: their heads must be read again first.
            self._scheduler.forget([old, new])
            in_flight = self._scheduler.in_flight()

            def work(tx: Tx) -> tuple[list[UserId], int, int]:
                users = self._mappings.users_of(old)
                as_json = json.dumps(users)
                number = 0
                if users:
                    history_rows.move_all(tx, as_json, now, old, new, decided_at)
                    tx.execute(
                        "INSERT INTO lock_redo (user, tenant) SELECT value, ? FROM json_each(?)",
                        (new, as_json),
                    )
                    number = tx.execute("SELECT max(id) FROM lock_redo").fetchone()[0]
                moved = deliveries.move(tx, old, new, in_flight, now) if with_waiting else 0
                return users, moved, number

            return work

        def publish(result: tuple[list[UserId], int, int]) -> None:
            users, moved, number = result
            if users:
                self._mappings.move(users, old, new, number)
                self._persons.forget(users)
            self._scheduler.add(old, -moved)
            self._scheduler.add(new, moved)
            self._work.set()

        users, moved, number = await self._journal.run_long(prepare, publish)
        if users:
            await self._mappings.in_file(number, MAPPINGS_WAIT_SECONDS)
        return len(users), moved

    async def users_of(
        self, tenant: TenantId, limit: int, after: UserId | None
    ) -> tuple[list[UserId], UserId | None]:
        def look() -> list[UserId]:
            users = self._mappings.users_of(tenant)
            return heapq.nsmallest(limit + 1, (u for u in users if after is None or u > after))

        first = await asyncio.to_thread(look)
        page = first[:limit]
        return page, page[-1] if len(first) > limit else None

    async def tenant_totals(self) -> dict[TenantId, Totals]:
        query = "SELECT tenant, count(*) FROM dead_letter GROUP BY tenant"
        dead = dict(await self._journal.run(lambda tx: tx.execute(query).fetchall()))
        users, counts = self._mappings.of_tenants(), dict(self._counts.all)
        waiting = self._scheduler.waiting_by_tenant()

        def joined() -> dict[TenantId, Totals]:
            nothing = Count()
            return {
                tenant: Totals(
                    users.get(tenant, 0),
                    (count := counts.get(tenant, nothing)).delivered,
                    waiting.get(tenant, 0),
                    dead.get(tenant, 0),
                    count.first_seen,
                    count.last_seen,
                )
                for tenant in {*users, *counts, *waiting, *dead}
            }

        return await asyncio.to_thread(joined)  # anybody who posts links can make them many

    # a person's own

    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]:
        return await self._journal.run(
            lambda tx: history_rows.of_person(
                tx, self._all_ids_of(tx, user), limit=limit, before=before
            )
        )

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        effects, ids, erased = await self._journal.run(
            lambda tx: self._erase(tx, user), lambda result: self._publish(result[0])
        )
        await self._in_mappings_file(effects)
        return ids, erased

    def _erase(self, tx: Tx, user: UserId) -> tuple[Effects, tuple[UserId, ...], Erased]:
        known = self._load(tx, (user,))
        entries = history_rows.touching(tx, self._all_ids_of(tx, user))
        ids, changed = person.erase(
            known, user, entries, nobody=self.new_nobody(), now=self._clock()
        )
        effects = self._apply(tx, changed, changed.known)
        effects.forgets_everybody = True  # former ids of the person, too
        # Nothing of it is claimed before the commit.
        self._scheduler.forget(effects.stale)
        self._persons.forget_staged()
        return effects, ids, self.erased(known, ids, changed, effects.erased)

    async def export(self, user: UserId) -> Export:
        def work(tx: Tx) -> Export:
            ids = self._all_ids_of(tx, user)
            messages = [stored for id_ in ids for stored in _messages_of(tx, id_)]
            locked = next((its for id_ in ids if (its := self._tenant(id_))), None)
            known = self._load(tx, ids[:1]).person(ids[0])
            return Export(ids, locked, tuple(messages), (), known.help_times)

        export = await self._journal.run(work)
        return replace(export, history=tuple(await whole_history(self, user)))

    async def summary(self, user: UserId, *, limit: int) -> PersonSummary:
        def work(tx: Tx) -> PersonSummary:
            ids = self._all_ids_of(tx, user)
            some = [stored for id_ in ids for stored in _messages_of(tx, id_, limit)][:limit]
            counts = [
                sum(
                    tx.execute(f"SELECT count(*) FROM {table} WHERE user = ?", (id_,)).fetchone()[0]
                    for id_ in ids
                )
                for table in ("delivery", "held", "dead_letter")
            ]
            return PersonSummary(ids, tuple(some), *counts)

        return await self._journal.run(work)

    def totals(self) -> tuple[int, int]:
        return len(self._mappings), self._mappings.tenants

    async def locks(self, limit: int, after: UserId | None) -> LocksPage:
        users = self._mappings.users()
        # In a thread: among a million users it takes a while.
        first = await asyncio.to_thread(
            heapq.nsmallest, limit + 1, (u for u in users if after is None or u > after)
        )
        page = first[:limit]
        found = {user: tenant for user in page if (tenant := self._mappings.get(user))}
        return LocksPage(found, page[-1] if len(first) > limit else None)

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
            now = self._clock()
            if self._scheduler.stale(now):
                async with self._fetching:  # what another one has fetched meanwhile is not stale
                    if stale := self._scheduler.stale(now):
                        await self._fetch(stale, now)
            heads = self._scheduler.probe(probe) if probe else self._scheduler.pick(limit)
            if heads:
                return await self._read(heads)
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            until_due = max(0.0, self._scheduler.next_due() - self._clock())
            try:
                async with asyncio.timeout(min(left, until_due, _LATER_SECONDS)):
                    await self._work.wait()
            except TimeoutError:
                pass

    def set_claimable(self, tenants: TenantFilter, changed: Collection[TenantId] | None) -> None:
        self._scheduler.set_claimable(tenants, changed)
        self._work.set()

    async def waits(self, tenants: TenantFilter) -> bool:
        return self._scheduler.waits(tenants)

    async def _fetch(self, tenants: list[TenantId], now: float) -> None:
        """Fill the windows of tenants from the database."""

        def look(tx: Tx) -> list[tuple[TenantId, list[Head], bool, float]]:
            found = []
            for tenant in tenants:
                window = self._scheduler.window_of(tenant)
                heads, next_due = deliveries.due_heads(tx, tenant, now, window)
                found.append((tenant, heads, len(heads) == window, next_due))
            return found

        def fill(found: list[tuple[TenantId, list[Head], bool, float]]) -> None:
            for tenant, heads, more, next_due in found:
                self._scheduler.fetched(tenant, heads, more=more, next_due=next_due, now=now)

        # Not before the commit: rows of the same transaction are not durable yet.
        await self._journal.run(look, fill)

    async def _read(self, heads: list[Head]) -> list[Delivery]:
        """The deliveries of picked heads; those that are not in memory are read."""
        wanted = [head for head in heads if head.delivery is None]
        if wanted:
            try:
                await self._journal.run(lambda tx: deliveries.load(tx, wanted))
            except BaseException:
                for head in heads:
                    self._scheduler.release(head.id)
                # Others may have become the heads of their queues meanwhile.
                self._scheduler.forget({head.tenant for head in heads})
                raise
        # Meanwhile an operator took it away, or an older message of its queue was accepted.
        overtaken = [head for head in heads if head.delivery is None]
        for head in overtaken:
            self._scheduler.release(head.id)
        self._scheduler.forget({head.tenant for head in overtaken})
        found = [head.delivery for head in heads if head.delivery]
        for head in heads:
            head.delivery = None
        return found

    def now(self) -> float:
        return self._clock()

    def may_send(self, delivery: Delivery) -> bool:
        return True  # a claim ends with the process

    async def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        await self._journal.run(lambda tx: self._settle(tx, delivery, outcome), self._publish)

    def _settle(self, tx: Tx, delivery: Delivery, outcome: Outcome) -> Effects:
        effects = Effects(settled=delivery.id)
        due: float | None = self._clock()
        match outcome:
            case Delivered():
                queue = deliveries.delete(tx, delivery.id)
            case Requeue():
                queue, due = deliveries.put_back(tx, delivery.id, outcome.sent_at), None
            case Retry():
                queue = deliveries.failed(tx, delivery.id, outcome)
                due = outcome.tried_at + outcome.wait
            case DeadLettered():
                dead_letters.add(
                    tx,
                    delivery.id,
                    died_at=outcome.died_at,
                    reason=outcome.reason,
                    attempts=1,
                    status=outcome.status,
                    answer=outcome.answer,
                )
                queue = deliveries.delete(tx, delivery.id)
        if queue is None:  # an operator took it away meanwhile: that wins
            effects.stale += (delivery.tenant,)  # what came since had to wait for its end
            return effects
        if isinstance(outcome, Delivered | DeadLettered):
            effects.counts += ((queue[0], -1),)
        if isinstance(outcome, Delivered):
            effects.delivered = queue[0]
        effects.offer(deliveries.promote(tx, *queue, due))
        return effects

    async def make_due(
        self, tenants: TenantFilter = ALL_TENANTS, *, without_poison: bool = False
    ) -> None:
        now = self._clock()
        some = self._scheduler.waiting_by_tenant() if tenants.others else tenants.named
        for batch in in_batches([one for one in some if one in tenants], deliveries.CHUNK):
            await asyncio.gather(
                *(self._due_now(one, now, without_poison=without_poison) for one in batch)
            )

    async def _due_now(self, tenant: TenantId, now: float, without_poison: bool) -> None:
        # Not for ever: what fails meanwhile is due later again.
        for _ in range(self._scheduler.waiting_of(tenant) // deliveries.CHUNK + 1):
            changed = await self._journal.run(
                lambda tx: deliveries.some_due(tx, tenant, now, without_poison=without_poison),
                lambda changed: self._wake([tenant] if changed else []),
            )
            if changed < deliveries.CHUNK:
                return

    def _wake(self, tenants: Iterable[TenantId]) -> None:
        self._scheduler.forget(tenants)
        self._work.set()

    # dead letters

    async def dead_letters(
        self, which: Selection, *, limit: int, before: int | None = None
    ) -> list[DeadLetter]:
        return await self._journal.run(
            lambda tx: dead_letters.some(
                tx, self._by_known_id(tx, which), limit=limit, before=before
            )
        )

    async def dead_letter(self, id_: int) -> DeadLetter | None:
        return await self._journal.run(lambda tx: dead_letters.one(tx, id_))

    async def replay(self, which: Selection) -> int:
        up_to = await self._journal.run(
            dead_letters.newest
        )  # what dies meanwhile is not replayed again
        total = 0
        while True:
            effects = await self._journal.run(
                lambda tx: self._replay_some(tx, which, up_to), self._publish
            )
            replayed = sum(count for _, count in effects.counts)
            total += replayed
            if replayed < dead_letters.CHUNK:
                return total

    def _replay_some(self, tx: Tx, which: Selection, up_to: int) -> Effects:
        effects, now = Effects(), self._clock()
        which = self._by_known_id(tx, which)
        replayed = dead_letters.take_back(tx, which, up_to=up_to, now=now)
        effects.counts = tuple((tenant, 1) for tenant, _ in replayed)
        for queue in dict.fromkeys(replayed):
            effects.offer(deliveries.find_head(tx, *queue, now))
        return effects

    async def delete_dead_letters(self, which: Selection) -> int:
        up_to = await self._journal.run(dead_letters.newest)
        total = 0
        while True:
            gone = await self._journal.run(
                lambda tx: dead_letters.delete(tx, self._by_known_id(tx, which), up_to=up_to)
            )
            total += gone
            if gone < dead_letters.CHUNK:
                return total

    def _drop_waiting(self, tx: Tx, user: UserId, effects: Effects) -> int:
        """What waits of user and is not in flight becomes dead letters; how many."""
        rows = deliveries.of_user(tx, user)
        tenants = {tenant for _, tenant in rows}
        # Nothing of theirs is claimed before the commit: their heads must be read again first.
        self._scheduler.forget(tenants)
        waiting = [(id_, tenant) for id_, tenant in rows if not self._scheduler.is_in_flight(id_)]
        for id_, tenant in waiting:
            dead_letters.add(tx, id_, died_at=self._clock(), reason=DROPPED_BY_UNLOCK)
            deliveries.delete(tx, id_)
            effects.counts += ((tenant, -1),)
        for tenant in tenants:
            deliveries.find_head(tx, tenant, user, self._clock())  # offered when it is read again
        effects.stale += tuple(tenants)
        return len(waiting)

    # help messages

    async def help_waits(self) -> list[tuple[UserId, float]]:
        return await self._journal.run(lambda tx: records.help_waits(tx, self._clock()))

    async def held_lids(self) -> list[UserId]:
        return await self._journal.run(held.lids)

    # what memory knows

    def _publish(self, effects: Effects) -> None:
        """Memory follows the disk: called right after the commit."""
        if effects.known:
            self._persons.keep(effects.known)
        if effects.forgets_everybody:
            self._persons.forget()
        for user, lock, number in effects.locks:
            self._mappings.change(user, lock, number)
        for tenant, count in effects.counts:
            self._scheduler.add(tenant, count)
        for tenant in effects.accepted:
            self._counts.seen(tenant, self._clock())
        if effects.delivered is not None:
            self._counts.delivered(effects.delivered)
        for old, new in effects.renamed:
            self._scheduler.rename(old, new)
        self._scheduler.forget(effects.stale)
        self.report(effects.events)
        if effects.settled is not None:
            self._scheduler.release(effects.settled)
        now = self._clock()
        for head in effects.heads:
            self._scheduler.offer(head, now)
        self._work.set()

    def refusal(self, tenant: TenantId) -> str | None:
        waiting, of_tenant = self._scheduler.waiting, self._scheduler.waiting_of(tenant)
        if self._journal.in_transaction:  # else the scheduler has counted it
            staged = self._staged_here()
            waiting, of_tenant = waiting + staged.added_in_all, of_tenant + staged.added[tenant]
        return backlog_refusal(self.limits, waiting, tenant, of_tenant)

    async def note_heard(self, times: Mapping[str, float]) -> None:
        def note(tx: Tx) -> None:
            tx.executemany(
                "INSERT INTO heard VALUES (?, ?) ON CONFLICT (session) DO UPDATE SET"
                " at = excluded.at WHERE at < excluded.at",
                list(times.items()),
            )

        await self._journal.run(note)

    async def heard(self) -> dict[str, float]:
        query = "SELECT session, at FROM heard"
        return dict(await self._journal.run(lambda tx: tx.execute(query).fetchall()))

    async def back_up(self) -> Path:
        if self._backing_up:
            raise NoBackUp("another back-up is under way")
        self._backing_up = True
        try:
            least = self.limits.min_free_disk_bytes
            return await asyncio.to_thread(backup.write, self._folder, least_free=least)
        finally:
            self._backing_up = False

    async def backlog(self) -> Backlog:
        def look(tx: Tx) -> tuple[float | None, int, int, int]:
            unread = unreadable.count(tx, self._clock())
            return deliveries.oldest(tx), held.count(tx), unread, dead_letters.count(tx)

        oldest, *counts = await self._journal.run(look)
        by_tenant = self._scheduler.waiting_by_tenant()
        return Backlog(self._scheduler.waiting, oldest, by_tenant, *counts)

    def health(self) -> Health:
        refusing = self._low_disk
        if self._journal.trouble:
            refusing = f"router.db cannot be written: {self._journal.trouble}"
        elif self._scheduler.waiting >= self.limits.max_backlog:
            refusing = f"{self._scheduler.waiting} messages wait, as many as MAX_BACKLOG allows"
        return Health(refusing, self._mappings.trouble, self._mappings.lag)

    async def _maintain(self) -> None:
        last, began, more = self._clock(), time.monotonic(), False
        while True:
            await asyncio.sleep(_SWEEP_SECONDS if more else _MAINTENANCE_SECONDS)
            now, then, more = self._clock(), time.monotonic(), False
            ahead = last + then - began - now
            try:
                self._check_disk()
                more = await self._sweep()
                if ahead > STEP_SECONDS:
                    await self._heal_clock_step(now, ahead)
                last, began = now, then
            except StoreUnavailable:
                pass  # the journal has said so, and tests itself
            except Exception:
                log.exception("the maintenance failed unexpectedly", extra={"event": "store.error"})

    async def _heal_clock_step(self, now: float, ahead: float) -> None:
        """It has gone back by so many seconds."""
        while await self._journal.run(lambda tx: heal_clock_step(tx, now)):
            self._scheduler.forget_all()
            self._work.set()

        def redate(tx: Tx) -> int:
            self._staged_here()
            self._persons.forget_staged()
            return history_rows.redate(tx, now, ahead)

        decided = await self._journal.run(redate, lambda _: self._persons.forget())
        log.warning(
            "The clock has gone back by %.1f s: what was put off is due, and %s lock changes that"
            " lay in the future have their own time again",
            ahead,
            decided,
            extra={"event": "store.clock", "count": decided},
        )

    async def _check_files(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self._journal.check()
            with contextlib.suppress(OSError):  # a disk that fails shows itself elsewhere
                if reason := self._mappings.why_not_ours():
                    self._journal.refuse(reason)

    async def _sweep(self) -> bool:
        """Delete some of what is out of date; whether there is more."""
        now = self._clock()
        keys = await self._journal.run(lambda tx: self._dedup.purge(tx, now))
        until = now - self.limits.hold_seconds
        if gone := await self._journal.run(lambda tx: held.expire(tx, arrived_until=until)):
            log.info(
                "%s held messages got no link and are deleted",
                gone,
                extra={"event": "held.expired", "count": gone},
            )
        await self._write_counts()
        last = now - person_record.lifetime(self.limits)
        await self._journal.run(lambda tx: records.expire(tx, last))
        await self._journal.run(lambda tx: unreadable.expire(tx, now))
        return keys >= dedup_keys.CHUNK or gone >= held.CHUNK

    async def _write_counts(self) -> None:
        await self._journal.run(self._counts.write, lambda _: self._counts.written())

    def _check_disk(self) -> None:
        least = self.limits.min_free_disk_bytes
        try:
            free = shutil.disk_usage(self._folder).free
            low = f"{self._folder}: {free >> 20} MB free on its disk, {least >> 20} MB are needed"
        except OSError as exc:
            free, low = -1, f"{self._folder}: {exc.strerror}"
        if (free < least) != bool(self._low_disk):
            said = low if free < least else f"{self._folder}: enough disk space again"
            log.warning("%s", said, extra={"event": "store.disk"})
        self._low_disk = low if free < least else None

    async def close(self) -> None:
        self._maintenance.cancel()
        self._file_check.cancel()
        with contextlib.suppress(OSError):
            self._identity.restore_folder()
        await self._mappings.close(write=self._identity.folder_is_ours())
        while self._chores:
            await asyncio.wait(self._chores)
        with contextlib.suppress(StoreUnavailable):
            await self._write_counts()
        await self._journal.close()
        self._identity.close()
        self._lock_of_folder.close()


def _messages_of(tx: Tx, user: UserId, limit: int = -1) -> list[StoredMessage]:
    """limit: -1 for all."""
    rows = tx.execute(
        "SELECT 'waiting', tenant, arrived, message_id, body FROM delivery WHERE user = ?1"
        " UNION ALL SELECT 'held', NULL, arrived, message_id, body FROM held WHERE user = ?1"
        " UNION ALL SELECT 'dead_letter', tenant, arrived, message_id, body FROM dead_letter"
        " WHERE user = ?1"
        " UNION ALL SELECT 'unreadable', NULL, arrived, message_id, body FROM unreadable"
        " WHERE user = ?1 LIMIT ?2",
        (user, limit),
    )
    return [StoredMessage(*row) for row in rows]
