"""What is stored of a person besides lock, history and messages: one text, the same in every store.

A new fact of domain.person.Person that is to be stored is a field here, and nowhere else.
"""

import json
from dataclasses import replace

from gateway.domain.person import HELP_SECONDS, NOBODY, Help, Person
from gateway.store.base import Limits


def pack(person: Person) -> str | None:
    """Return the record; None if nothing is known."""
    facts: dict[str, float] = {}
    if person.help:
        facts["help_queued_at"] = person.help.queued_at
        if person.help.sent_at is not None:
            facts["help_sent_at"] = person.help.sent_at
    return json.dumps(facts) if facts else None


def unpack(record: str | bytes | None) -> Person:
    """Return a person with what pack() has put in record."""
    if not record:
        return NOBODY
    facts = json.loads(record)
    queued_at, sent_at = facts.get("help_queued_at"), facts.get("help_sent_at")
    return replace(NOBODY, help=None if queued_at is None else Help(queued_at, sent_at))


def help_waits_since(person: Person) -> float | None:
    """Return since when a help message waits for the person, Unix seconds; None if none does."""
    return person.help.queued_at if person.help and person.help.sent_at is None else None


def lifetime(limits: Limits) -> float:
    """Return for how many seconds after its last update a record counts: then it is deleted, so
    a fact that counts for longer makes it longer."""
    return max(HELP_SECONDS, limits.help_cooldown)
