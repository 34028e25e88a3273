"""One WhatsApp person: what becomes of a message, of two ids that turn out to be one person, of an
operator's decision, and of what was held.

Values in, changes out. A store loads what is Known of the ids concerned, calls one of these
functions, and applies the changes in their order, in one commit. It knows how to store things, and
none of the rules on this page.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.domain import dedup
from gateway.domain.dedup import Copy, Found, PersonHash
from gateway.domain.lock_events import Kind, LockEvent, Why
from gateway.domain.model import (
    NEVER,
    Accepted,
    AskForLink,
    Bind,
    Decide,
    Decision,
    DedupKey,
    DeliveryContent,
    IdentityLink,
    InboundMessage,
    LinkNote,
    Lock,
    Moment,
    Note,
    TenantId,
    UserId,
    is_lid,
    request_id,
)

HELP_SECONDS = 600.0  # a help message that could not be sent by then would only confuse

# --- what is known


@dataclass(frozen=True, slots=True)
class Pair:
    """Which phone a LID is. phone None: it lost its phone to another LID. at: Unix seconds."""

    lid: UserId
    phone: UserId | None
    at: float


@dataclass(frozen=True, slots=True)
class HeldMessage:
    """A message that waits for its user's link. id: the store's."""

    id: int
    idempotency_key: str
    sent: Moment
    arrived: float


@dataclass(frozen=True, slots=True)
class Help:
    """A help message. sent_at None: it waits. Unix seconds."""

    queued_at: float
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class LockChange:
    """A change of a lock in the past. order: a later change has a larger one."""

    changed: Moment
    order: int
    tenant: TenantId | None


@dataclass(frozen=True, slots=True)
class Person:
    """What is stored under one id, as far as the rules ask for it.

    is_unlocked: the last change of the lock was an operator's unlock. lock_changes: all there were,
    in any order; needed only where something is held.
    """

    lock: Lock = field(default=Lock(None, NEVER))
    is_unlocked: bool = False
    held: tuple[HeldMessage, ...] = ()
    lock_changes: tuple[LockChange, ...] = ()
    help: Help | None = None

    @property
    def help_times(self) -> tuple[float, float | None] | None:
        """When a help message was queued, and sent."""
        return (self.help.queued_at, self.help.sent_at) if self.help else None


NOBODY = Person()


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the ids concerned: ids_to_load() says which those are."""

    persons: Mapping[UserId, Person]
    pairs: Mapping[UserId, Pair]  # by LID
    seen: tuple[Copy, ...] = ()  # what came under the message's dedup key before

    def person(self, user: UserId) -> Person:
        return self.persons.get(user, NOBODY)

    def phone_of(self, lid: UserId) -> UserId | None:
        pair = self.pairs.get(lid)
        return pair.phone if pair else None

    def lid_of(self, phone: UserId) -> UserId | None:
        return next((pair.lid for pair in self.pairs.values() if pair.phone == phone), None)

    def ids_of(self, user: UserId) -> tuple[UserId, UserId | None]:
        """Return the id that the person is stored under, and the other one if it is known."""
        if is_lid(user):
            phone = self.phone_of(user)
            return (phone, user) if phone else (user, None)
        return user, self.lid_of(user)


def ids_to_load(
    ids: Iterable[UserId],
    pair_of_lid: Callable[[UserId], Pair | None],
    pair_of_phone: Callable[[UserId], Pair | None],
) -> tuple[set[UserId], dict[UserId, Pair]]:
    """Return every id that a message or an action of these ids may concern, and the pairs among
    them: other ids of the same persons, and the LID that had the phone before."""
    all_ids, pairs = set(ids), dict[UserId, Pair]()
    for user in ids:
        pair = pair_of_lid(user) if is_lid(user) else pair_of_phone(user)
        if pair:
            pairs[pair.lid] = pair
            all_ids |= {pair.lid, pair.phone} if pair.phone else {pair.lid}
    return all_ids, pairs


# --- what is to be changed


@dataclass(frozen=True, slots=True)
class PairIds:
    """Store the pair in place of what is known of its LID. Nobody else has its phone now."""

    pair: Pair


