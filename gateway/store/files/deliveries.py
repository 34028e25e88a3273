"""User queues: the rows of the table delivery. Each function is part of a transaction.

Of each queue (user, tenant) exactly one row has a due time: the head, the first by event time, then
arrival. The others wait for it. A function that changes a queue says which its head is.
"""

import math
import sqlite3
from collections.abc import Iterable
from typing import Any

import orjson

from gateway.domain.model import Delivery, DeliveryContent, Retry, TenantId, UserId
from gateway.store.files.scheduler import Head

_COLUMNS = (
    "id, tenant, user, alias, idempotency_key, headers, body, attempts, poison_attempts,"
    " tried_at, age, event_time"
)
_FIRST = "FROM delivery WHERE user = ? AND tenant = ? ORDER BY event_time, id LIMIT 1"

CHUNK = 1000  # heads changed in one transaction, so that webhooks do not wait for all of them

Tx = sqlite3.Connection


def counts(tx: Tx) -> Iterable[tuple[TenantId, int]]:
    """How many deliveries there are of each tenant."""
    return tx.execute("SELECT tenant, count(*) FROM delivery GROUP BY tenant")


def oldest(tx: Tx) -> float | None:
    """When the oldest arrived."""
    row = tx.execute("SELECT arrived FROM delivery ORDER BY id LIMIT 1").fetchone()
    return row[0] if row else None


def add(
    tx: Tx, content: DeliveryContent, tenant: TenantId, user: UserId, alias: UserId | None
) -> Head | None:
    """Add a delivery to its queue; the head, if that is what it became."""
    first = tx.execute(f"SELECT id, event_time, due {_FIRST}", (user, tenant)).fetchone()
    due: float | None = content.arrived
    if first is not None:
        due = None
        if content.event_time < first[1]:  # this one comes first, but no sooner than the head
            due = first[2]
            tx.execute("UPDATE delivery SET due = NULL WHERE id = ?", (first[0],))
    id_ = tx.execute(
        "INSERT INTO delivery (tenant, user, alias, event_time, arrived, idempotency_key,"
        " message_id, headers, due, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (tenant, user, alias, content.event_time, content.arrived, content.idempotency_key,
         content.message_id, orjson.dumps(content.headers).decode(), due, content.body),
    ).lastrowid  # fmt: skip
    assert id_ is not None
    if due is None:
        return None
    delivery = Delivery(
        id=id_,
        tenant=tenant,
        user=user,
        alias=alias,
        idempotency_key=content.idempotency_key,
        headers=content.headers,
        body=content.body,
        attempt=1,
        poison_attempts=0,
        tried_at=None,
        age=0.0,
        event_time=content.event_time,
    )
    return Head(id_, tenant, user, due, delivery)


def delete(tx: Tx, id_: int) -> tuple[TenantId, UserId] | None:
    """Its queue, which needs a head now; None if there is no such delivery."""
    query = "DELETE FROM delivery WHERE id = ? RETURNING tenant, user"
    row: tuple[TenantId, UserId] | None = tx.execute(query, (id_,)).fetchone()
    return row


def put_back(tx: Tx, id_: int, sent_at: float | None) -> tuple[TenantId, UserId] | None:
    """Its queue. sent_at: see model.Requeue."""
    if sent_at is not None:
        tx.execute("UPDATE delivery SET tried_at = ? WHERE id = ?", (sent_at, id_))
    query = "SELECT tenant, user FROM delivery WHERE id = ?"
    row: tuple[TenantId, UserId] | None = tx.execute(query, (id_,)).fetchone()
    return row


def failed(tx: Tx, id_: int, outcome: Retry) -> tuple[TenantId, UserId] | None:
    """Count a failed attempt; its queue, which needs a head now."""
    row: tuple[TenantId, UserId] | None = tx.execute(
        "UPDATE delivery SET due = NULL, attempts = attempts + 1,"
        " poison_attempts = poison_attempts + ?, tried_at = ?, age = ?, last_error = ?"
        " WHERE id = ? RETURNING tenant, user",
        (outcome.poison, outcome.tried_at, outcome.age, outcome.reason, id_),
    ).fetchone()
    return row


def promote(tx: Tx, tenant: TenantId, user: UserId, due: float | None) -> Head | None:
    """Make the first delivery of the queue its head, due then. No other may have a due time.

    due None: it is the head already, and keeps its time.
    """
    row = tx.execute(f"SELECT due, {_COLUMNS} {_FIRST}", (user, tenant)).fetchone()
    if row is None:
        return None
    if due is None:
        due = row[0]
        assert due is not None, "a queue has a head"
    elif row[0] != due:
        tx.execute("UPDATE delivery SET due = ? WHERE id = ?", (due, row[1]))
    return Head(row[1], tenant, user, due, _delivery(row[1:]))


