"""What every store promises. Callers know nothing else of it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from gateway.domain.lock_events import LockEvent
from gateway.domain.model import (
    ALL_TENANTS,
    Accepted,
    Backlog,
    DeadLetter,
    Decide,
    Delivery,
    DryRun,
    Erased,
    Export,
    Health,
    HistoryEntry,
    IdentityLink,
    InboundMessage,
    Lock,
    Outcome,
    PersonSummary,
    Selection,
    TenantFilter,
    TenantId,
    Totals,
    Unreadable,
    UnreadableReason,
    UserId,
)
from gateway.domain.person import Rules

T = TypeVar("T")
OnLockEvent = Callable[[LockEvent], None]


@dataclass(frozen=True, slots=True)
class Limits(Rules):
    """Above these the store refuses messages, leaves them waiting, or forgets; with the rules that
    it asks."""

    max_in_flight: int = 256
    max_in_flight_per_tenant: int = 32
    max_backlog: int = 1_000_000
    max_backlog_per_tenant: int = 100_000
    min_free_disk_bytes: int = 512 * 1024 * 1024


UNREADABLE_SECONDS = 48 * 3600.0  # as long as WAHA's repeats of a message are known
DECRYPTION_SECONDS = 60.0  # before that a message whose content is missing is no news
MAX_UNREADABLE = 10_000
MAX_UNREADABLE_BYTES = 64 * 1024 * 1024
TOLERANCE_SECONDS = 2.0  # that a time may lie in the future: by WhatsApp's clock, not ours
DROPPED_BY_UNLOCK = "dropped by an operator's unlock"  # why it is a dead letter
_HISTORY_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class LocksPage:
    """Some locks in the order of their user ids. next: pass it as `after` for more, if not None."""

    locks: Mapping[UserId, TenantId]
    next: UserId | None


class Store(Protocol):
    """Locks and deliveries, changed together or not at all.

    Deliveries of one user to one tenant are a queue: ordered by event time, then arrival. A claimed
    delivery holds back the later ones of its own queue, and of no other.
    Every method that says `durable` raises StoreUnavailable when it cannot promise that; then
    nothing was kept, but perhaps which LID is which phone.
    """

    async def accept(self, message: InboundMessage, decide: Decide) -> Accepted:
        """Keep message and what decide says of it, in one commit; durable on return.

        decide is given the person's lock as it is at the commit. It is pure, and is asked again
        if the lock changes before that. Accepted.decision is None when the message was seen before:
        that, too, is said only after the first copy is durable.
        AskForLink with hold keeps the message aside for hold_seconds. It joins its queue, in the
        order of events, when a link of the person that was sent before it is accepted; what was
        said before the link never does.
        AskForLink with help keeps a help message to be sent, unless one waits or one went to the
        person within help_cooldown.
        Both ids of a person, where message shows them, are linked on the way: the newer pair
        wins, the lock follows the LID, and of two locks the newer one stays.
        Lock changes are in the mappings file on return, or soon after (see FileStore).
        """

    async def are_known(self, messages: Sequence[InboundMessage]) -> list[bool]:
        """Of each whether accept() would call it seen before; nothing is written."""

    async def dry_run(self, message: InboundMessage, decide: Decide) -> DryRun:
        """What accept() would do now; nothing is kept."""

    async def link_identity(self, identity_link: IdentityLink) -> None:
        """Keep which LID is which phone, as accept() does on the way; durable."""

    async def add_unreadable(self, message: InboundMessage, reason: UnreadableReason) -> None:
        """Keep a message that goes to nobody for UNREADABLE_SECONDS; durable. The newest
        MAX_UNREADABLE are kept. One that was NOT_DECRYPTED goes when its content is accepted."""

    async def unreadable(self, *, limit: int, before: int | None = None) -> list[Unreadable]:
        """Up to limit of them, newest first, with ids below `before`."""

    async def held_lids(self) -> list[UserId]:
        """LIDs without a phone of which messages are held, at most 10,000, the newest first."""

    async def claim(
        self,
        limit: int,
        *,
        wait: float,
        probe: TenantFilter | None = None,
    ) -> list[Delivery]:
        """Up to limit heads of queues that are due; ours until settled. [] after wait seconds.

        The next slot goes to the tenant with the fewest in flight, then to the one served longest
        ago, then to the oldest head. They are of tenants that set_claimable() named. With probe it
        is one delivery, of that of these tenants which was probed longest ago. A claim ends with
        the process.
        """

    def set_claimable(self, tenants: TenantFilter, changed: Collection[TenantId] | None) -> None:
        """Claim for these tenants from now on. changed: the only ones for whom that is new; None:
        any may be. tenants.named may change, if changed says so each time."""

    async def waits(self, tenants: TenantFilter) -> bool:
        """Whether any delivery of these tenants waits or is in flight."""

    def may_send(self, delivery: Delivery) -> bool:
        """Whether a claimed delivery is still ours; to be asked right before each sending."""

    async def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Say what became of a claimed delivery; durable. Its queue goes on."""

    async def make_due(
        self, tenants: TenantFilter = ALL_TENANTS, *, without_poison: bool = False
    ) -> None:
        """Whatever of these tenants waits for a backoff is due now; durable, not in one step.

        without_poison: only what has no attempt counted against it.
        """

    async def lock_of(self, user: UserId) -> tuple[UserId, Lock]:
        """The id under which the person is stored, and the lock; either id finds it."""

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        """Take the lock away, durable; who it was, the tenant (None: there was no lock), how many
        messages were dropped.

        drop_waiting: what waits of the user and was not in flight becomes dead letters. at: when
        that was decided, Unix seconds by WhatsApp's clock; None: now by the store's.
        """

    async def lock(
        self, user: UserId, tenant: TenantId, *, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        """Lock the user to tenant or move the user there, durable; who it is, the tenant before
        (None: there was no lock), how many held messages go to tenant now. at: as unlock().

        What already waits is delivered where it was to go.
        """

    async def move(
        self,
        old: TenantId,
        new: TenantId,
        *,
        with_waiting: bool = True,
        at: float | None = None,
    ) -> tuple[int, int]:
        """All users locked to old are locked to new, in one durable step; how many they are, and
        how many waiting messages went along.

        with_waiting: what waits for old and was never attempted goes to new, key and order kept.
        at: as unlock().
        """

    async def users_of(
        self, tenant: TenantId, limit: int, after: UserId | None
    ) -> tuple[list[UserId], UserId | None]:
        """Up to limit users locked to tenant whose ids come after `after`; the last if there are
        more, else None."""

    async def tenant_totals(self) -> dict[TenantId, Totals]:
        """Of every tenant that has or had anything. A crash forgets the last seconds of
        `delivered`, `first_seen` and `last_seen`."""

    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]:
        """Up to limit entries of the person, under either id, newest first, with ids below
        `before`."""

    def now(self) -> float:
        """What time it is by the store's clock, Unix seconds: the one clock by which things are due
        and come to an end."""

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        """Nothing is held of the person any more, durable; the ids that were known of it, first the
        one it was stored under.

        What is in flight cannot be called back, but nothing more comes of it. Entries of the
        history stay without id, message and reason, and one more says that somebody was erased.
        Dedup keys stay: they hold hashes.
        """

    async def export(self, user: UserId) -> Export:
        """All that is held of the person."""

    async def summary(self, user: UserId, *, limit: int) -> PersonSummary:
        """What is held of the person, with at most limit messages."""

    async def dead_letters(
        self, which: Selection, *, limit: int, before: int | None = None
    ) -> list[DeadLetter]:
        """Up to limit of them without bodies, newest first, with ids below `before`."""

    async def dead_letter(self, id_: int) -> DeadLetter | None:
        """One, with its body."""

    async def replay(self, which: Selection) -> int:
        """Put dead letters back into their queues, as of now; durable. How many.

        They keep their keys; what counts against them and their age start again.
        """

    async def delete_dead_letters(self, which: Selection) -> int:
        """Delete dead letters for good; durable. How many."""

    async def help_waits(self) -> list[tuple[UserId, float]]:
        """To whom a help message is to be sent, and since when, Unix seconds; the oldest first.

        After HELP_SECONDS it no longer waits.
        """

    async def begin_help(self, user: UserId) -> UserId | None:
        """The id to send it to, if the help message for user waits and there is still no lock.

        From then on, durable, it counts as sent: if we die, the person rather gets none than two.
        """

    async def undo_help(self, user: UserId, *, retry: bool) -> None:
        """What began was surely not sent; it waits again, or else nothing is known of it."""

    def totals(self) -> tuple[int, int]:
        """How many users have a lock, and at how many tenants."""

    async def locks(self, limit: int, after: UserId | None) -> LocksPage:
        """Up to limit locks whose user ids come after `after`."""

    async def backlog(self) -> Backlog: ...

    async def back_up(self) -> Path:
        """Write a consistent copy of all into a folder of its own, durable, while webhooks go on;
        where. The next one replaces it.

        Raise NoBackUp if another is under way, the disk has no room, or the store is backed up by
        other means.
        """

    async def note_heard(self, times: Mapping[str, float]) -> None:
        """Up to when messages of each WAHA session were accepted, Unix seconds; an earlier time
        than the one that is known changes nothing. Durable."""

    async def heard(self) -> dict[str, float]:
        """Return what note_heard() noted."""

    def health(self) -> Health: ...

    async def close(self) -> None:
        """Finish what was begun and let go of everything."""


def backlog_refusal(limits: Limits, waiting: int, tenant: TenantId, of_tenant: int) -> str | None:
    """Return why no more can wait for tenant, None if it can. of_tenant: of all that waits."""
    if waiting >= limits.max_backlog:
        return f"{waiting} messages wait, MAX_BACKLOG={limits.max_backlog}"
    if of_tenant >= limits.max_backlog_per_tenant:
        return (
            f"{of_tenant} messages of tenant {tenant} wait, "
            f"MAX_BACKLOG_PER_TENANT={limits.max_backlog_per_tenant}"
        )
    return None


class HasHistory(Protocol):
    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]: ...


async def whole_history(store: HasHistory, user: UserId) -> list[HistoryEntry]:
    """All of it, newest first, page by page: a person may have tens of thousands of entries."""
    entries: list[HistoryEntry] = []
    before: int | None = None
    while some := await store.history(user, limit=_HISTORY_AT_ONCE, before=before):
        entries += some
        before = some[-1].id
    return entries


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """All of them, so many at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
