"""The operations of base.Store that concern persons: the same in every store.

A store adds change(), which loads what is known, asks a rule of domain/person.py and applies its
changes in one commit. Nothing here knows how it does that.
"""

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from gateway.domain import dedup, person
from gateway.domain.dedup import Found, PersonHash
from gateway.domain.lock_events import LockEvent
from gateway.domain.model import (
    Accepted,
    Decide,
    DryRun,
    Erased,
    IdentityLink,
    InboundMessage,
    Lock,
    TenantId,
    UserId,
    is_lid,
)
from gateway.domain.person import Changed, Known, RewriteEvent
from gateway.errors import StoreUnavailable
from gateway.store.base import Limits, OnLockEvent

_LOADED_TOGETHER = 500  # messages

T = TypeVar("T")
Rule = Callable[[Known], tuple[T, Changed]]


class PersonOperations(ABC):
    def __init__(self, limits: Limits, on_lock_event: OnLockEvent = lambda _: None) -> None:
        """on_lock_event: called with each event that is durable, but for a tenant's move."""
        self.limits = limits
        self._on_lock_event = on_lock_event

    @abstractmethod
    async def change(
        self, ids: Sequence[UserId], rule: Rule[T], message: InboundMessage | None = None
    ) -> T:
        """Ask rule with what is known of ids, and of copies under message's dedup key; apply its
        changes in one commit; durable on return. message: what the rule is about, if it is one.

        rule is pure. It is asked again if what it was asked with no longer holds at the commit.
        """

    @abstractmethod
    async def load(self, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        """Return what change() would ask a rule with."""

    @abstractmethod
    def refusal(self, tenant: TenantId) -> str | None:
        """Return why no more can wait for tenant, None if it can; as change() sees it."""

    @abstractmethod
    def now(self) -> float: ...

    def unavailable(self, reason: str) -> StoreUnavailable:
        return StoreUnavailable(reason)

    def report(self, events: Iterable[LockEvent]) -> None:
        """A store's commit is done."""
        for event in events:
            self._on_lock_event(event)

    # messages

    async def accept(self, message: InboundMessage, decide: Decide) -> Accepted:
        def rule(known: Known) -> tuple[person.Outcome, Changed]:
            outcome = self._decide(known, message, decide)
            return outcome, outcome.changed

        outcome = await self.change(ids_in(message), rule, message)
        if outcome.accepted is None:
            raise self.unavailable(outcome.refused or "")
        return outcome.accepted

    async def dry_run(self, message: InboundMessage, decide: Decide) -> DryRun:
        known = await self.load(ids_in(message), message)
        outcome = self._decide(known, message, decide)
        accepted = outcome.accepted or Accepted(outcome.user, decide(outcome.lock))
        return DryRun(accepted, outcome.lock, outcome.changed.released, outcome.refused)

    async def are_known(self, messages: Sequence[InboundMessage]) -> list[bool]:
        async def known(message: InboundMessage) -> bool:
            if message.dedup_key is None:
                return False
            return is_known(await self.load(ids_in(message), message), message)

        found: list[bool] = []
        for start in range(0, len(messages), _LOADED_TOGETHER):
            some = messages[start : start + _LOADED_TOGETHER]
            found += await asyncio.gather(*map(known, some))
        return found

    def _decide(self, known: Known, message: InboundMessage, decide: Decide) -> person.Outcome:
        return person.accept(
            known, message, decide, refusal=self.refusal, rules=self.limits, now=self.now()
        )

    async def link_identity(self, identity_link: IdentityLink) -> None:
        def rule(known: Known) -> tuple[None, Changed]:
            hold = self.limits.hold_seconds
            return None, person.link_identity(
                known, identity_link, hold_seconds=hold, now=self.now()
            )

        await self.change((identity_link.lid, identity_link.phone), rule)

    # locks

    async def lock_of(self, user: UserId) -> tuple[UserId, Lock]:
        known = await self.load((user,))
        stored_as, _ = known.ids_of(user)
        return stored_as, known.person(stored_as).lock

    async def lock(
        self, user: UserId, tenant: TenantId, *, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        def rule(known: Known) -> tuple[tuple[UserId, TenantId | None, int], Changed]:
            hold = self.limits.hold_seconds
            locked, before, changed = person.lock(
                known, user, tenant, at=at, hold_seconds=hold, now=self.now()
            )
            return (locked, before, changed.released), changed

        return await self.change((user,), rule)

    # erasure

    def new_nobody(self) -> UserId:
        """Return the user whose the history of somebody erased is from then on."""
        return UserId(f"erased-{secrets.token_hex(8)}")

    def erased(
        self, before: Known, ids: Sequence[UserId], changed: Changed, rows: Mapping[str, int]
    ) -> Erased:
        """Return how much of whom was erased. rows: how many were deleted, by table."""
        return Erased(
            locks=sum(before.person(one).lock.tenant is not None for one in ids),
            waiting=rows["delivery"],
            held=rows["held"],
            dead_letters=rows["dead_letter"],
            aliases=rows["alias"],
            help=rows["person"],
            unreadable=rows["unreadable"],
            history=sum(
                isinstance(one, RewriteEvent) and one.after.user != one.before.user
                for one in changed.changes
            ),
        )

    # help messages

    async def begin_help(self, user: UserId) -> UserId | None:
        return await self.change(
            (user,), lambda known: person.begin_help(known, user, now=self.now())
        )

    async def undo_help(self, user: UserId, *, retry: bool) -> None:
        await self.change((user,), lambda known: (None, person.undo_help(known, user, retry=retry)))


def ids_in(message: InboundMessage) -> list[UserId]:
    """Return the ids that message itself shows."""
    return [one for one in (message.lid, message.phone) if one]


def is_known(known: Known, message: InboundMessage) -> bool:
    """Return whether message came before."""
    phone, lid = message.phone, message.lid
    if not (phone and lid):
        user, other = known.ids_of(ids_in(message)[0])
        phone, lid = (None, user) if is_lid(user) else (user, other)
    assert message.dedup_key
    whose = PersonHash.of(phone, lid)
    found = dedup.find(known.seen, whose, for_one_person=message.dedup_key.twins)
    return found is Found.THIS_ONE
