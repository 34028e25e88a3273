"""What is known of persons as Redis has it: the commands that read it, and what their answers say.

Keys, each behind "gw:{session}:":
lock: user -> tenant.  users, of:<tenant>: the users in order.  owners: tenant -> how many.
change: user -> "second fraction kind" of the last change of the lock.
h:<user>: the history, oldest first, see history.py.  named:<user>: who is named in it, or names the
user.
phone: LID -> phone, the LID itself if it lost its phone.  linked_at: LID -> when that was learned.
lid: phone -> LID.
person: user -> record, see store/person_record.py.  person_updated: user -> when that was written.
help_waits: user -> since when.
held:<user>: messages in JSON, oldest first.  held_body: body ids -> bodies.
held_since: user -> when the oldest of them arrived.  holders:<idempotency key>: users.
seen:<dedup key>: ";phone,lid,routed" of each person who had it, ids as hashes, for 72 hours.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from gateway.domain.dedup import Copy, PersonHash
from gateway.domain.lock_events import Kind
from gateway.domain.model import NEVER, InboundMessage, Lock, Moment, TenantId, UserId, is_lid
from gateway.domain.person import HeldMessage, Known, LockChange, Pair, Person
from gateway.store import person_record

Command = list[Any]


@dataclass(frozen=True, slots=True)
class Held:
    """A held message as its list has it. body: its id in held_body."""

    text: str
    body: str
    message: HeldMessage
    content: Mapping[str, str]  # event_time, arrived, key, message_id, headers


@dataclass(frozen=True, slots=True)
class Facts:
    """known, and held messages as they are stored. other_ids: what each id is paired with."""

    known: Known
    held: Mapping[UserId, tuple[Held, ...]] = field(default_factory=dict)
    other_ids: Mapping[UserId, UserId] = field(default_factory=dict)


def reads_of(user: UserId) -> list[Command]:
    """Return the commands that read what is known of one id."""
    pair = ["phone", "linked_at"] if is_lid(user) else ["lid"]
    return [
        ["field_of", user, "lock", "change", "person", *pair],
        ["LRANGE", f"held:{user}", "0", "-1"],
    ]


def reads_about(message: InboundMessage | None) -> list[Command]:
    """Return the commands that read what is known of a message: its copies, and who holds it."""
    if message is None or message.dedup_key is None:
        return []
    return [
        ["GET", f"seen:{message.dedup_key.digest.hex()}"],
        ["SMEMBERS", f"holders:{message.idempotency_key}"],
    ]


_NOTHING = ("false", "{}")  # what reads_about() is mostly answered, in JSON


class PersonAnswers:
    """What was read of ids. texts: the answers to reads_of() each, in JSON as Redis gave them."""

    __slots__ = ("_facts", "expected", "ids", "reads", "texts")

    def __init__(self, ids: tuple[UserId, ...], texts: Sequence[str] = ()) -> None:
        self.ids = ids
        self.texts = texts
        # As a script takes them: made once, for many calls.
        self.reads = orjson.dumps([command for user in ids for command in reads_of(user)])
        self.expected = orjson.dumps(texts)
        self._facts: Facts | None = None

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            self._facts = from_answers(self.ids, self.texts)
        return self._facts


@dataclass(frozen=True, slots=True)
class Answers:
    """What was read of persons and about a message. about: the answers to reads_about() it."""

    persons: PersonAnswers
    message: InboundMessage | None
    about: Sequence[str]

    @classmethod
    def guessed(cls, persons: PersonAnswers, message: InboundMessage | None) -> "Answers":
        """Persons as they were the last time, and of message what is mostly known: nothing."""
        return cls(persons, message, _NOTHING if reads_about(message) else ())

    def with_texts(self, texts: Sequence[str]) -> "Answers":
        """The same with other answers."""
        many = len(texts) - len(reads_about(self.message))
        return Answers(PersonAnswers(self.persons.ids, texts[:many]), self.message, texts[many:])

    @property
    def reads(self) -> orjson.Fragment:
        return joined(self.persons.reads, reads_about(self.message))

    @property
    def expected(self) -> orjson.Fragment:
        return joined(self.persons.expected, self.about)

    @property
    def facts(self) -> Facts:
        facts, seen = self.persons.facts, orjson.loads(self.about[0]) if self.about else None
        if not seen:
            return facts
        return replace(facts, known=replace(facts.known, seen=tuple(copies(seen))))

    def missing(self, ids: Collection[UserId]) -> set[UserId]:
        """Return what was not read and should have been: the other ids of the persons that ids
        are, and who holds the message."""
        other_ids = self.persons.facts.other_ids
        holders = orjson.loads(self.about[1]) if self.about else ()
        needed = {other_ids[one] for one in ids if one in other_ids} | set(map(UserId, holders))
        return needed - set(self.persons.ids)


def joined(packed: bytes, more: Sequence[Any]) -> orjson.Fragment:
    """Return two lists, one of them in JSON, as one."""
    if not more:
        return orjson.Fragment(packed)
    return orjson.Fragment(packed[:-1] + b"," + orjson.dumps(more)[1:])


def from_answers(ids: Sequence[UserId], answers: Sequence[str]) -> Facts:
    """answers: in JSON, to reads_of() each of ids."""
    persons: dict[UserId, Person] = {}
    pairs: dict[UserId, Pair] = {}
    held: dict[UserId, tuple[Held, ...]] = {}
    other_ids: dict[UserId, UserId] = {}
    values = iter(map(orjson.loads, answers))
    for user, (tenant, change, record, other, *rest), texts in zip(
        ids, values, values, strict=True
    ):
        second, fraction, kind = change.split() if change else ("", "", "")
        if texts:
            held[user] = tuple(_held(place, text) for place, text in enumerate(texts))
        persons[user] = replace(
            person_record.unpack(record or None),
            lock=Lock(
                TenantId(int(tenant)) if tenant else None,
                moment(second, fraction) if change else NEVER,
            ),
            is_unlocked=kind == Kind.UNLOCKED.value,
            held=tuple(one.message for one in held.get(user, ())),
        )
        if other:
            other_ids[user] = UserId(other)
        if other and is_lid(user):
            # A LID that lost its phone has itself in its place.
            phone = None if other == user else UserId(other)
            pairs[user] = Pair(user, phone, float(rest[0]))
    return Facts(Known(persons, pairs), held, other_ids)


def with_lock_changes(facts: Facts, changes: Mapping[UserId, Iterable[LockChange]]) -> Facts:
    persons = {
        user: replace(one, lock_changes=tuple(changes.get(user, ())))
        for user, one in facts.known.persons.items()
    }
    return replace(facts, known=replace(facts.known, persons=persons))


def _held(place: int, text: str) -> Held:
    entry = orjson.loads(text)
    second, fraction = entry["sent"]
    content = {name: entry[name] for name in CONTENT}
    message = HeldMessage(place, entry["key"], moment(second, fraction), float(entry["arrived"]))
    return Held(text, entry["body_id"], message, content)


CONTENT = ("event_time", "arrived", "key", "message_id", "headers")


def moment(second: str, fraction: str) -> Moment:
    return Moment(int(float(second)), float(fraction))


def packed_moment(moment: Moment) -> list[str]:
    return [str(moment.second), repr(moment.fraction)]


def copies(seen: str) -> Iterable[Copy]:
    for entry in filter(None, seen.split(";")):
        phone, lid, routed = entry.split(",")
        yield Copy(PersonHash(signed(phone), signed(lid)), routed == "1")


def copy_text(copy: Copy) -> str:
    """The reverse of copies(), for one."""
    phone, lid = map(hexed, copy.person)
    return f";{phone},{lid},{int(copy.routed)}"


def hexed(hashed: int) -> str:
    """A hash of domain/dedup.py as Redis has it: 16 hex digits, empty for none."""
    return (hashed % 2**64).to_bytes(8, "big").hex() if hashed else ""


def signed(hashed: str) -> int:
    """The reverse of hexed()."""
    return int.from_bytes(bytes.fromhex(hashed), "big", signed=True) if hashed else 0
