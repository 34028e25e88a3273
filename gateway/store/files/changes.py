"""Applying what the rules decided: the changes of domain/person.py as rows of router.db.

Each function is part of a transaction. What memory must follow after the commit is noted beside.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.domain.lock_events import LockEvent
from gateway.domain.model import DeliveryContent, TenantId, UserId
from gateway.domain.person import (
    AddDelivery,
    Change,
    DropHeld,
    ForgetHeld,
    ForgetUser,
    Hold,
    Known,
    MarkSeen,
    PairIds,
    RecordEvent,
    ReleaseHeld,
    RenameUser,
    RewriteEvent,
    SetLock,
    UpdateRecord,
)
from gateway.store.files import deliveries, held, history, records
from gateway.store.files.dedup import DedupKeys
from gateway.store.files.scheduler import Head

Tx = sqlite3.Connection


@dataclass(slots=True)
class Effects:
    """What a transaction did, for memory to follow after its commit.

    locks: user, tenant and number of the lock_redo row. counts: deliveries more (or fewer) of each
    tenant. heads: of user queues that changed. stale: tenants whose heads must be read again.
    """

    known: Known | None = None
    locks: tuple[tuple[UserId, TenantId | None, int], ...] = ()
    counts: tuple[tuple[TenantId, int], ...] = ()
    heads: tuple[Head, ...] = ()
    renamed: tuple[tuple[UserId, UserId], ...] = ()
    stale: tuple[TenantId, ...] = ()
    forgets_everybody: bool = False
    settled: int | None = None
    delivered: TenantId | None = None
    accepted: tuple[TenantId, ...] = ()
    events: tuple[LockEvent, ...] = ()
    erased: Counter[str] = field(default_factory=Counter)  # rows by table

    def offer(self, head: Head | None) -> None:
        if head:
            self.heads += (head,)

    def set_lock(self, tx: Tx, user: UserId, tenant: TenantId | None) -> None:
        query = "INSERT INTO lock_redo (user, tenant) VALUES (?, ?)"
        number = tx.execute(query, (user, tenant)).lastrowid
        assert number is not None
        self.locks += ((user, tenant, number),)

    def add_delivery(
        self,
        tx: Tx,
        content: DeliveryContent,
        tenant: TenantId,
        user: UserId,
        alias: UserId | None,
    ) -> None:
        self.offer(deliveries.add(tx, content, tenant, user, alias))
        self.counts += ((tenant, 1),)
        self.accepted += (tenant,)

    def forget_user(self, tx: Tx, user: UserId) -> None:
        tenants = deliveries.erase(tx, user)
        self.counts += tuple((tenant, -1) for tenant in tenants)
        self.stale += tuple(tenants)
        self.erased["delivery"] += len(tenants)
        for table in ("held", "dead_letter", "person", "unreadable"):
            gone = tx.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
            self.erased[table] += gone.rowcount
        gone = tx.execute("DELETE FROM alias WHERE lid = ? OR phone = ?", (user, user))
        self.erased["alias"] += gone.rowcount


def apply(
    tx: Tx,
    changes: Iterable[Change],
    effects: Effects,
    dedup_keys: DedupKeys,
    now: float,
) -> None:
    """Apply changes in their order."""
    for change in changes:
        match change:
            case SetLock(user, tenant):
                effects.set_lock(tx, user, tenant)
            case RecordEvent(event):
                history.record(tx, event)
            case AddDelivery(user, alias, tenant, content):
                effects.add_delivery(tx, content, tenant, user, alias)
            case MarkSeen(key, sent, at):
                dedup_keys.add(tx, key, sent, at)
            case Hold(user, sent_at, content):
                held.add(tx, user, sent_at, content)
            case ReleaseHeld(user, one, alias, tenant):
                if taken := held.take(tx, one.id):
                    effects.add_delivery(tx, taken, tenant, user, alias)
            case DropHeld(user):
                held.drop(tx, user)
            case ForgetHeld(idempotency_key):
                held.forget(tx, idempotency_key)
            case UpdateRecord(user, person):
                records.put(tx, user, person, now)
            case RewriteEvent(id_, _, event):
                history.rewrite(tx, id_, event)
            case ForgetUser(user):
                effects.forget_user(tx, user)
            case PairIds(pair):
                # A LID that lost its phone has itself in its place: phones are unique there.
                tx.execute(
                    "INSERT OR REPLACE INTO alias VALUES (?, ?, ?)",
                    (pair.lid, pair.phone or pair.lid, pair.at),
                )
            case RenameUser(old, new, alias):
                _rename(tx, old, new, alias, effects, now)


def _rename(
    tx: Tx, old: UserId, new: UserId, alias: UserId | None, effects: Effects, now: float
) -> None:
    effects.renamed += ((old, new),)
    effects.stale += tuple(deliveries.rename(tx, old, new, alias, now))
    tx.execute("UPDATE dead_letter SET user = ?, alias = ? WHERE user = ?", (new, alias, old))
    tx.execute("UPDATE held SET user = ? WHERE user = ?", (new, old))