@dataclass(frozen=True, slots=True)
class SetLock:
    user: UserId
    tenant: TenantId | None


@dataclass(frozen=True, slots=True)
class RecordEvent:
    """Add to the history. From then on event.changed, if there is one, is when the lock of its user
    was changed last."""

    event: LockEvent


@dataclass(frozen=True, slots=True)
class RenameUser:
    """What waits, is held or was given up on under old is new's; deliveries show alias."""

    old: UserId
    new: UserId
    alias: UserId | None


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """Store what else is known of user: see store/person_record.py."""

    user: UserId
    person: Person


@dataclass(frozen=True, slots=True)
class MarkSeen:
    """Remember that a message came under key. at: Unix seconds."""

    key: DedupKey
    sent: Copy
    at: float


@dataclass(frozen=True, slots=True)
class AddDelivery:
    """Queue content for tenant."""

    user: UserId
    alias: UserId | None
    tenant: TenantId
    content: DeliveryContent


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep content aside. sent: when the user sent it."""

    user: UserId
    sent: Moment
    content: DeliveryContent


@dataclass(frozen=True, slots=True)
class ReleaseHeld:
    """Queue a held message for tenant; it is held no longer."""

    user: UserId
    held: HeldMessage
    alias: UserId | None
    tenant: TenantId


@dataclass(frozen=True, slots=True)
class DropHeld:
    """Hold nothing of user any more."""

    user: UserId


@dataclass(frozen=True, slots=True)
class ForgetHeld:
    """Hold the messages of that key no longer, under any id."""

    idempotency_key: str


@dataclass(frozen=True, slots=True)
class ForgetUser:
    """Delete all that is stored under user but its lock and history."""

    user: UserId


@dataclass(frozen=True, slots=True)
class RewriteEvent:
    """Store after in place of the entry of the history with that id."""

    id: int
    before: LockEvent
    after: LockEvent


Change = (
    PairIds
    | SetLock
    | RecordEvent
    | RenameUser
    | UpdateRecord
    | MarkSeen
    | AddDelivery
    | Hold
    | ReleaseHeld
    | DropHeld
    | ForgetHeld
    | ForgetUser
    | RewriteEvent
)


@dataclass(frozen=True, slots=True)
class Changed:
    """The changes, and what is known once they are applied."""

    changes: tuple[Change, ...]
    known: Known

    @property
    def events(self) -> tuple[LockEvent, ...]:
        return tuple(one.event for one in self.changes if isinstance(one, RecordEvent))

    @property
    def released(self) -> int:
        """How many held messages are delivered."""
        return sum(isinstance(one, ReleaseHeld) for one in self.changes)


# --- the rules


@dataclass(frozen=True, slots=True)
class Rules:
    """hold_seconds: how long a message without a lock waits for its link; 0: not at all.
    help_cooldown: seconds between two help messages to one person."""

    hold_seconds: float = 900.0
    max_held_per_user: int = 20
    help_cooldown: float = 604_800.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a message. accepted is None if it is refused: refused says why.

    user and lock: who the person is, and where it belonged when that was decided.
    """

    user: UserId
    lock: Lock
    changed: Changed
    accepted: Accepted | None
    refused: str | None = None


