"""The nouns that travel through the gateway. Values only: no network, no disk, no clock."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, NewType

# One WhatsApp person: phone digits ("971501234567"), or "158764321000005@lid" while no phone is
# known. A WAHA session other than WAHA_SESSION comes before it: "sales/971501234567". Locks,
# queues and aliases are stored under this id, so the same person on two numbers is two users.
UserId = NewType("UserId", str)
TenantId = NewType("TenantId", int)

# WAHA raises one message under both names; which of them somebody subscribed to is not our affair.
MESSAGE_EVENTS = frozenset({"message", "message.any"})

# Of a WAHA session, as it is kept. WAHA itself allows less (SESSION_NAME_OF_WAHA), but for the call
# `/api/sessions/start`, which takes anything; what is none of these is kept by its hash.
SESSION_NAME = "[A-Za-z0-9_.:@=-](?:[A-Za-z0-9_.:@= -]{0,62}[A-Za-z0-9_.:@=-])?"
SESSION_NAME_IN_WORDS = "1-64 of A-Z a-z 0-9 _ . : @ = - and blanks between them"
SESSION_NAME_OF_WAHA = "[A-Za-z0-9_-]{1,54}"
HASHED_SESSION = "hash-"  # and a part of the name's hash
LONGEST_RETRY_AFTER = 3600.0  # seconds that a backend may ask us to wait
LARGEST_TENANT = 2_147_483_647  # backends keep the number in a signed 32-bit column


class Moment(NamedTuple):
    """When a link was sent or a lock changed; compared in this order.

    WhatsApp stamps messages in whole seconds. Within one second WAHA's envelope decides, which has
    milliseconds. Both are whole Unix times: fraction is the envelope's, with its fraction.
    """

    second: int
    fraction: float

    @classmethod
    def of(cls, time: float) -> "Moment":
        return cls(int(time), time)


NEVER = Moment(0, 0.0)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tenant's messages go, and the `whsec_…` texts that sign them; none: unsigned."""

    url: str
    secrets: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Tenant:
    """What data/tenants.json says of one. address and gateway_phone: None where all share one."""

    name: str = ""
    active: bool = True  # False: no link locks to it any more
    address: Address | None = None
    gateway_phone: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Lock:
    """Where a user belongs. tenant is None for a user who has no lock, or lost it.

    changed is when that was last decided. It outlives an unlock, so that a link sent before the
    unlock cannot undo it.
    """

    tenant: TenantId | None
    changed: Moment


class Content(Enum):
    """What an event of a message holds. Only what was SENT uses up the message's id."""

    SENT = "sent"  # by a person: text, media, a place, a card …
    PLACEHOLDER = "placeholder"  # nothing that can be read yet; the content may come under this id
    NOTICE = "notice"  # WhatsApp itself says something
    UNKNOWN = "unknown"  # of a kind that is not known, perhaps something sent


class Chat(Enum):
    """What kind of chat an event belongs to. Only a PERSON can be routed."""

    PERSON = "person"
    OWN_NUMBER = "own_number"
    GROUP = "group"
    STATUS = "status"
    NEWSLETTER = "newsletter"
    BROADCAST = "broadcast"
    NOBODY = "no_user"


@dataclass(frozen=True, slots=True)
class DedupKey:
    """What distinguishes events. twins: the same key under another chat may be the same.

    WhatsApp's message ids are chosen by the sender's phone and unique in one chat only, yet one
    message can reach us under the person's phone and again under the LID. So a message's key
    (twins=True) counts for one person, every other key for itself.
    """

    digest: bytes  # 16 bytes
    twins: bool


@dataclass(frozen=True, slots=True)
class InboundMessage:
    """One WAHA event, reduced to what routing needs, with the bytes it came in."""

    event: str
    session: str
    chat: Chat
    phone: UserId | None  # of the person in the chat, as far as this event shows
    lid: UserId | None
    own: bool  # sent by the gateway's number itself
    text: str  # what the person wrote, or "": the only place where a deep link counts
    content: Content  # of an event that is no message: SENT
    sent: Moment
    sent_is_readable: bool  # False: WAHA's time says nothing, so `sent` is our own
    stamped_at: float | None  # Unix seconds, WhatsApp's own time of it, if it has one
    event_time: float  # Unix seconds; orders a user queue
    arrived: float  # Unix seconds, our clock
    dedup_key: DedupKey | None  # None: a copy looks like a new one
    idempotency_key: str
    message_id: str | None
    session_status: str | None  # what a session.status event says, as WAHA writes it
    own_ids: frozenset[str]  # of the session's own number, unscoped; empty if the event has none
    # What an event of this name has, and this one lacks or has in no known form.
    odd_part: str | None
    unreadable: "UnreadableReason | None"  # why it goes to nobody though somebody may have sent it
    headers: tuple[tuple[str, str], ...]  # those that go on to the backend
    body: bytes

    @property
    def identity_link(self) -> "IdentityLink | None":
        """What the event shows of a person's two ids, if it shows both."""
        if not (self.phone and self.lid):
            return None
        # No time of WAHA's may rule the future.
        at = min(self.event_time, self.arrived)
        return IdentityLink(self.lid, self.phone, at, self.message_id)


