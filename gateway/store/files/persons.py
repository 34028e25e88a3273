"""What is known of persons: read from router.db, and of recent ones kept in memory.

A person's next message then needs no question to the database. Memory follows the commits: what a
transaction has changed is staged for the works behind it, and kept once it is durable.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gateway.domain.lock_events import Kind
from gateway.domain.model import NEVER, Lock, Moment, TenantId, UserId, is_lid
from gateway.domain.person import (
    HeldMessage,
    Known,
    LockChange,
    Pair,
    Person,
    ids_to_load,
)
from gateway.store import person_record

_MAX_RECENT = 50_000  # ids; some 500 bytes each

Tx = sqlite3.Connection
TenantOf = Callable[[UserId], TenantId | None]

_PERSON = """
SELECT (SELECT record FROM person WHERE user = ?1), EXISTS (SELECT 1 FROM held WHERE user = ?1),
    changed_second, changed_fraction, kind
FROM (SELECT 1) LEFT JOIN (
    SELECT changed_second, changed_fraction, kind FROM history
    WHERE user = ?1 AND changed_second IS NOT NULL ORDER BY id DESC LIMIT 1
) ON 1
"""
_CHANGES = """
SELECT changed_second, changed_fraction, id, to_tenant FROM history
WHERE user = ?1 AND changed_second IS NOT NULL AND (changed_second, changed_fraction) > (?2, ?3)
UNION ALL SELECT * FROM (
    SELECT changed_second, changed_fraction, id, to_tenant FROM history
    WHERE user = ?1 AND changed_second IS NOT NULL
        AND (changed_second, changed_fraction) <= (?2, ?3)
    ORDER BY changed_second DESC, changed_fraction DESC, id DESC LIMIT 1
)
"""


@dataclass(slots=True)
class _Facts:
    """By id; a pair is under both of its ids, None where there is none."""

    persons: OrderedDict[UserId, Person] = field(default_factory=OrderedDict)
    pairs: OrderedDict[UserId, Pair | None] = field(default_factory=OrderedDict)
    alone: dict[UserId, Known] = field(default_factory=dict)  # of persons with one id

    def take(self, known: Known) -> None:
        known = _as_loaded(known)
        if len(known.persons) == 1 and not known.pairs:  # the usual case, in less time
            ((user, person),) = known.persons.items()
            if not person.held:
                self.pairs[user] = None
                self.pairs.move_to_end(user)
                self.persons[user] = person
                self.persons.move_to_end(user)
                self.alone[user] = known
                return
        pairs = {pair.lid: pair for pair in known.pairs.values()}
        pairs |= {pair.phone: pair for pair in known.pairs.values() if pair.phone}
        for user, person in known.persons.items():
            self.alone.pop(user, None)
            self.pairs[user] = pairs.get(user)
            self.pairs.move_to_end(user)
            if person.held:
                # Held messages end by themselves, and new ones get their ids from the database.
                self.persons.pop(user, None)
            else:
                self.persons[user] = person
                self.persons.move_to_end(user)

    def drop(self, users: Iterable[UserId]) -> None:
        for user in users:
            self.persons.pop(user, None)
            self.pairs.pop(user, None)
            self.alone.pop(user, None)


class Persons:
    """Loads what is known of persons, and keeps max_recent of them in memory."""

    def __init__(self, *, max_recent: int = _MAX_RECENT) -> None:
        self._max_recent = max_recent
        self._recent = _Facts()  # what the disk has
        self._staged = _Facts()  # what this transaction has changed
        self._unknown: set[UserId] = set()  # of whom this transaction must ask the database
        self._everybody_is = False

    def begin(self) -> None:
        """Forget what an earlier transaction staged: it is durable, or was rolled back."""
        self._staged = _Facts()
        self._unknown = set()
        self._everybody_is = False

    def load(self, tx: Tx, ids: Sequence[UserId], tenant_of: TenantOf) -> Known:
        """Return what is known of ids and of those that are or were the same persons.

        tenant_of: where a user is locked to as this transaction has it.
        """
        if len(ids) == 1:  # the usual case, in less time
            user = ids[0]
            known = self._recent.alone.get(user)
            if known and self._is_recent(user) and user not in self._staged.pairs:
                return known

        all_ids, pairs = ids_to_load(
            ids, lambda lid: self._pair(tx, lid), lambda phone: self._pair(tx, phone)
        )
        persons = {user: self._person(tx, user, tenant_of) for user in all_ids}
        if any(person.held for person in persons.values()):
            persons = _with_lock_changes(tx, persons)
        return Known(persons, pairs)

    def ids_of(self, tx: Tx, user: UserId) -> tuple[UserId, UserId | None]:
        """Return the id that a person is stored under, and the other one if it is known."""
        pair = self._pair(tx, user)
        if pair is None or pair.phone is None:
            return user, None
        return pair.phone, pair.lid

    def stage(self, known: Known) -> None:
        """What a work of this transaction has changed holds for those behind it."""
        self._staged.take(known)
        self._unknown |= {user for user, person in known.persons.items() if person.held}

    def keep(self, known: Known) -> None:
        """What a work has loaded or changed is durable."""
        self._recent.take(known)
        while len(self._recent.persons) > self._max_recent:
            user, _ = self._recent.persons.popitem(last=False)
            self._recent.alone.pop(user, None)
        while len(self._recent.pairs) > self._max_recent:
            self._recent.pairs.popitem(last=False)

    def forget_staged(self, users: Collection[UserId] | None = None) -> None:
        """This transaction has changed users by statements of its own; None: perhaps everybody."""
        if users is None:
            self._staged = _Facts()
            self._everybody_is = True
        else:
            self._staged.drop(users)
            self._unknown.update(users)

    def _is_recent(self, user: UserId) -> bool:
        return not self._everybody_is and user not in self._unknown

    def forget(self, users: Iterable[UserId] | None = None) -> None:
        """Ask the database for users from now on; None: for everybody."""
        if users is None:
            self._recent = _Facts()
        else:
            self._recent.drop(users)

    def _pair(self, tx: Tx, user: UserId) -> Pair | None:
        if user in self._staged.pairs:
            return self._staged.pairs[user]
        if user in self._recent.pairs and self._is_recent(user):
            return self._recent.pairs[user]
        column = "lid" if is_lid(user) else "phone"
        query = f"SELECT lid, phone, linked_at FROM alias WHERE {column} = ?"
        row = tx.execute(query, (user,)).fetchone()
        # A LID that lost its phone has itself in its place.
        return Pair(row[0], None if row[0] == row[1] else row[1], row[2]) if row else None

    def _person(self, tx: Tx, user: UserId, tenant_of: TenantOf) -> Person:
        if user in self._staged.persons:
            return self._staged.persons[user]
        if user in self._recent.persons and self._is_recent(user):
            return self._recent.persons[user]
        record, has_held, second, fraction, kind = tx.execute(_PERSON, (user,)).fetchone()
        return replace(
            person_record.unpack(record),
            lock=Lock(tenant_of(user), NEVER if second is None else Moment(second, fraction)),
            is_unlocked=kind == Kind.UNLOCKED.value,
            held=_held(tx, user) if has_held else (),
        )


def _as_loaded(known: Known) -> Known:
    """Return known as load() has it of persons of whom nothing is held: without the copies of one
    message, and without changes of locks, which would grow with each link."""
    if any(person.lock_changes for person in known.persons.values()):
        persons = {user: replace(one, lock_changes=()) for user, one in known.persons.items()}
        return Known(persons, known.pairs)
    return replace(known, seen=()) if known.seen else known


def _held(tx: Tx, user: UserId) -> tuple[HeldMessage, ...]:
    rows = tx.execute(
        "SELECT id, idempotency_key, sent_second, sent_fraction, arrived FROM held WHERE user = ?"
        " ORDER BY id",
        (user,),
    )
    return tuple(
        HeldMessage(id_, key, Moment(second, fraction), arrived)
        for id_, key, second, fraction, arrived in rows
    )


def _with_lock_changes(tx: Tx, persons: dict[UserId, Person]) -> dict[UserId, Person]:
    """Add of each person those changes of the lock that show where a held message belongs."""
    oldest = min(held.sent for person in persons.values() for held in person.held)
    return {
        user: replace(
            person,
            lock_changes=tuple(
                LockChange(Moment(second, fraction), id_, tenant)
                for second, fraction, id_, tenant in tx.execute(_CHANGES, (user, *oldest))
            ),
        )
        for user, person in persons.items()
    }