def accept(
    known: Known,
    message: InboundMessage,
    decide: Decide,
    *,
    refusal: Callable[[TenantId], str | None],
    rules: Rules,
    now: float,
) -> Outcome:
    """Return what becomes of a person's message.

    refusal: why no more can wait for a tenant, None if it can.
    """
    draft = _Draft(known, now, rules.hold_seconds)
    user, alias = _identify(draft, message)
    before = draft.person(user).lock

    key, found = message.idempotency_key, Found.NOTHING
    whose = PersonHash.of(None if is_lid(user) else user, user if is_lid(user) else alias)
    if message.dedup_key:
        found = dedup.find(known.seen, whose, for_one_person=message.dedup_key.twins)
        if found is Found.THIS_ONE:
            return Outcome(user, before, draft.changed(), Accepted(user, None))
        if found is Found.ANOTHERS:
            key = dedup.key_of_another(key, user)

    decision = decide(before)
    if not isinstance(decision, AskForLink) and (reason := refusal(decision.tenant)):
        return Outcome(user, before, draft.changed(), None, refused=reason)
    _record_decision(draft, message, user, before, decision)

    help_waits = False
    if isinstance(decision, AskForLink):
        if decision.hold and rules.hold_seconds:
            content = DeliveryContent.of(message, key)
            draft.hold(user, message.sent, content, most=rules.max_held_per_user)
        help_waits = decision.help and _queue_help(draft, user, rules.help_cooldown)
    else:
        if found is Found.UNROUTED:
            draft.forget_held(user, key)  # it was held when it came first
        content = DeliveryContent.of(message, key)
        draft.add(AddDelivery(user, alias, decision.tenant, content))
    if isinstance(decision, Bind):
        # What was written before the link stays with nobody.
        draft.release(user, lambda held: decision.tenant if held.sent >= message.sent else None)
    # Last: a store that fails half-way must not take the next copy for one that came before.
    if message.dedup_key:
        copy = Copy(whose, routed=not isinstance(decision, AskForLink))
        draft.add(MarkSeen(message.dedup_key, copy, message.arrived))
    return Outcome(user, before, draft.changed(), Accepted(user, decision, help_waits))


def link_identity(known: Known, link: IdentityLink, *, hold_seconds: float, now: float) -> Changed:
    """Return what follows from a LID and a phone being one person."""
    draft = _Draft(known, now, hold_seconds)
    _link(draft, link)
    return draft.changed()


def lock(
    known: Known,
    user: UserId,
    tenant: TenantId,
    *,
    at: float | None,
    hold_seconds: float,
    now: float,
) -> tuple[UserId, TenantId | None, Changed]:
    """Return who is locked, to whom before, and the changes, when an operator locks user to tenant.

    at: when that was decided, by WhatsApp's clock; None: now.
    """
    draft = _Draft(known, now, hold_seconds)
    user, _ = draft.ids_of(user)
    before = draft.person(user).lock.tenant
    kind = Kind.LOCKED if before in (None, tenant) else Kind.MOVED
    _decide_lock(draft, user, tenant, kind, Why.OPERATOR, at)
    draft.release(user, lambda _: tenant)
    return user, before, draft.changed()


def unlock(
    known: Known, user: UserId, *, at: float | None, now: float
) -> tuple[UserId, TenantId | None, Changed]:
    """Return who is unlocked, from whom (None: there was no lock), and the changes.

    at: as lock().
    """
    draft = _Draft(known, now, 0.0)
    user, _ = draft.ids_of(user)
    before = draft.person(user).lock.tenant
    if before is not None:
        _decide_lock(draft, user, None, Kind.UNLOCKED, Why.OPERATOR, at)
    return user, before, draft.changed()


def move(known: Known, user: UserId, tenant: TenantId, *, at: float | None, now: float) -> Changed:
    """Return the changes when an operator moves all users of a tenant, this one among them."""
    draft = _Draft(known, now, 0.0)
    _decide_lock(draft, user, tenant, Kind.MOVED, Why.TENANT_MOVE, at)
    return draft.changed()