def find_head(tx: Tx, tenant: TenantId, user: UserId, now: float) -> Head | None:
    """After deliveries came or went anywhere in the queue: it keeps its due time, if it had one.

    Looks at the whole queue, unlike promote().
    """
    queue = (user, tenant)
    query = "SELECT min(due) FROM delivery WHERE user = ? AND tenant = ?"
    due: float | None = tx.execute(query, queue).fetchone()[0]
    tx.execute(
        "UPDATE delivery SET due = NULL WHERE user = ? AND tenant = ? AND due NOT NULL", queue
    )
    return promote(tx, tenant, user, now if due is None else due)


def due_heads(tx: Tx, tenant: TenantId, now: float, limit: int) -> tuple[list[Head], float]:
    """Up to limit heads of tenant that are due, oldest first, without what they deliver; and when
    the next one will be, infinite if none."""
    rows = tx.execute(
        "SELECT id, user, due FROM delivery WHERE tenant = ? AND due <= ? ORDER BY due, id LIMIT ?",
        (tenant, now, limit),
    )
    heads = [Head(id_, tenant, user, due) for id_, user, due in rows]
    (later,) = tx.execute(
        "SELECT min(due) FROM delivery WHERE tenant = ? AND due > ?", (tenant, now)
    ).fetchone()
    return heads, math.inf if later is None else later


def some_due(tx: Tx, tenant: TenantId, now: float, *, without_poison: bool) -> int:
    """What is due later of the tenant is due now, at most CHUNK heads; how many. See
    Store.make_due()."""
    return tx.execute(
        "UPDATE delivery SET due = ? WHERE id IN (SELECT id FROM delivery WHERE tenant = ?"
        " AND due > ? AND poison_attempts <= ? LIMIT ?)",
        (now, tenant, now, 0 if without_poison else math.inf, CHUNK),
    ).rowcount


def load(tx: Tx, heads: Iterable[Head]) -> None:
    """Give each head its delivery; None if it is gone, or no longer the first of its queue."""
    for head in heads:
        row = tx.execute(f"SELECT {_COLUMNS} {_FIRST}", (head.user, head.tenant)).fetchone()
        head.delivery = _delivery(row) if row and row[0] == head.id else None


def of_user(tx: Tx, user: UserId) -> list[tuple[int, TenantId]]:
    """Id and tenant of each delivery of user."""
    return tx.execute("SELECT id, tenant FROM delivery WHERE user = ?", (user,)).fetchall()


def rename(tx: Tx, old: UserId, new: UserId, alias: UserId | None, now: float) -> set[TenantId]:
    """Queues of old are queues of new; the tenants they go to."""
    tenants = {tenant for _, tenant in of_user(tx, old)}
    tx.execute("UPDATE delivery SET user = ?, alias = ? WHERE user = ?", (new, alias, old))
    for tenant in tenants:
        find_head(tx, tenant, new, now)
    return tenants


def move(tx: Tx, old: TenantId, new: TenantId, in_flight: Iterable[int], now: float) -> int:
    """What waits for old, was never attempted and is not in flight, waits for new; how many."""
    moved = tx.execute(
        "UPDATE delivery SET tenant = ? WHERE tenant = ? AND attempts = 0 AND tried_at IS NULL"
        " AND id NOT IN (SELECT value FROM json_each(?))",
        (new, old, orjson.dumps(list(in_flight)).decode()),
    ).rowcount
    for tenant in (old, new):
        # Of each queue the first is due, no sooner than the one was that was due before.
        tx.execute(
            "UPDATE delivery SET due = CASE WHEN place = 1 THEN coalesce(latest, ?) END FROM ("
            "SELECT id AS one, row_number() OVER queue AS place, max(due) OVER (PARTITION BY user)"
            " AS latest FROM delivery WHERE tenant = ?"
            " WINDOW queue AS (PARTITION BY user ORDER BY event_time, id)"
            ") WHERE id = one AND due IS NOT CASE WHEN place = 1 THEN coalesce(latest, ?) END",
            (now, tenant, now),
        )
    return moved


def erase(tx: Tx, user: UserId) -> list[TenantId]:
    """Delete what waits of user, in flight or not; the tenant of each."""
    query = "DELETE FROM delivery WHERE user = ? RETURNING tenant"
    return [tenant for (tenant,) in tx.execute(query, (user,)).fetchall()]


def _delivery(row: tuple[Any, ...]) -> Delivery:
    (id_, tenant, user, alias, key, headers, body, attempts, poison_attempts, tried_at, age,
     event_time) = row  # fmt: skip
    return Delivery(
        id=id_,
        tenant=tenant,
        user=user,
        alias=alias,
        idempotency_key=key,
        headers=tuple((name, value) for name, value in orjson.loads(headers)),
        body=body,
        attempt=attempts + 1,
        poison_attempts=poison_attempts,
        tried_at=tried_at,
        age=age,
        event_time=event_time,
    )
