"""What is known of persons besides lock and history: the rows of the table person. Each function
is part of a transaction."""

import sqlite3

from gateway.domain.model import UserId
from gateway.domain.person import HELP_SECONDS, Person
from gateway.store import person_record

_CHUNK = 1000  # deleted in one transaction

Tx = sqlite3.Connection


def put(tx: Tx, user: UserId, person: Person, now: float) -> None:
    if (record := person_record.pack(person)) is None:
        tx.execute("DELETE FROM person WHERE user = ?", (user,))
    else:
        row = (user, record, person_record.help_waits_since(person), now)
        tx.execute("INSERT OR REPLACE INTO person VALUES (?, ?, ?, ?)", row)


def help_waits(tx: Tx, now: float) -> list[tuple[UserId, float]]:
    return tx.execute(
        "SELECT user, help_waits_since FROM person WHERE help_waits_since > ?"
        " ORDER BY help_waits_since",
        (now - HELP_SECONDS,),
    ).fetchall()


def expire(tx: Tx, until: float) -> None:
    """Delete what was last updated before then, at most a chunk."""
    query = "DELETE FROM person WHERE user IN (SELECT user FROM person WHERE updated_at <= ?"
    tx.execute(f"{query} LIMIT {_CHUNK})", (until,))
