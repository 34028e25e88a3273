"""The changes of domain/person.py as commands for lua/transact.lua. Keys: see facts.py."""

import secrets
from collections.abc import Iterable, Mapping, Sequence

import orjson

from gateway.domain.dedup import Copy
from gateway.domain.lock_events import LockEvent
from gateway.domain.model import DeliveryContent, TenantId, UserId
from gateway.domain.person import (
    AddDelivery,
    Change,
    DropHeld,
    ForgetHeld,
    ForgetUser,
    HeldMessage,
    Hold,
    MarkSeen,
    Pair,
    PairIds,
    Person,
    RecordEvent,
    ReleaseHeld,
    RenameUser,
    RewriteEvent,
    SetLock,
    UpdateRecord,
)
from gateway.store import person_record
from gateway.store.redis import history
from gateway.store.redis.facts import Command, Facts, Held, copy_text, packed_moment

_SEEN_SECONDS = 259_200
_AT_ONCE = 1000  # arguments of a command


class Commands:
    """The commands so far; bodies: of what they add, in one."""

    def __init__(self, facts: Facts, now: float) -> None:
        self.all: list[Command] = []
        self.bodies = bytearray()
        self._now = repr(now)
        self._known = facts.known
        # What of that is another by now.
        self._locks: dict[UserId, TenantId | None] = {}
        self._phones: dict[UserId, UserId | None] = {}
        self._held = dict(facts.held)

    def add(self, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case AddDelivery(user, alias, tenant, content):
                    texts = self._accepted(_content(content))
                    place = self.put_body(content.body)
                    self.all.append(["add", user, alias or "", str(tenant), texts, *place])
                case MarkSeen(key, copy):
                    digest, text = key.digest.hex(), copy_text(copy)
                    if not self._known.seen:
                        self.all.append(["SET", f"seen:{digest}", text, "EX", str(_SEEN_SECONDS)])
                    elif not any(one.person == copy.person for one in self._known.seen):
                        self.mark_seen(digest, copy)
                case SetLock(user, tenant):
                    self.set_lock(user, tenant)
                case RecordEvent(event):
                    self.record(event)
                case PairIds(pair):
                    self._pair(pair)
                case RenameUser(old, new, alias):
                    self.all.append(["rename", old, new, alias or ""])
                    self._rename_held(old, new)
                case UpdateRecord(user, person):
                    self._update_record(user, person)
                case Hold(user, sent, content):
                    texts = _content(content)
                    self.add_held(user, packed_moment(sent), texts, content.body)
                case ReleaseHeld(user, held, alias, tenant):
                    self._release(user, held, alias, tenant)
                case DropHeld(user):
                    self._drop_held(user)
                case ForgetHeld(idempotency_key):
                    for user in list(self._held):
                        self._take(user, idempotency_key, with_body=True)
                case ForgetUser(user):
                    self._forget(user)
                case RewriteEvent():
                    pass  # whole lists change: see rewrite_histories()

    def set_lock(self, user: UserId, tenant: TenantId | None) -> None:
        # First what takes up memory: see scripts._take_some().
        if tenant is None:
            self.all.append(["HDEL", "lock", user])
            self.all.append(["ZREM", "users", user])
        else:
            self.all.append(["HSET", "lock", user, str(tenant)])
            self.all.append(["ZADD", "users", "0", user])
        before = self._locks.get(user, self._known.person(user).lock.tenant)
        if before is not None:
            self.all.append(["ZREM", f"of:{before}", user])
            self.all.append(["count", "owners", str(before), "-1"])
        if tenant is not None:
            self.all.append(["ZADD", f"of:{tenant}", "0", user])
            self.all.append(["count", "owners", str(tenant), "1"])
        self._locks[user] = tenant

    def record(self, event: LockEvent) -> None:
        self.all.append(["append", f"h:{event.user}", "history_id", history.rest_of(event)])
        self._note(event)

    def put_entry(self, entry: history.Entry) -> None:
        """Add an entry that has its id."""
        self.all.append(["RPUSH", f"h:{entry.event.user}", entry.text])
        self._note(entry.event)

    def _note(self, event: LockEvent) -> None:
        self.note_change(event)
        if event.other:  # whose history names whom: an erasure must find it
            self.all.append(["SADD", f"named:{event.user}", event.other])
            self.all.append(["SADD", f"named:{event.other}", event.user])

    def rewrite_histories(
        self, entries: Mapping[UserId, Sequence[history.Entry]], changes: Iterable[Change]
    ) -> None:
        """Apply each RewriteEvent of changes. entries: the whole histories that they are about."""
        after = {one.id: one.after for one in changes if isinstance(one, RewriteEvent)}
        moved: dict[UserId, list[history.Entry]] = {}
        for user, some in entries.items():
            stay: list[history.Entry] = []
            for one in some:
                event = after.get(one.id, one.event)
                to = stay if event.user == user else moved.setdefault(event.user, [])
                to.append(history.Entry(one.id, event, history.text_of(one.id, event)))
            if [one.text for one in stay] != [one.text for one in some]:
                self.all += [["DEL", f"h:{user}"], ["HDEL", "change", user]]
                self._push(user, stay)
        for user, some in moved.items():
            self._push(user, sorted(some, key=lambda one: one.id))

    def _push(self, user: UserId, entries: Sequence[history.Entry]) -> None:
        texts = [one.text for one in entries]
        for start in range(0, len(texts), _AT_ONCE):
            self.all.append(["RPUSH", f"h:{user}", *texts[start : start + _AT_ONCE]])
        for one in reversed(entries):
            if one.event.changed:
                self.note_change(one.event)
                break

    def note_change(self, event: LockEvent) -> None:
        if event.changed:
            text = " ".join([*packed_moment(event.changed), event.kind.value])
            self.all.append(["HSET", "change", event.user, text])

    def _pair(self, pair: Pair) -> None:
        self.all.append(["HSET", "phone", pair.lid, pair.phone or pair.lid])
        if before := self._phones.get(pair.lid, self._known.phone_of(pair.lid)):
            self.all.append(["HDEL", "lid", before])
        self._phones[pair.lid] = pair.phone
        self.all.append(["HSET", "linked_at", pair.lid, repr(pair.at)])
        if pair.phone:
            self.all.append(["HSET", "lid", pair.phone, pair.lid])

    def _update_record(self, user: UserId, person: Person) -> None:
        if (record := person_record.pack(person)) is None:
            self.all.append(["HDEL", "person", user])
            self.all.append(["ZREM", "person_updated", user])
        else:
            self.all.append(["HSET", "person", user, record])
            self.all.append(["ZADD", "person_updated", self._now, user])
        since = person_record.help_waits_since(person)
        self.all.append(
            ["ZREM", "help_waits", user]
            if since is None
            else ["ZADD", "help_waits", repr(since), user]
        )

    def mark_seen(self, key: str, copy: Copy) -> None:
        self.all.append(["APPEND", f"seen:{key}", copy_text(copy)])
        self.all.append(["EXPIRE", f"seen:{key}", str(_SEEN_SECONDS)])

    def _accepted(self, content: dict[str, str]) -> dict[str, str]:
        content["accepted"] = self._now
        return content

    def put_body(self, body: bytes) -> tuple[int, int]:
        """Take body in; from where to where it is, as Lua counts."""
        start = len(self.bodies)
        self.bodies += body
        return start + 1, len(self.bodies)

    # held messages

    def add_held(self, user: UserId, sent: list[str], content: dict[str, str], body: bytes) -> None:
        id_ = secrets.token_hex(8)
        text = orjson.dumps({"sent": sent, **content, "body_id": id_}).decode()
        self.all.append(["RPUSH", f"held:{user}", text])
        self.all.append(["body", "held_body", id_, *self.put_body(body)])
        self.all.append(["SADD", f"holders:{content['key']}", user])
        # No later than what is there: the oldest counts.
        self.all.append(["ZADD", "held_since", "LT", content["arrived"], user])

    def _take(self, user: UserId, key: str, *, with_body: bool) -> Held | None:
        """Hold the messages of that key no longer; the last of them."""
        taken = [one for one in self._held[user] if one.message.idempotency_key == key]
        self._held[user] = tuple(one for one in self._held[user] if one not in taken)
        for one in taken:
            self.all.append(["LREM", f"held:{user}", "1", one.text])
            if with_body or one is not taken[-1]:
                self.all.append(["HDEL", "held_body", one.body])
        if taken:
            self.all.append(["SREM", f"holders:{key}", user])
            self._note_oldest(user)
        return taken[-1] if taken else None

    def _release(
        self, user: UserId, held: HeldMessage, alias: UserId | None, tenant: TenantId
    ) -> None:
        if one := self._take(user, held.idempotency_key, with_body=False):
            to = [user, alias or "", str(tenant)]
            texts = self._accepted(dict(one.content))
            self.all.append(["add_field", *to, texts, "held_body", one.body])

    def _drop_held(self, user: UserId) -> None:
        for one in self._held.get(user, ()):
            self.all.append(["HDEL", "held_body", one.body])
            self.all.append(["SREM", f"holders:{one.message.idempotency_key}", user])
        self._held[user] = ()
        self.all.append(["DEL", f"held:{user}"])
        self._note_oldest(user)

    def drop_held_until(self, user: UserId, until: float) -> int:
        """Hold nothing of user that arrived by then; how many that were."""
        before = self._held.get(user, ())
        for key in {one.message.idempotency_key for one in before if one.message.arrived <= until}:
            self._take(user, key, with_body=True)
        return len(before) - len(self._held.get(user, ()))

    def _note_oldest(self, user: UserId) -> None:
        if left := self._held[user]:
            oldest = repr(min(one.message.arrived for one in left))
            self.all.append(["ZADD", "held_since", oldest, user])
        else:
            self.all.append(["ZREM", "held_since", user])

    def _rename_held(self, old: UserId, new: UserId) -> None:
        if not (was := self._held.pop(old, None)):
            return
        both = [*was, *self._held.get(new, ())]
        self._held[new] = tuple(sorted(both, key=lambda one: one.message.arrived))
        for one in was:
            self.all.append(["SREM", f"holders:{one.message.idempotency_key}", old])
            self.all.append(["SADD", f"holders:{one.message.idempotency_key}", new])
        self.all.append(["DEL", f"held:{old}"])
        self.all.append(["DEL", f"held:{new}"])
        self.all.append(["RPUSH", f"held:{new}", *(one.text for one in self._held[new])])
        self._note_oldest(new)
        self.all.append(["ZREM", "held_since", old])

    def _forget(self, user: UserId) -> None:
        """All but lock, history, dead letters and unreadable messages."""
        self.all.append(["delete_waiting", user])
        self._drop_held(user)
        self._update_record(user, Person())
        if user in self._known.pairs:
            if phone := self._known.phone_of(user):
                self.all.append(["HDEL", "lid", phone])
            self.all.append(["HDEL", "phone", user])
            self.all.append(["HDEL", "linked_at", user])
        else:
            self.all.append(["HDEL", "lid", user])
        self.all.append(["HDEL", "change", user])


def _content(content: DeliveryContent) -> dict[str, str]:
    return {
        "event_time": repr(content.event_time),
        "arrived": repr(content.arrived),
        "key": content.idempotency_key,
        "message_id": content.message_id or "",
        "headers": orjson.dumps(content.headers).decode(),
    }
