"""The history: evidence of every lock, in the table of that name. Entries are only added; an
erasure takes the names off them, and times out of the future are set right."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

from gateway.domain.lock_events import Kind, LockEvent, Why, kind_of
from gateway.domain.model import HistoryEntry, Moment, TenantId, UserId
from gateway.store.base import TOLERANCE_SECONDS

_LOOKED_AT = 1000  # entries at once


def record(tx: sqlite3.Connection, event: LockEvent, id_: int | None = None) -> None:
    """id_ None: a new one."""
    second, fraction = event.changed or (None, None)
    tx.execute(
        "INSERT INTO history (id, at, user, kind, from_tenant, to_tenant, changed_second,"
        " changed_fraction, message_id, why, who, other)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (id_, event.at, event.user, event.kind.value, event.from_tenant, event.to_tenant, second,
         fraction, event.message_id, event.why.value if event.why else None, event.who,
         event.other),
    )  # fmt: skip


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


def redate(tx: sqlite3.Connection, now: float, ahead: float = 0.0) -> int:
    """What was decided by a clock that was ahead no longer lies in the future, now that it is right
    again; how many entries. Else every later link would be older, for as long as it was ahead.

    ahead: by how many seconds, if that is known: then each decision gets its own time back. Nothing
    is done by a clock that is behind what WhatsApp has said: that one is wrong, not the entries.
    """
    latest, redated, before = now + TOLERANCE_SECONDS, 0, 2**63 - 1
    if newest_sent(tx) > latest:
        return 0
    while True:  # such entries are the newest, or nearly so: to look at all would take seconds
        rows = tx.execute(
            "SELECT id, max(at, coalesce(changed_second, 0)) FROM history WHERE id < ?"
            " ORDER BY id DESC LIMIT ?",
            (before, _LOOKED_AT),
        ).fetchall()
        ids = [id_ for id_, newest in rows if newest > latest]
        if not ids:
            return redated
        redated += tx.execute(
            "UPDATE history SET at = min(at - ?1, ?2), changed_second ="
            " CAST(min(changed_second - ?1, ?2) AS INTEGER),"
            " changed_fraction = min(changed_fraction - ?1, ?2)"
            " WHERE id IN (SELECT value FROM json_each(?3))",
            (ahead, now, json.dumps(ids)),
        ).rowcount
        before = rows[-1][0]


def newest_sent(tx: sqlite3.Connection) -> int:
    """The newest time that WhatsApp gave to a link of late, Unix seconds; 0 if to none."""
    # A message without a time of its own has that of its arrival.
    (newest,) = tx.execute(
        "SELECT max(changed_second) FROM (SELECT message_id, changed_second, at FROM history"
        " ORDER BY id DESC LIMIT ?)"
        " WHERE message_id NOT NULL AND changed_second < CAST(at AS INTEGER)",
        (_LOOKED_AT,),
    ).fetchone()
    return newest or 0


def move_all(
    tx: sqlite3.Connection,
    users: str,
    at: float,
    old: TenantId,
    new: TenantId,
    decided_at: float,
) -> None:
    """Add what domain.person.move() records of each of users, a JSON array, in one statement."""
    decided = (int(decided_at), decided_at)
    tx.execute(
        "INSERT INTO history (at, user, kind, from_tenant, to_tenant, why, changed_second,"
        " changed_fraction) SELECT ?1, one.value, ?2, ?3, ?4, ?5,"
        " CASE WHEN (last.changed_second, last.changed_fraction) > (?6, ?7)"
        " THEN last.changed_second ELSE ?6 END,"
        " CASE WHEN (last.changed_second, last.changed_fraction) > (?6, ?7)"
        " THEN last.changed_fraction ELSE ?7 END"
        " FROM json_each(?8) AS one LEFT JOIN history AS last ON last.id = (SELECT id FROM history"
        " WHERE user = one.value AND changed_second IS NOT NULL ORDER BY id DESC LIMIT 1)",
        (at, Kind.MOVED.value, old, new, Why.TENANT_MOVE.value, *decided, users),
    )


def of_person(
    tx: sqlite3.Connection, ids: Sequence[UserId], *, limit: int, before: int | None = None
) -> list[HistoryEntry]:
    """Newest first."""
    rows = tx.execute(
        "SELECT id, at, user, kind, from_tenant, to_tenant, message_id, why, who, other"
        f" FROM history WHERE user IN ({_marks(ids)}) AND id < ? ORDER BY id DESC LIMIT ?",
        (*ids, 2**63 - 1 if before is None else before, limit),
    )
    return [HistoryEntry(*row) for row in rows]


def touching(tx: sqlite3.Connection, ids: Sequence[UserId]) -> dict[int, LockEvent]:
    """Return by id the entries of ids, and of all users whose history names one of them."""
    marks = _marks(ids)
    rows = tx.execute(
        "SELECT id, at, user, kind, from_tenant, to_tenant, changed_second, changed_fraction, why,"
        f" who, other, message_id FROM history WHERE user IN ({marks})"
        f" OR user IN (SELECT user FROM history WHERE other IN ({marks})) ORDER BY id",
        (*ids, *ids),
    )
    return {
        id_: LockEvent(
            at,
            user,
            kind_of(kind),
            from_,
            to,
            None if second is None else Moment(second, fraction),
            Why(why) if why else None,
            *rest,
        )
        for id_, at, user, kind, from_, to, second, fraction, why, *rest in rows
    }


def rewrite(tx: sqlite3.Connection, id_: int, event: LockEvent) -> None:
    tx.execute("DELETE FROM history WHERE id = ?", (id_,))
    record(tx, event, id_)


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