def erase(
    known: Known, user: UserId, entries: Mapping[int, LockEvent], *, nobody: UserId, now: float
) -> tuple[tuple[UserId, ...], Changed]:
    """Return the ids that were known of the person, and the changes, when an operator erases it.

    entries: by id, the history of these ids, and of all users whose history names one of them. What
    is the person's becomes nobody's, and counts as a change of a lock no longer.
    """
    ids = tuple(one for one in known.ids_of(user) if one)
    changes: list[Change] = [SetLock(one, None) for one in ids if known.person(one).lock.tenant]
    changes += map(ForgetUser, ids)
    # Who turned out to be this person was this person up to then.
    until = {
        one.user: id_
        for id_, one in sorted(entries.items())
        if one.why is Why.MERGED_INTO and one.other in ids
    }
    is_recorded = False
    for id_, one in entries.items():
        if one.user in ids or id_ <= until.get(one.user, 0):
            after = LockEvent(one.at, nobody, one.kind, one.from_tenant, one.to_tenant, None, None)
            is_recorded = True
        elif one.other in ids:
            after = replace(one, other=None, message_id=None)
        else:
            continue
        changes.append(RewriteEvent(id_, one, after))
    if is_recorded:
        event = LockEvent(now, nobody, Kind.ERASED, None, None, None, Why.OPERATOR)
        changes.append(RecordEvent(event))
    persons = {one: known.person(one) for one in known.persons.keys() - set(ids)}
    for former in until.keys() & persons.keys():
        left = [one for id_, one in entries.items() if one.user == former and id_ > until[former]]
        newest = max((one.changed for one in left if one.changed), default=NEVER)
        lock_left = replace(persons[former].lock, changed=newest)
        persons[former] = replace(persons[former], lock=lock_left)
    pairs = {lid: one for lid, one in known.pairs.items() if not {lid, one.phone} & set(ids)}
    return ids, Changed(tuple(changes), Known(persons, pairs))


def begin_help(known: Known, user: UserId, *, now: float) -> tuple[UserId | None, Changed]:
    """Return whom to send the help message to, if one waits and the person still has no lock.

    From then on it counts as sent: if we die, the person rather gets none than two.
    """
    draft = _Draft(known, now, 0.0)
    user, _ = draft.ids_of(user)
    person = draft.person(user)
    if person.lock.tenant is not None:
        draft.set_help(user, None)
        return None, draft.changed()
    waits = person.help and person.help.sent_at is None
    if not (person.help and waits and person.help.queued_at > now - HELP_SECONDS):
        return None, draft.changed()
    draft.set_help(user, replace(person.help, sent_at=now))
    return user, draft.changed()


def undo_help(known: Known, user: UserId, *, retry: bool) -> Changed:
    """Return the changes when a help message was surely not sent; retry: it waits again."""
    draft = _Draft(known, 0.0, 0.0)
    person = draft.person(user)
    # Known by another id since: that one's may be a message that was sent.
    if person.help and draft.ids_of(user)[0] == user:
        draft.set_help(user, replace(person.help, sent_at=None) if retry else None)
    return draft.changed()


def _decide_lock(
    draft: "_Draft", user: UserId, tenant: TenantId | None, kind: Kind, why: Why, at: float | None
) -> None:
    """Set the lock by an operator's decision, made at that time; None: now."""
    before = draft.person(user).lock
    decided = Moment.of(draft.now if at is None else at)
    draft.set_lock(user, tenant)
    # No earlier than what it undoes: a clock that went back must not bring that back.
    draft.record(user, kind, before.tenant, tenant, changed=max(decided, before.changed), why=why)


def _identify(draft: "_Draft", message: InboundMessage) -> tuple[UserId, UserId | None]:
    """Return the id to store the person under, and the other one; apply what message shows."""
    if link := message.identity_link:
        _link(draft, link)
    shown = message.lid or message.phone
    assert shown is not None, "only a person's message is accepted"
    user, alias = draft.ids_of(shown)
    if alias and draft.person(alias).lock.tenant:  # a file from elsewhere may have the lock there
        _merge(draft, alias, user, message.message_id)
    return user, alias


def _record_decision(
    draft: "_Draft", message: InboundMessage, user: UserId, lock: Lock, decision: Decision
) -> None:
    changed: Moment | None
    kind: Kind | Note
    if isinstance(decision, Bind):
        draft.set_lock(user, decision.tenant)
        kind = Kind.LOCKED if lock.tenant is None else Kind.MOVED
        to_tenant, changed = decision.tenant, message.sent
    elif isinstance(link := decision.link, LinkNote):
        kind, to_tenant = link.note, link.tenant
        changed = message.sent if link.note is Note.CONFIRMED else None
    else:
        return
    draft.record(
        user,
        kind,
        lock.tenant,
        to_tenant,
        changed=changed,
        why=Why.LINK,
        at=message.arrived,
        message_id=message.message_id,
        request_id=request_id(message.headers),
    )


