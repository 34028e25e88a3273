"""Unreadable messages: the rows of the table unreadable. Each function is part of a transaction.

WAHA was answered 200 and forgets them, and no tenant gets them: so they are kept a while for a
person to see. One that could not be decrypted yet goes when its content has come.
"""

import sqlite3

from gateway.domain.model import InboundMessage, Unreadable, UnreadableReason
from gateway.store.base import (
    DECRYPTION_SECONDS,
    MAX_UNREADABLE,
    MAX_UNREADABLE_BYTES,
    UNREADABLE_SECONDS,
)

_LOOKED_AT = 1000  # in one transaction, of those whose content may have come


def add(tx: sqlite3.Connection, message: InboundMessage, reason: UnreadableReason) -> None:
    """A copy of one that is kept changes nothing."""
    tx.execute(
        "INSERT OR IGNORE INTO unreadable (key, arrived, session, event, reason, user, message_id,"
        " body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (message.dedup_key.digest if message.dedup_key else None, message.arrived, message.session,
         message.event, reason.value, message.phone or message.lid, message.message_id,
         message.body),
    )  # fmt: skip


def some(tx: sqlite3.Connection, *, limit: int, before: int | None) -> list[Unreadable]:
    """Newest first."""
    rows = tx.execute(
        "SELECT id, arrived, session, event, reason, user, message_id, body FROM unreadable"
        " WHERE id < ? ORDER BY id DESC LIMIT ?",
        (2**63 - 1 if before is None else before, limit),
    )
    return [
        Unreadable(id_, arrived, session, event, UnreadableReason(reason), *rest)
        for id_, arrived, session, event, reason, *rest in rows
    ]


def count(tx: sqlite3.Connection, now: float) -> int:
    """Without what came just now and may be decrypted in a moment."""
    query = "SELECT count(*) FROM unreadable WHERE reason != ? OR arrived <= ?"
    waiting = UnreadableReason.NOT_DECRYPTED.value
    return int(tx.execute(query, (waiting, now - DECRYPTION_SECONDS)).fetchone()[0])


def expire(tx: sqlite3.Connection, now: float) -> None:
    """Delete what is too old or too much, and what has come after all."""
    tx.execute("DELETE FROM unreadable WHERE arrived <= ?", (now - UNREADABLE_SECONDS,))
    tx.execute(
        "DELETE FROM unreadable WHERE id <= (SELECT id FROM (SELECT id, row_number() OVER newest AS"
        " number, sum(length(body)) OVER newest AS bytes FROM unreadable"
        " WINDOW newest AS (ORDER BY id DESC)) WHERE number > ? OR bytes > ?"
        " ORDER BY id DESC LIMIT 1)",
        (MAX_UNREADABLE, MAX_UNREADABLE_BYTES),
    )
    came = " OR ".join(
        f"EXISTS (SELECT 1 FROM dedup_{turn} AS seen WHERE seen.key = newest.key)"
        for turn in range(3)
    )
    tx.execute(
        "DELETE FROM unreadable WHERE id IN (SELECT id FROM"
        " (SELECT id, key FROM unreadable WHERE reason = ? ORDER BY id DESC LIMIT ?) AS newest"
        f" WHERE {came})",
        (UnreadableReason.NOT_DECRYPTED.value, _LOOKED_AT),
    )
