"""What happened to a lock: one event for each change, and for each link that changed none.

The history, the log, the metrics and the page are made from these events, under these names.
"""

from dataclasses import dataclass
from enum import Enum

from gateway.domain.model import Moment, Note, TenantId, UserId


class Kind(Enum):
    """What became of a lock. model.Note has the names of links that changed none."""

    IMPORTED = "imported"  # it was in the file before there was a history
    LOCKED = "locked"
    MOVED = "moved"
    UNLOCKED = "unlocked"
    MERGED = "merged"  # two ids turned out to be one person
    ERASED = "erased"  # the person behind these entries was erased


def kind_of(value: str) -> Kind | Note:
    """Return the kind of that name."""
    return Note(value) if value in {note.value for note in Note} else Kind(value)


class Why(Enum):
    """What made it happen."""

    LINK = "link"  # of the user
    OPERATOR = "operator"
    TENANT_MOVE = "tenant_move"  # an operator moved all users of a tenant
    MERGED_INTO = "merged_into"  # `other` is the same person, and the id in use from then on
    MERGED_FROM = "merged_from"  # `other` is the same person, and what it had came here
    IMPORT = "import"


# What happens to locks, and why. A merge has two events, and counts once.
COUNTED = (
    (Kind.LOCKED, Why.LINK),
    (Kind.MOVED, Why.LINK),
    (Kind.LOCKED, Why.OPERATOR),
    (Kind.MOVED, Why.OPERATOR),
    (Kind.UNLOCKED, Why.OPERATOR),
    (Kind.MOVED, Why.TENANT_MOVE),
    (Kind.MERGED, Why.MERGED_FROM),
    (Kind.UNLOCKED, Why.MERGED_FROM),
    (Kind.ERASED, Why.OPERATOR),
)


@dataclass(frozen=True, slots=True)
class LockEvent:
    """at: Unix seconds, by the store's clock. changed: when the lock's change was decided, by
    WhatsApp's clock for a link; None if the lock did not change."""

    at: float
    user: UserId
    kind: Kind | Note
    from_tenant: TenantId | None
    to_tenant: TenantId | None
    changed: Moment | None
    why: Why | None  # None: the person was erased
    who: str | None = None  # the operator's name, or "waha" if WAHA was asked who a LID is
    other: UserId | None = None  # the other id of a merge
    message_id: str | None = None
    request_id: str | None = None  # of the webhook; not stored