def _link(draft: "_Draft", link: IdentityLink) -> None:
    """Pair LID and phone: the newer link wins, and the lock follows the LID."""
    before = draft.pairs.get(link.lid)
    if before and before.phone == link.phone:
        return
    owner = draft.pair_of_phone(link.phone)
    if any(pair and link.at < pair.at for pair in (before, owner)):
        return

    asked = "waha" if link.asked else None
    if owner:  # the number changed hands: who had it is known by LID only
        # The time stays: an older link that comes late must not win.
        draft.pair(replace(owner, phone=None))
        _merge(draft, link.phone, owner.lid, link.message_id, who=asked)
    draft.pair(Pair(link.lid, link.phone, link.at))
    if before and before.phone:
        _merge(draft, before.phone, link.phone, link.message_id, who=asked)
    _merge(draft, link.lid, link.phone, link.message_id, who=asked)


def _merge(
    draft: "_Draft", old: UserId, new: UserId, message_id: str | None, who: str | None = None
) -> None:
    """Store under new, from now on, all that is stored under old."""
    was, is_ = draft.person(old), draft.person(new)
    changed = max(was.lock.changed, is_.lock.changed)
    # What was decided for either id counts, and the newer decision wins: a lock, or an unlock.
    decided = [one.lock for one in (is_, was) if one.lock.tenant is not None or one.is_unlocked]
    stays = max(decided, key=lambda lock: lock.changed).tenant if decided else None
    had_lock = was.lock.tenant is not None
    # An unlock that won goes on to count: a third id with an older lock may yet turn out to be
    # the same person.
    kind = Kind.UNLOCKED if decided and stays is None else Kind.MERGED

    if had_lock:
        draft.set_lock(old, None)
        draft.record(
            old,
            Kind.MERGED,
            was.lock.tenant,
            None,
            changed=changed,
            why=Why.MERGED_INTO,
            other=new,
            who=who,
            message_id=message_id,
        )
    if stays != is_.lock.tenant:
        draft.set_lock(new, stays)
    if had_lock or changed > is_.lock.changed:
        draft.record(
            new,
            kind,
            is_.lock.tenant,
            stays,
            changed=changed,
            why=Why.MERGED_FROM,
            other=old,
            who=who,
            message_id=message_id,
        )

    draft.rename(old, new)
    if stays is not None:  # what was held was a person's with a lock, only we did not know
        changes = [*draft.person(old).lock_changes, *draft.person(new).lock_changes]
        draft.release(new, lambda held: _tenant_at(changes, held.sent))


def _tenant_at(changes: Iterable[LockChange], moment: Moment) -> TenantId | None:
    """Return where a person belonged then."""
    before = [one for one in changes if one.changed <= moment]
    return max(before, key=lambda one: (one.changed, one.order)).tenant if before else None


def _queue_help(draft: "_Draft", user: UserId, cooldown: float) -> bool:
    """Queue a help message unless one waits or one was sent lately; return whether it is queued."""
    if known := draft.person(user).help:
        at, seconds = (
            (known.queued_at, HELP_SECONDS) if known.sent_at is None else (known.sent_at, cooldown)
        )
        # A clock that was ahead must not silence us for longer than that.
        if abs(draft.now - at) < seconds:
            return False
    draft.set_help(user, Help(draft.now))
    return True


