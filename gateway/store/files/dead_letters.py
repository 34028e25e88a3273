"""Dead letters: the rows of the table dead_letter. Each function is part of a transaction."""

import sqlite3
from typing import Any

from gateway.domain.model import DeadLetter, Selection, TenantId, UserId

CHUNK = 500  # moved in one transaction, so that webhooks in between do not wait for all of them

_FROM_DELIVERY = (
    "INSERT INTO dead_letter SELECT id, tenant, user, alias, event_time, arrived, idempotency_key,"
    " message_id, headers, attempts + ?, ?, ?, ?, ?, body FROM delivery WHERE "
)
_COLUMNS = (
    "id, tenant, user, message_id, idempotency_key, arrived, died_at, attempts, reason, status,"
    " answer"
)


def add(
    tx: sqlite3.Connection,
    id_: int,
    *,
    died_at: float,
    reason: str,
    attempts: int = 0,
    status: int | None = None,
    answer: bytes = b"",
) -> None:
    """Copy delivery id_ here. attempts: how many were made beyond those that are counted."""
    tx.execute(_FROM_DELIVERY + "id = ?", (attempts, died_at, reason, status, answer, id_))


def some(
    tx: sqlite3.Connection, which: Selection, *, limit: int, before: int | None
) -> list[DeadLetter]:
    condition, values = _where(which)
    if before is not None:
        condition, values = f"{condition} AND id < ?", (*values, before)
    rows = tx.execute(
        f"SELECT {_COLUMNS}, NULL FROM dead_letter WHERE {condition} ORDER BY id DESC LIMIT ?",
        (*values, limit),
    )
    return [DeadLetter(*row) for row in rows]


def one(tx: sqlite3.Connection, id_: int) -> DeadLetter | None:
    row = tx.execute(f"SELECT {_COLUMNS}, body FROM dead_letter WHERE id = ?", (id_,)).fetchone()
    return DeadLetter(*row) if row else None


def count(tx: sqlite3.Connection) -> int:
    """At most 100,000 are counted."""
    query = "SELECT count(*) FROM (SELECT 1 FROM dead_letter LIMIT 100000)"
    return int(tx.execute(query).fetchone()[0])


def newest(tx: sqlite3.Connection) -> int:
    """The id of the newest; what dies later has a larger one."""
    return int(tx.execute("SELECT coalesce(max(id), 0) FROM dead_letter").fetchone()[0])


def take_back(
    tx: sqlite3.Connection, which: Selection, *, up_to: int, now: float
) -> list[tuple[TenantId, UserId]]:
    """Make deliveries of the oldest of them again, at most CHUNK; the queue of each.

    None of them has a due time yet.
    """
    condition, values = _where(which)
    rows = tx.execute(
        f"SELECT id, tenant, user FROM dead_letter WHERE {condition} AND id <= ?"
        " ORDER BY id LIMIT ?",
        (*values, up_to, CHUNK),
    ).fetchall()
    for id_, _, _ in rows:
        tx.execute(
            "INSERT INTO delivery (tenant, user, alias, event_time, arrived, idempotency_key,"
            " message_id, headers, attempts, body) SELECT tenant, user, alias, ?, arrived,"
            " idempotency_key, message_id, headers, attempts, body FROM dead_letter WHERE id = ?",
            (now, id_),
        )
        tx.execute("DELETE FROM dead_letter WHERE id = ?", (id_,))
    return [(tenant, user) for _, tenant, user in rows]


def delete(tx: sqlite3.Connection, which: Selection, *, up_to: int) -> int:
    """At most CHUNK of them; how many."""
    condition, values = _where(which)
    return tx.execute(
        f"DELETE FROM dead_letter WHERE id IN (SELECT id FROM dead_letter WHERE {condition}"
        " AND id <= ? ORDER BY id LIMIT ?)",
        (*values, up_to, CHUNK),
    ).rowcount


def _where(which: Selection) -> tuple[str, tuple[Any, ...]]:
    conditions = [
        (f"{name} = ?", value)
        for name, value in (("id", which.id), ("tenant", which.tenant), ("user", which.user))
        if value is not None
    ]
    return " AND ".join(["1", *(part for part, _ in conditions)]), tuple(
        value for _, value in conditions
    )
