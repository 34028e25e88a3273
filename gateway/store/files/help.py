"""Help messages: the rows of the table help. Each function is part of a transaction.

A row waits while sent_at is NULL; from then on it is the cool-down of its person.
"""

import sqlite3

from gateway.domain.model import UserId
from gateway.store.base import HELP_SECONDS

_CHUNK = 1000  # deleted in one transaction

Tx = sqlite3.Connection


def keep(tx: Tx, user: UserId, now: float, *, cooldown: float) -> bool:
    """Let a help message for user wait; False if one does, or one was sent lately."""
    query = "SELECT queued_at, sent_at FROM help WHERE user = ?"
    if row := tx.execute(query, (user,)).fetchone():
        at, span = (row[0], HELP_SECONDS) if row[1] is None else (row[1], cooldown)
        # A clock that was ahead must not silence us for longer than the span.
        if abs(now - at) < span:
            return False
    tx.execute("INSERT OR REPLACE INTO help VALUES (?, ?, NULL)", (user, now))
    return True


def waiting(tx: Tx, now: float) -> list[tuple[UserId, float]]:
    return tx.execute(
        "SELECT user, queued_at FROM help WHERE sent_at IS NULL AND queued_at > ?"
        " ORDER BY queued_at",
        (now - HELP_SECONDS,),
    ).fetchall()


def begin(tx: Tx, user: UserId, now: float) -> bool:
    """Whether it waited; it counts as sent now."""
    return bool(
        tx.execute(
            "UPDATE help SET sent_at = ? WHERE user = ? AND sent_at IS NULL AND queued_at > ?",
            (now, user, now - HELP_SECONDS),
        ).rowcount
    )


def put_back(tx: Tx, user: UserId) -> None:
    tx.execute("UPDATE help SET sent_at = NULL WHERE user = ?", (user,))


def forget(tx: Tx, user: UserId) -> None:
    tx.execute("DELETE FROM help WHERE user = ?", (user,))


def of(tx: Tx, user: UserId) -> tuple[float, float | None] | None:
    """When a message to user was queued, and sent."""
    query = "SELECT queued_at, sent_at FROM help WHERE user = ?"
    row: tuple[float, float | None] | None = tx.execute(query, (user,)).fetchone()
    return row


def rename(tx: Tx, old: UserId, new: UserId) -> None:
    """old turned out to be new; of two rows the one that was sent last counts."""
    query = "DELETE FROM help WHERE user IN (?, ?) RETURNING queued_at, sent_at"
    if rows := tx.execute(query, (old, new)).fetchall():
        queued_at, sent_at = max(rows, key=lambda row: (row[1] or 0.0, row[0]))
        tx.execute("INSERT INTO help VALUES (?, ?, ?)", (new, queued_at, sent_at))


def expire(tx: Tx, now: float, *, cooldown: float) -> None:
    """Delete what no longer counts, at most two chunks."""
    for which, until in (
        ("sent_at <= ?", now - cooldown),
        ("sent_at IS NULL AND queued_at <= ?", now - HELP_SECONDS),
    ):
        tx.execute(
            f"DELETE FROM help WHERE user IN (SELECT user FROM help WHERE {which} LIMIT ?)",
            (until, _CHUNK),
        )
