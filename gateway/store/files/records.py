"""Help messages: the rows of the table help. Each function is part of a transaction.

A row waits while sent_at is NULL; from then on it is the cool-down of its person.
"""

import sqlite3

from gateway.domain.model import UserId
from gateway.domain.person import HELP_SECONDS, Help

_CHUNK = 1000  # deleted in one transaction

Tx = sqlite3.Connection


def put(tx: Tx, user: UserId, help_: Help | None) -> None:
    """Store what is known of a help message to user; None: nothing."""
    if help_ is None:
        forget(tx, user)
    else:
        query = "INSERT OR REPLACE INTO help VALUES (?, ?, ?)"
        tx.execute(query, (user, help_.queued_at, help_.sent_at))


def waiting(tx: Tx, now: float) -> list[tuple[UserId, float]]:
    return tx.execute(
        "SELECT user, queued_at FROM help WHERE sent_at IS NULL AND queued_at > ?"
        " ORDER BY queued_at",
        (now - HELP_SECONDS,),
    ).fetchall()


def forget(tx: Tx, user: UserId) -> None:
    tx.execute("DELETE FROM help WHERE user = ?", (user,))


def of(tx: Tx, user: UserId) -> tuple[float, float | None] | None:
    """When a message to user was queued, and sent."""
    query = "SELECT queued_at, sent_at FROM help WHERE user = ?"
    row: tuple[float, float | None] | None = tx.execute(query, (user,)).fetchone()
    return row


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
