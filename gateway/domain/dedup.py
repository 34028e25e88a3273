"""Whether a message came before: what distinguishes a copy from a new one."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from gateway.domain.model import UserId


class PersonHash(NamedTuple):
    """A person's phone and LID as hashes, 0 where one is not known: no number is stored."""

    phone: int
    lid: int

    @classmethod
    def of(cls, phone: UserId | None, lid: UserId | None) -> "PersonHash":
        return cls(_hash(phone), _hash(lid))


@dataclass(frozen=True, slots=True)
class Copy:
    """A message that came under a key before. routed: it went to a tenant."""

    person: PersonHash
    routed: bool


class Found(Enum):
    """Whose message came under a key."""

    NOTHING = auto()
    THIS_ONE = auto()
    ANOTHERS = auto()  # another person's: ids are chosen by the sender's phone
    UNROUTED = auto()  # perhaps this very one, under an id that went to no tenant


def find(before: Iterable[Copy], person: PersonHash, *, for_one_person: bool) -> Found:
    """Return whose message came before under this key.

    for_one_person: the key is unique among one person's messages only (model.DedupKey).
    """
    found = Found.NOTHING
    for sent in before:
        same = _same_person(sent.person, person) if for_one_person else True
        if same or (same is None and sent.routed):
            return Found.THIS_ONE
        if same is False:
            found = Found.ANOTHERS
        elif found is Found.NOTHING:
            found = Found.UNROUTED
    return found


def key_of_another(key: str, user: UserId) -> str:
    """Return an idempotency key for a message whose own key another person's message has used."""
    return hashlib.sha1(f"{key}|{user}".encode(), usedforsecurity=False).hexdigest()[:32]


def _same_person(one: PersonHash, other: PersonHash) -> bool | None:
    """Compare by phone, else by LID; None for a phone and a LID of which nothing else is known.

    Those count as one person, unless the first copy went to nobody: then the second may be the one
    that shows whose it is, and a message must not be lost for a guess.
    """
    pairs = list(zip(one, other, strict=True))
    if any(mine and mine == theirs for mine, theirs in pairs):
        return True
    if any(mine and theirs for mine, theirs in pairs):
        return False
    return None


@functools.lru_cache(maxsize=100_000)
def _hash(user: UserId | None) -> int:
    if user is None:
        return 0
    # Stored: another hash would make every key of the last 48 hours unknown.
    digest = hashlib.sha1(user.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
