"""Held messages: the rows of the table held. Each function is part of a transaction.

A link's first POST can meet a restart of ours, the text behind it not: WAHA knows no order. So what
a user without a lock writes is kept aside for a while.
"""

import sqlite3

import orjson

from gateway.domain.model import DeliveryContent, Moment, UserId

CHUNK = 1000  # deleted in one transaction
_MOST_LIDS = 10_000


def add(tx: sqlite3.Connection, user: UserId, sent: Moment, content: DeliveryContent) -> None:
    tx.execute(
        "INSERT INTO held (user, sent_second, sent_fraction, event_time, arrived, idempotency_key,"
        " message_id, headers, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (user, *sent, content.event_time, content.arrived, content.idempotency_key,
         content.message_id, orjson.dumps(content.headers).decode(), content.body),
    )  # fmt: skip


def take(tx: sqlite3.Connection, id_: int) -> DeliveryContent | None:
    """Return what is held under that id, and hold it no longer; None if it is not there."""
    row = tx.execute(
        "DELETE FROM held WHERE id = ? RETURNING event_time, arrived, idempotency_key, message_id,"
        " headers, body",
        (id_,),
    ).fetchone()
    if row is None:
        return None
    event_time, arrived, key, message_id, headers, body = row
    pairs = tuple((name, value) for name, value in orjson.loads(headers))
    return DeliveryContent(event_time, arrived, key, message_id, pairs, body)


def drop(tx: sqlite3.Connection, user: UserId) -> None:
    """Hold nothing of user any more."""
    tx.execute("DELETE FROM held WHERE user = ?", (user,))


def lids(tx: sqlite3.Connection) -> list[UserId]:
    """Who is known by LID only and has messages here, at most so many, the newest first."""
    query = "SELECT user FROM held WHERE user LIKE '%@lid' GROUP BY user ORDER BY max(id) DESC"
    return [user for (user,) in tx.execute(f"{query} LIMIT {_MOST_LIDS}")]


def forget(tx: sqlite3.Connection, idempotency_key: str) -> None:
    """The message is delivered after all."""
    tx.execute("DELETE FROM held WHERE idempotency_key = ?", (idempotency_key,))


def expire(tx: sqlite3.Connection, *, arrived_until: float) -> int:
    """Delete what is too old, at most CHUNK; how many."""
    return tx.execute(
        "DELETE FROM held WHERE id IN (SELECT id FROM held WHERE arrived <= ? LIMIT ?)",
        (arrived_until, CHUNK),
    ).rowcount


def count(tx: sqlite3.Connection) -> int:
    """At most 100,000 are counted."""
    query = "SELECT count(*) FROM (SELECT 1 FROM held LIMIT 100000)"
    return int(tx.execute(query).fetchone()[0])
