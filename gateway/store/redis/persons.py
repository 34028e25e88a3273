"""Persons: what the rules of domain/person.py are asked with, and what they change.

What is known is read, a rule is asked, and its changes are applied if all is still as it was read;
else the rule is asked again. What was known last time is kept: mostly it still holds, and one call
does."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar
from weakref import WeakValueDictionary

from gateway.domain import person
from gateway.domain.model import (
    Accepted,
    Bind,
    Decide,
    DryRun,
    Erased,
    Forward,
    InboundMessage,
    Moment,
    TenantId,
    UserId,
)
from gateway.domain.person import (
    NOBODY,
    AddDelivery,
    Changed,
    Known,
    LockChange,
    MarkSeen,
    PairIds,
    RecordEvent,
    SetLock,
    UpdateRecord,
)
from gateway.store import person_record
from gateway.store.base import (
    DROPPED_BY_UNLOCK,
    Limits,
    OnLockEvent,
    backlog_refusal,
)
from gateway.store.person_operations import Rule, ids_in
from gateway.store.redis import history as redis_history
from gateway.store.redis import rows, unreadable
from gateway.store.redis.commands import Commands
from gateway.store.redis.facts import (
    Answers,
    Command,
    Facts,
    PersonAnswers,
    joined,
    with_lock_changes,
)
from gateway.store.redis.scripts import (
    Scripts,
    session_of,
)
from gateway.store.redis.sessions import SessionKeys

_USERS_AT_ONCE = 1_000  # moved in one step
_ENTRIES = 100  # of a history, looked at together: a person may have tens of thousands
_CHUNK = 500  # expired in one go
_MOST_GUESSES = 100_000  # 40 MB

T = TypeVar("T")


class Persons(SessionKeys):
    def __init__(self, scripts: Scripts, limits: Limits, on_lock_event: OnLockEvent) -> None:
        super().__init__(scripts, limits, on_lock_event)
        self._known_as: dict[UserId, UserId] = {}  # LIDs with a phone: one person has one turn
        # What was known of these the last time.
        self._guesses: dict[tuple[UserId, ...], PersonAnswers] = {}
        self._backlog_limits = {
            "all": limits.max_backlog,
            "tenant": limits.max_backlog_per_tenant,
        }
        self._refused: tuple[TenantId, str] | None = None
        self._newest: dict[str, int] = {}  # of each session: see _newer()
        self._turns: WeakValueDictionary[UserId, asyncio.Lock] = WeakValueDictionary()
        self._lost: str | None = None  # why what it holds is not to be trusted

    async def accept(self, message: InboundMessage, decide: Decide) -> Accepted:
        if self._lost:
            raise self.unavailable(f"Redis: {self._lost}")
        user = ids_in(message)[-1]
        # What one router is given is decided in that order, though it may take two calls.
        async with self._turn_of(self._known_as.get(user, user)):
            accepted = await super().accept(message, decide)
        if accepted.user != user:
            self._note_known_as(user, accepted.user)
        self._scripts.retry_after.over()
        return accepted

    def _note_known_as(self, lid: UserId, phone: UserId) -> None:
        if len(self._known_as) >= _MOST_GUESSES:
            self._known_as.clear()
        self._known_as[lid] = phone

    def _turn_of(self, user: UserId) -> asyncio.Lock:
        return self._turns.setdefault(user, asyncio.Lock())

    async def change(
        self, ids: Sequence[UserId], rule: Rule[T], message: InboundMessage | None = None
    ) -> T:
        result, _ = await self._change(ids, rule, message)
        return result

    async def _change(
        self,
        ids: Sequence[UserId],
        rule: Rule[T],
        message: InboundMessage | None = None,
        *,
        more: Callable[[T], list[Command]] = lambda _: [],
    ) -> tuple[T, list[int]]:
        """As change(). more: commands behind those of the rule's changes; also what they count."""
        session, key = session_of(ids[0]), tuple(sorted(ids))
        # Mostly nothing has changed since, and one call will do.
        guess = self._guesses.pop(key, None)
        if guess:
            answers = Answers.guessed(guess, message)
        else:
            answers = await self._load_answers(ids, message)
        refused: tuple[TenantId, str] | None = None
        while True:
            facts = answers.facts
            if facts.held:
                facts = await self._with_lock_changes(answers)
            result, changed = self._ask(rule, facts.known, refused)
            commands = Commands(facts, self.now())
            commands.add(changed.changes)
            newest = self._newer(session, message) if commands.all and message else None
            if newest:
                commands.all.append(["greatest", "numbers", "sent", str(newest)])
            behind = more(result)
            if not (commands.all or behind or guess):
                self._guess(key, answers.persons)
                return result, []
            if commands.all and session not in self._sessions:
                await self._know(ids[0])
            state, found = await self._scripts.transact(
                session,
                commands.all + behind,
                bytes(commands.bodies),
                reads=answers.reads,
                expected=answers.expected,
                limits=self._backlog_limits,
            )
            if state == "changed":
                self._newest[session] = newest or self._newest.get(session, 0)
                self.report(changed.events)
                if changed.known is not facts.known:
                    await self._changed(changed)
                self._work.set()
                if not _changes_persons(changed):
                    self._guess(key, answers.persons)
                return result, found
            if state == "full":
                refused = self._full(found.decode(), session)
            else:  # what is known is not, or no longer, what was decided on
                answers, guess = answers.with_texts(found), None
                if answers.missing(ids):
                    answers = await self._load_answers(ids, message)

    def _ask(
        self, rule: Rule[T], known: Known, refused: tuple[TenantId, str] | None
    ) -> tuple[T, Changed]:
        self._refused = refused
        try:
            return rule(known)
        finally:
            self._refused = None

    def refusal(self, tenant: TenantId) -> str | None:
        """The script counts what waits; while a rule is asked again this is what it said."""
        return self._refused[1] if self._refused and self._refused[0] == tenant else None

    def _full(self, said: str, session: str) -> tuple[TenantId, str]:
        what, waiting, its_tenant = said.split()
        tenant = TenantId(int(its_tenant))
        everything = int(waiting) if what == "all" else 0
        reason = backlog_refusal(self.limits, everything, tenant, int(waiting))
        assert reason is not None
        if what == "all":
            self._full_sessions[session] = reason
        return tenant, reason

    def _newer(self, session: str, message: InboundMessage) -> int | None:
        """Return the time that WhatsApp gave to message, if it is newer than that of all before."""
        # Without a time of its own it has that of its arrival.
        is_newer = self._newest.get(session, 0) < message.sent.second < int(message.arrived)
        return message.sent.second if is_newer else None

    def _guess(self, key: tuple[UserId, ...], persons: PersonAnswers) -> None:
        if len(self._guesses) >= _MOST_GUESSES:
            self._guesses.clear()
        self._guesses[key] = persons

    async def _changed(self, changed: Changed) -> None:
        for one in changed.changes:
            if isinstance(one, PairIds) and one.pair.phone:
                self._note_known_as(one.pair.lid, one.pair.phone)
        if any(isinstance(one, SetLock) for one in changed.changes):
            await self._count()

    async def load(self, ids: Sequence[UserId], message: InboundMessage | None = None) -> Known:
        answers = await self._load_answers(ids, message)
        if answers.facts.held:
            return (await self._with_lock_changes(answers)).known
        return answers.facts.known

    async def _load_answers(
        self, ids: Sequence[UserId], message: InboundMessage | None = None
    ) -> Answers:
        """Read what is known of ids, and of the other ids of the same persons."""
        answers = Answers(PersonAnswers(tuple(sorted(set(ids)))), message, ())
        while True:
            _, texts = await self._scripts.transact(session_of(ids[0]), None, reads=answers.reads)
            answers = answers.with_texts(texts)
            # Again if a pair has changed between two reads: a rule must know both of its ids.
            if not (missing := answers.missing(ids)):
                return answers
            answers = Answers(PersonAnswers(tuple(sorted({*ids, *missing}))), message, ())

    async def _with_lock_changes(self, answers: Answers) -> Facts:
        """What is held belongs to where the person was locked to then."""
        facts = answers.facts
        oldest = min(one.message.sent for some in facts.held.values() for one in some)
        changes = {user: await self._lock_changes(user, oldest) for user in answers.persons.ids}
        return with_lock_changes(facts, changes)

    async def _lock_changes(self, user: UserId, moment: Moment) -> list[LockChange]:
        """Return the changes of user's lock after moment, and the last one before it."""
        session, found, last = session_of(user), list[LockChange](), -1
        while True:
            (texts,) = await self._scripts.read(
                session, ["LRANGE", f"h:{user}", str(last - _ENTRIES + 1), str(last)]
            )
            for text in reversed(texts):
                one = redis_history.entry(text)
                if changed := one.event.changed:
                    found.append(LockChange(changed, one.id, one.event.to_tenant))
                    if changed <= moment:
                        return found
            if len(texts) < _ENTRIES:
                return found
            last -= _ENTRIES

    async def _all_ids_of(self, user: UserId) -> tuple[UserId, ...]:
        answers = await self._load_answers((user,))
        known = answers.facts.known
        return tuple(one for one in known.ids_of(user) if one)

    async def dry_run(self, message: InboundMessage, decide: Decide) -> DryRun:
        found = await super().dry_run(message, decide)
        decision, session = found.accepted.decision, session_of(found.accepted.user)
        if not isinstance(decision, Bind | Forward):
            return found
        waiting, its = await self._scripts.read(
            session, ["HGET", "waiting", ""], ["HGET", "waiting", str(decision.tenant)]
        )
        why = backlog_refusal(self.limits, int(waiting or 0), decision.tenant, int(its or 0))
        return replace(found, refused=why) if why else found

    # operators

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False, at: float | None = None
    ) -> tuple[UserId, TenantId | None, int]:
        def rule(known: Known) -> tuple[tuple[UserId, TenantId | None], Changed]:
            unlocked, tenant, changed = person.unlock(known, user, at=at, now=self.now())
            return (unlocked, tenant), changed

        def drop(found: tuple[UserId, TenantId | None]) -> list[Command]:
            return [["drop_waiting", found[0], DROPPED_BY_UNLOCK]] if drop_waiting else []

        (unlocked, tenant), dropped = await self._change((user,), rule, more=drop)
        return unlocked, tenant, sum(dropped)

    async def move(
        self,
        old: TenantId,
        new: TenantId,
        *,
        with_waiting: bool = True,
        at: float | None = None,
    ) -> tuple[int, int]:
        users = moved = 0
        for session in list(self._sessions):
            while some := await self._move_some(session, old, new, at):
                users += some
            if with_waiting:
                _, found = await self._scripts.transact(
                    session, [["move_waiting", str(old), str(new)]], makes_room=True
                )
                moved += found[0]
        await self._count()
        self._work.set()
        return users, moved

    async def _move_some(self, session: str, old: TenantId, new: TenantId, at: float | None) -> int:
        """Move up to _USERS_AT_ONCE users in one step; how many."""
        (found,) = await self._scripts.read(
            session, ["ZRANGE", f"of:{old}", "0", str(_USERS_AT_ONCE - 1)]
        )
        if not (users := tuple(sorted(map(rows.user, found)))):
            return 0
        answers = Answers(PersonAnswers(users), None, ())
        _, texts = await self._scripts.transact(session, None, reads=answers.reads)
        answers = answers.with_texts(texts)
        facts = answers.facts
        commands = Commands(facts, self.now())
        count = 0
        for user, one in facts.known.persons.items():
            if one.lock.tenant == old:
                moved = person.move(facts.known, user, new, at=at, now=self.now())
                commands.add(moved.changes)
                count += 1
        state, _ = await self._scripts.transact(
            session,
            commands.all,
            reads=answers.reads,
            expected=answers.expected,
            makes_room=True,
        )
        if state == "changed":
            return count
        return await self._move_some(session, old, new, at)  # somebody wrote meanwhile

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        while (done := await self._try_to_erase(user)) is None:
            pass  # somebody wrote meanwhile
        for known in (self._guesses, self._known_as):  # the person is in neither any longer
            known.clear()
        await self._count()
        self._work.set()
        return done

    async def _try_to_erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased] | None:
        session, answers = session_of(user), await self._load_answers((user,))
        facts = answers.facts
        ids = tuple(one for one in facts.known.ids_of(user) if one)
        others = await self._scripts.read(session, *(["SMEMBERS", f"named:{one}"] for one in ids))
        users = sorted({*ids, *(rows.user(one) for some in others for one in some)})
        lists = await self._scripts.read(
            session, *(["LRANGE", f"h:{one}", "0", "-1"] for one in users)
        )
        entries = {
            one: list(map(redis_history.entry, texts))
            for one, texts in zip(users, lists, strict=True)
        }
        ids, changed = person.erase(
            facts.known,
            user,
            {entry.id: entry.event for some in entries.values() for entry in some},
            nobody=self.new_nobody(),
            now=self.now(),
        )
        commands = Commands(facts, self.now())
        commands.rewrite_histories(entries, changed.changes)
        commands.add(changed.changes)
        commands.all += [["DEL", f"named:{one}"] for one in ids]
        commands.all += [["SREM", f"named:{one}", *ids] for one in users if one not in ids]
        letters = await self._scripts.read(
            session, *(["ZRANGE", f"dead_letters_of:{one}", "0", "-1"] for one in ids)
        )
        commands.all += [["delete_dead_letter", id_.decode()] for some in letters for id_ in some]
        unread = [await unreadable.ids_of(self._scripts, session, one) for one in ids]
        for some in unread:
            commands.all += await unreadable.deletion(self._scripts, session, some)
        # Nothing of it may have come or gone since it was read.
        counts = {f"h:{one}": len(entries[one]) for one in users}
        lengths: list[Command] = [["LLEN", name] for name in counts]
        for kind, lists_of in (("dead_letters_of", letters), ("unreadable_of", unread)):
            for one, some in zip(ids, lists_of, strict=True):
                lengths.append(["ZCARD", f"{kind}:{one}"])
                counts[f"{kind}:{one}"] = len(some)
        state, found = await self._scripts.transact(
            session,
            commands.all,
            reads=joined(answers.persons.reads, lengths),
            expected=joined(answers.persons.expected, list(map(str, counts.values()))),
            makes_room=True,
        )
        if state != "changed":
            return None
        self.report(changed.events)
        deleted: Counter[str] = Counter()
        counting = [one[0] for one in commands.all if one[0].startswith("delete_")]
        for name, count in zip(counting, found, strict=True):
            deleted[name] += count
        erased = {
            "delivery": deleted["delete_waiting"],
            "held": sum(len(facts.held.get(one, ())) for one in ids),
            "dead_letter": deleted["delete_dead_letter"],
            "alias": sum(
                lid in ids or pair.phone in ids for lid, pair in facts.known.pairs.items()
            ),
            "person": sum(facts.known.person(one).help is not None for one in ids),
            "unreadable": sum(map(len, unread)),
        }
        return ids, self.erased(facts.known, ids, changed, erased)

    # what ends by itself

    async def _expire_held(self, session: str) -> int:
        until, gone = self.now() - self.limits.hold_seconds, 0
        (users,) = await self._scripts.read(
            session,
            ["ZRANGEBYSCORE", "held_since", "-inf", repr(until), "LIMIT", "0", str(_CHUNK)],
        )
        for user in map(rows.user, users):
            answers = await self._load_answers((user,))
            commands = Commands(answers.facts, self.now())
            dropped = commands.drop_held_until(user, until)
            state, _ = await self._scripts.transact(
                session,
                commands.all,
                reads=answers.reads,
                expected=answers.expected,
                makes_room=True,
            )
            gone += dropped * (state == "changed")
        return gone

    async def _expire_records(self, session: str) -> None:
        until = repr(self.now() - person_record.lifetime(self.limits))
        (found,) = await self._scripts.read(
            session,
            ["ZRANGEBYSCORE", "person_updated", "-inf", until, "WITHSCORES", "LIMIT", "0",
             str(_CHUNK)],
        )  # fmt: skip
        for user, updated in rows.pairs(found):
            commands = Commands(Facts(Known({}, {})), self.now())
            commands.add([UpdateRecord(rows.user(user), NOBODY)])
            await self._scripts.transact(
                session,
                commands.all,
                reads=[["ZSCORE", "person_updated", user.decode()]],
                expected=[json.dumps(updated.decode())],
                makes_room=True,
            )


def _changes_persons(changed: Changed) -> bool:
    """Whether what is known of persons is another now."""
    return any(
        not isinstance(one, AddDelivery | MarkSeen)
        and not (isinstance(one, RecordEvent) and one.event.changed is None)
        for one in changed.changes
    )