@dataclass(frozen=True, slots=True)
class DeliveryContent:
    """What a backend is to get. event_time orders a user queue; times are Unix seconds."""

    event_time: float
    arrived: float
    idempotency_key: str
    message_id: str | None
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @classmethod
    def of(cls, message: InboundMessage, idempotency_key: str) -> "DeliveryContent":
        return cls(
            message.event_time,
            message.arrived,
            idempotency_key,
            message.message_id,
            message.headers,
            message.body,
        )


@dataclass(frozen=True, slots=True)
class IdentityLink:
    """lid and phone belonged to one person at that time, in Unix seconds.

    message_id: of the message that showed both. asked: it is WAHA's answer to our question.
    """

    lid: UserId
    phone: UserId
    at: float
    message_id: str | None = None
    asked: bool = False


class LockPolicy(Enum):
    """Whether a later link of another tenant moves a locked user."""

    LAST_LINK = "last_link"
    FIRST_LINK = "first_link"


class Note(Enum):
    """Why a link in a message did not change the lock; kept in the history."""

    CONFIRMED = "confirmed"  # the user's own link again: nothing changes but the time
    STALE = "stale"  # older than the last change of the lock
    QUOTED = "quoted"  # inside a sentence of a user who has a lock
    REFUSED = "refused"  # LOCK_POLICY=first_link, or a tenant that is unknown or inactive


@dataclass(frozen=True, slots=True)
class LinkNote:
    note: Note
    tenant: TenantId  # the tenant that the link named


@dataclass(frozen=True, slots=True)
class Bind:
    """Lock the user to tenant, and deliver the message there."""

    tenant: TenantId
    previous: TenantId | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Deliver to the tenant of the lock."""

    tenant: TenantId
    link: LinkNote | None = None


@dataclass(frozen=True, slots=True)
class AskForLink:
    """Nobody to deliver to: the user has no lock and sent no link that counts.

    link: one that does not, STALE or (of a tenant that is unknown or inactive) REFUSED.

    hold: keep the message a while, for a link that was sent before it may still be on its way.
    help: send the user a note about the link, if that was not done lately.
    """

    link: LinkNote | None = None
    hold: bool = False
    help: bool = False


Decision = Bind | Forward | AskForLink
Decide = Callable[[Lock], Decision]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the store made of a message. decision is None for a duplicate.

    help_waits: a help message for the user is kept, to be sent.
    """

    user: UserId
    decision: Decision | None
    help_waits: bool = False

    @property
    def outcome(self) -> str:
        """In a word: locked, moved, routed, unknown_user or duplicate."""
        match self.decision:
            case None:
                return "duplicate"
            case Bind(previous=None):
                return "locked"
            case Bind():
                return "moved"
            case Forward():
                return "routed"
            case AskForLink():
                return "unknown_user"


@dataclass(frozen=True, slots=True)
class DryRun:
    """What the store would make of a message, and on what grounds.

    refused: why it would not be accepted at all.
    """

    accepted: Accepted
    lock: Lock  # as it is now, once the ids that the message shows are linked
    released: int  # held messages that would be delivered as well
    refused: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message on its way to one tenant, as claimed from the store.

    Times are Unix seconds. attempt counts from 1 and is the one about to be made.
    """

    id: int
    tenant: TenantId
    user: UserId
    alias: UserId | None
    idempotency_key: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    attempt: int
    poison_attempts: int  # failed attempts that count against the message itself
    tried_at: float | None  # when the last attempt ended
    age: float  # seconds since the first attempt that count towards MAX_DELIVERY_AGE
    event_time: float = 0.0  # when WAHA raised the event, or it was replayed


@dataclass(frozen=True, slots=True)
class TenantFilter:
    """Some tenants: those named, or with others=True all but those."""

    named: Set[TenantId] = frozenset()
    others: bool = True

    def __contains__(self, tenant: TenantId) -> bool:
        return (tenant in self.named) != self.others

    def without(self, some: Set[TenantId]) -> "TenantFilter":
        """Those, but for some."""
        return TenantFilter(self.named | some if self.others else self.named - some, self.others)


ALL_TENANTS = TenantFilter()


@dataclass(frozen=True, slots=True)
class Delivered:
    """The backend has it."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """Not the message's turn after all: nothing is counted, it is due at once.

    sent_at: when it was sent all the same, without an answer; None: it was not.
    """

    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt failed; the user queue waits for wait seconds."""

    wait: float
    reason: str
    poison: bool
    tried_at: float
    age: float


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """Given up; a person may look at it and replay it."""

    reason: str
    died_at: float
    status: int | None = None  # the backend's last HTTP status
    answer: bytes = b""  # the first bytes of its answer