class _Draft:
    """What is known, as the rules change it, and the changes so far."""

    __slots__ = ("_changes", "_held_since", "_known", "_order", "now")

    def __init__(self, known: Known, now: float, hold_seconds: float) -> None:
        self.now = now
        self._known = known  # replaced at each change: mostly there is none
        self._held_since = now - hold_seconds
        self._order = 0
        self._changes: list[Change] = []

    def changed(self) -> Changed:
        return Changed(tuple(self._changes), self._known)

    @property
    def pairs(self) -> Mapping[UserId, Pair]:
        return self._known.pairs

    def person(self, user: UserId) -> Person:
        return self._known.person(user)

    def ids_of(self, user: UserId) -> tuple[UserId, UserId | None]:
        return self._known.ids_of(user)

    def pair_of_phone(self, phone: UserId) -> Pair | None:
        return next((pair for pair in self.pairs.values() if pair.phone == phone), None)

    def _put(self, user: UserId, person: Person) -> None:
        self._known = replace(self._known, persons={**self._known.persons, user: person})

    def add(self, change: Change) -> None:
        self._changes.append(change)

    def pair(self, pair: Pair) -> None:
        self._known = replace(self._known, pairs={**self._known.pairs, pair.lid: pair})
        self.add(PairIds(pair))

    def set_lock(self, user: UserId, tenant: TenantId | None) -> None:
        person = self.person(user)
        self._put(user, replace(person, lock=replace(person.lock, tenant=tenant)))
        self.add(SetLock(user, tenant))

    def record(
        self,
        user: UserId,
        kind: Kind | Note,
        from_tenant: TenantId | None,
        to_tenant: TenantId | None,
        *,
        changed: Moment | None,
        why: Why,
        at: float | None = None,
        who: str | None = None,
        other: UserId | None = None,
        message_id: str | None = None,
        request_id: str | None = None,
    ) -> None:
        if changed is not None:
            person, self._order = self.person(user), self._order + 1
            change = LockChange(changed, _LATER_THAN_STORED + self._order, to_tenant)
            self._put(
                user,
                replace(
                    person,
                    lock=replace(person.lock, changed=changed),
                    is_unlocked=kind is Kind.UNLOCKED,
                    lock_changes=(*person.lock_changes, change),
                ),
            )
        self.add(
            RecordEvent(
                LockEvent(
                    self.now if at is None else at,
                    user,
                    kind,
                    from_tenant,
                    to_tenant,
                    changed,
                    why,
                    who,
                    other,
                    message_id,
                    request_id,
                )
            )
        )

    def hold(self, user: UserId, sent: Moment, content: DeliveryContent, *, most: int) -> None:
        person = self.person(user)
        if len(person.held) < most:
            key, arrived = content.idempotency_key, content.arrived
            held = HeldMessage(_NOT_STORED_YET, key, sent, arrived)
            self._put(user, replace(person, held=(*person.held, held)))
            self.add(Hold(user, sent, content))

    def forget_held(self, user: UserId, key: str) -> None:
        person = self.person(user)
        left = tuple(held for held in person.held if held.idempotency_key != key)
        self._put(user, replace(person, held=left))
        self.add(ForgetHeld(key))  # it may be held under an id that nobody connects with user

    def release(self, user: UserId, tenant_of: Callable[[HeldMessage], TenantId | None]) -> None:
        """Queue what is held of user and not too old for the tenants that tenant_of returns; what
        has none is dropped."""
        person = self.person(user)
        if not person.held:
            return
        _, alias = self.ids_of(user)
        keys = set[str]()  # a copy may be held that came under the other id
        for held in person.held:
            if held.arrived <= self._held_since or held.idempotency_key in keys:
                continue
            if (tenant := tenant_of(held)) is not None:
                keys.add(held.idempotency_key)
                self.add(ReleaseHeld(user, held, alias, tenant))
        self._put(user, replace(person, held=()))
        self.add(DropHeld(user))

    def set_help(self, user: UserId, help_: Help | None) -> None:
        person = replace(self.person(user), help=help_)
        self._put(user, person)
        self.add(UpdateRecord(user, person))

    def rename(self, old: UserId, new: UserId) -> None:
        was, is_ = self.person(old), self.person(new)
        _, alias = self.ids_of(new)
        self.add(RenameUser(old, new, None if is_lid(new) else alias))
        held = sorted((*was.held, *is_.held), key=lambda one: (one.arrived, one.id))
        if held:
            self._put(old, replace(was, held=()))
            self._put(new, replace(is_, held=tuple(held)))
        if was.help:
            # Of two help messages the one that was sent last counts.
            both = [was.help, is_.help] if is_.help else [was.help]
            stays = max(both, key=lambda one: (one.sent_at or 0.0, one.queued_at))
            self.set_help(old, None)
            self.set_help(new, stays)


_LATER_THAN_STORED = 2**62  # orders of changes that get their own when they are stored
_NOT_STORED_YET = 2**62
