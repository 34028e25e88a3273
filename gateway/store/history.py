"""The history: append-only evidence of every lock, in the table of that name."""

import sqlite3
from collections.abc import Iterable
from enum import Enum

from gateway.model import Moment, Note, TenantId, UserId


class Kind(Enum):
    """What a row of the history tells, beside the notes about links."""

    IMPORTED = "imported"  # stood in the file before there was a history
    LOCKED = "locked"
    MOVED = "moved"
    UNLOCKED = "unlocked"
    MERGED = "merged"  # two ids turned out to be one person


def record(
    tx: sqlite3.Connection,
    at: float,
    user: UserId,
    kind: Kind | Note,
    from_tenant: TenantId | None,
    to_tenant: TenantId | None,
    changed: Moment | None,
    message_id: str | None,
    why: str | None = None,
) -> None:
    """Add a line. changed is the time of the change of user's lock; None: it did not change."""
    second, fraction = changed or (None, None)
    tx.execute(
        "INSERT INTO history (at, user, kind, from_tenant, to_tenant, changed_second,"
        " changed_fraction, message_id, why) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (at, user, kind.value, from_tenant, to_tenant, second, fraction, message_id, why),
    )


def is_empty(tx: sqlite3.Connection) -> bool:
    return tx.execute("SELECT 1 FROM history LIMIT 1").fetchone() is None


def knows_of_locks(tx: sqlite3.Connection) -> bool:
    query = "SELECT 1 FROM history WHERE changed_second IS NOT NULL LIMIT 1"
    return tx.execute(query).fetchone() is not None


def changes(tx: sqlite3.Connection) -> Iterable[tuple[UserId, TenantId | None]]:
    """Every change there was, oldest first: user, and the tenant from then on."""
    return tx.execute(
        "SELECT user, to_tenant FROM history WHERE changed_second IS NOT NULL ORDER BY id"
    )


def last_change(tx: sqlite3.Connection, user: UserId) -> Moment | None:
    row = tx.execute(
        "SELECT changed_second, changed_fraction FROM history"
        " WHERE user = ? AND changed_second IS NOT NULL ORDER BY id DESC LIMIT 1",
        (user,),
    ).fetchone()
    return Moment(*row) if row else None


def tenant_at(
    tx: sqlite3.Connection, user: UserId, formerly: UserId, moment: Moment
) -> TenantId | None:
    """Where a person belonged then, who was known by either id."""
    row = tx.execute(
        "SELECT to_tenant FROM history WHERE user IN (?, ?) AND changed_second IS NOT NULL"
        " AND (changed_second, changed_fraction) <= (?, ?)"
        " ORDER BY changed_second DESC, changed_fraction DESC, id DESC LIMIT 1",
        (user, formerly, *moment),
    ).fetchone()
    return row[0] if row else None


def was_unlocked(tx: sqlite3.Connection, user: UserId) -> bool:
    """Whether the last change was an operator's unlock, not the loss of the person behind it."""
    row = tx.execute(
        "SELECT kind FROM history"
        " WHERE user = ? AND changed_second IS NOT NULL ORDER BY id DESC LIMIT 1",
        (user,),
    ).fetchone()
    return row is not None and row[0] == Kind.UNLOCKED.value