Outcome = Delivered | Requeue | Retry | DeadLettered


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery given up on. Times are Unix seconds; body is None in lists."""

    id: int
    tenant: TenantId
    user: UserId
    message_id: str | None
    idempotency_key: str
    arrived: float
    died_at: float
    attempts: int
    reason: str
    status: int | None  # of the backend's last answer
    answer: bytes  # its first bytes
    body: bytes | None


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """What was decided of a user's lock, or why a link decided nothing. at: Unix seconds."""

    id: int
    at: float
    user: UserId
    kind: str  # lock_events.Kind or Note
    from_tenant: TenantId | None
    to_tenant: TenantId | None
    message_id: str | None
    why: str | None  # lock_events.Why; None: the person was erased
    who: str | None = None  # the operator's name, or "waha"
    other: UserId | None = None  # the other id of a merge

    @property
    def cause(self) -> str | None:
        """The code with who did it: "operator:sara"."""
        return f"{self.why}:{self.who}" if self.who else self.why


@dataclass(frozen=True, slots=True)
class Totals:
    """What is known of one tenant. Times are Unix seconds, of messages accepted for it."""

    users: int = 0
    delivered: int = 0
    waiting: int = 0
    dead: int = 0
    first_seen: float | None = None
    last_seen: float | None = None


@dataclass(frozen=True, slots=True)
class Erased:
    """How much was held of a person, and is gone."""

    locks: int
    waiting: int
    held: int
    dead_letters: int
    aliases: int
    help: int
    unreadable: int
    history: int  # entries that no longer say whose they are


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message as it is kept. where: "waiting", "held", "dead_letter" or "unreadable"."""

    where: str
    tenant: TenantId | None
    arrived: float  # Unix seconds
    message_id: str | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Export:
    """All that is held of a person. ids: phone and LID, as far as they are known."""

    ids: tuple[UserId, ...]
    tenant: TenantId | None
    messages: tuple[StoredMessage, ...]
    history: tuple[HistoryEntry, ...]
    help: tuple[float, float | None] | None  # when a help message was queued, and sent


@dataclass(frozen=True, slots=True)
class PersonSummary:
    """What is held of a person, in brief. ids: phone and LID, as far as they are known; messages:
    some of them; the numbers are of all."""

    ids: tuple[UserId, ...]
    messages: tuple[StoredMessage, ...]
    waiting: int
    held: int
    dead_letters: int


class UnreadableReason(Enum):
    """Why a message goes to nobody."""

    NO_CHAT = "no_chat"  # whose it is cannot be found in it
    NOT_DECRYPTED = "not_decrypted"  # its content has not come


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that was answered 200 and went to nobody. arrived: Unix seconds; user: if known."""

    id: int
    arrived: float
    session: str
    event: str
    reason: UnreadableReason
    user: UserId | None
    message_id: str | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: all that fit every field that is not None."""

    id: int | None = None
    tenant: TenantId | None = None
    user: UserId | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits, in flight included. oldest is the arrival of the oldest, or None."""

    waiting: int
    oldest: float | None
    by_tenant: Mapping[TenantId, int]  # the largest first
    held: int = 0  # messages kept for a link
    unreadable: int = 0  # messages that went to nobody
    dead: int = 0  # dead letters; a store may stop counting at 100,000


@dataclass(frozen=True, slots=True)
class Health:
    """What the store says of itself. None means well; text names what is wrong and since when."""

    refusing: str | None  # why accept() would raise StoreUnavailable
    mappings_behind: str | None  # why the mappings file lacks changes that are durable elsewhere
    mappings_lag: float = 0.0  # seconds for which it has lacked one
    has_file: bool = True  # False: there is no mappings file
    at_risk: str | None = None  # why what is kept may be lost


def request_id(headers: Iterable[tuple[str, str]]) -> str | None:
    """WAHA's X-Webhook-Request-Id, the same at each of its repeats; None if it sent none. At most
    as much of it as a line of the log should hold."""
    return next((value[:128] for name, value in headers if name == "x-webhook-request-id"), None)


def scoped(session: str, user: str, home_session: str) -> UserId:
    """The id under which user is kept, for an event of session."""
    return UserId(user if session == home_session else f"{session}/{user}")


def unscoped(user: UserId) -> str:
    """The person's id as WhatsApp knows it."""
    return user.rpartition("/")[2]


def session_of(user: UserId, home_session: str) -> str:
    """The WAHA session that user wrote to."""
    return user.rpartition("/")[0] or home_session


def is_lid(user: UserId) -> bool:
    return user.endswith("@lid")
