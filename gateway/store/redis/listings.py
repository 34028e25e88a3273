"""What is read for operators and offices, and dead letters."""

import asyncio
import heapq
from collections import Counter
from dataclasses import replace
from typing import Any

from gateway.domain.model import (
    Backlog,
    DeadLetter,
    Export,
    HistoryEntry,
    InboundMessage,
    PersonSummary,
    Selection,
    StoredMessage,
    TenantId,
    Totals,
    Unreadable,
    UnreadableReason,
    UserId,
    is_lid,
)
from gateway.domain.person import HELP_SECONDS
from gateway.store.base import (
    LocksPage,
    in_batches,
    whole_history,
)
from gateway.store.redis import history as redis_history
from gateway.store.redis import rows, unreadable
from gateway.store.redis.facts import Command
from gateway.store.redis.persons import Persons
from gateway.store.redis.scripts import (
    HOME,
    padded,
    session_of,
)

_CHUNK = 500  # looked at, or changed, by one script, which keeps others waiting
_BODIES = 50  # read in one call
_MOST_LIDS = 10_000
_MESSAGE = ("tenant", "arrived", "message_id", "body")


class Listings(Persons):
    async def locks(self, limit: int, after: UserId | None) -> LocksPage:
        pages = [await self._users(session, limit + 1, after) for session in sorted(self._sessions)]
        first = heapq.nsmallest(limit + 1, (pair for page in pages for pair in page))
        page = dict(first[:limit])
        return LocksPage(page, first[limit - 1][0] if len(first) > limit else None)

    async def users_of(
        self, tenant: TenantId, limit: int, after: UserId | None
    ) -> tuple[list[UserId], UserId | None]:
        pages = [
            await self._users(session, limit + 1, after, str(tenant))
            for session in sorted(self._sessions)
        ]
        first = heapq.nsmallest(limit + 1, (user for page in pages for user, _ in page))
        return first[:limit], first[limit - 1] if len(first) > limit else None

    async def _users(
        self, session: str, limit: int, after: UserId | None, tenant: str | None = None
    ) -> list[tuple[UserId, TenantId]]:
        """Return limit of them, or fewer if there are no more."""
        key, found = f"of:{tenant}" if tenant else "users", list[tuple[UserId, TenantId]]()
        while len(found) < limit:
            first = f"({after}" if after else "-"
            (some,) = await self._scripts.read(
                session, ["ZRANGEBYLEX", key, first, "+", "LIMIT", "0", str(limit)]
            )
            if not (users := list(map(rows.user, some))):
                break
            (tenants,) = await self._scripts.read(session, ["HMGET", "lock", *users])
            # Some may have been unlocked or moved since.
            found += [
                (user, TenantId(int(its)))
                for user, its in zip(users, tenants, strict=True)
                if its and tenant in (None, its.decode())
            ]
            after = users[-1]
        return found[:limit]

    async def tenant_totals(self) -> dict[TenantId, Totals]:
        answers: list[tuple[str, list[Any]]] = []
        for session in list(self._sessions):
            for of in ("owners", "delivered", "waiting", "dead", "first_seen", "last_seen"):
                (found,) = await self._scripts.read(session, ["HGETALL", of])
                answers.append((of, found))

        def joined() -> dict[TenantId, Totals]:
            sums: dict[TenantId, dict[str, Any]] = {}
            for of, pairs in answers:
                name = "users" if of == "owners" else of
                for tenant, value in rows.pairs(pairs):
                    if not tenant:
                        continue
                    mine = sums.setdefault(TenantId(int(tenant)), {})
                    if name == "first_seen":
                        mine[name] = min(mine.get(name, float(value)), float(value))
                    elif name == "last_seen":
                        mine[name] = max(mine.get(name, 0.0), float(value))
                    else:
                        mine[name] = mine.get(name, 0) + int(value)
            return {tenant: Totals(**found) for tenant, found in sums.items()}

        return await asyncio.to_thread(joined)  # anybody who posts links can make them many

    async def backlog(self) -> Backlog:
        oldest: float | None = None
        held = unread = dead = 0
        waiting: Counter[TenantId] = Counter()
        for session in list(self._sessions):
            first, counts, its_held, its_dead = await self._scripts.read(
                session,
                ["ZRANGE", "ids", "0", "0"],
                ["HGETALL", "waiting"],
                ["HLEN", "held_body"],
                ["ZCARD", "dead_letters"],
            )
            held, dead = held + its_held, dead + its_dead
            unread += await unreadable.count(self._scripts, session, self.now())
            if first:
                key = f"d:{first[0].decode()}"
                (arrived,) = await self._scripts.read(session, ["HGET", key, "arrived"])
                if arrived and (oldest is None or float(arrived) < oldest):
                    oldest = float(arrived)
            for tenant, count in rows.pairs(counts):
                if tenant:
                    waiting[TenantId(int(tenant))] += int(count)
        return Backlog(waiting.total(), oldest, dict(waiting.most_common()), held, unread, dead)

    async def held_lids(self) -> list[UserId]:
        found: list[UserId] = []
        for session in list(self._sessions):
            (users,) = await self._scripts.read(session, ["ZREVRANGE", "held_since", "0", "-1"])
            found += [user for user in map(rows.user, users) if is_lid(user)]
        return found[:_MOST_LIDS]

    async def help_waits(self) -> list[tuple[UserId, float]]:
        found: list[tuple[UserId, float]] = []
        since = f"({self.now() - HELP_SECONDS!r}"
        for session in list(self._sessions):
            (some,) = await self._scripts.read(
                session, ["ZRANGEBYSCORE", "help_waits", since, "+inf", "WITHSCORES"]
            )
            found += [(rows.user(user), float(at)) for user, at in rows.pairs(some)]
        return sorted(found, key=lambda pair: pair[1])

    # a person's own

    async def history(
        self, user: UserId, *, limit: int, before: int | None = None
    ) -> list[HistoryEntry]:
        session, found = session_of(user), list[HistoryEntry]()
        for one in await self._all_ids_of(user):
            found += await self._history_of(session, one, limit, before)
        return heapq.nlargest(limit, found, key=lambda entry: entry.id)

    async def _history_of(
        self, session: str, user: UserId, limit: int, before: int | None
    ) -> list[HistoryEntry]:
        (end,) = await self._scripts.read(session, ["LLEN", f"h:{user}"])
        low = 0
        while before is not None and low < end:  # ids grow
            middle = (low + end) // 2
            (text,) = await self._scripts.read(session, ["LINDEX", f"h:{user}", str(middle)])
            if text and redis_history.entry(text).id < before:
                low = middle + 1
            else:
                end = middle
        if end <= 0 or limit <= 0:
            return []
        first = max(0, end - limit)
        (texts,) = await self._scripts.read(
            session, ["LRANGE", f"h:{user}", str(first), str(end - 1)]
        )
        return [redis_history.shown(text) for text in texts]

    async def export(self, user: UserId) -> Export:
        ids, messages, _ = await self._messages_of(user, None)
        known = (await self.load((user,))).person(ids[0])
        entries = await whole_history(self, user)
        return Export(ids, known.lock.tenant, messages, tuple(entries), known.help_times)

    async def summary(self, user: UserId, *, limit: int) -> PersonSummary:
        ids, messages, counts = await self._messages_of(user, limit)
        return PersonSummary(
            ids, messages, counts["waiting"], counts["held"], counts["dead_letter"]
        )

    async def _messages_of(
        self, user: UserId, limit: int | None
    ) -> tuple[tuple[UserId, ...], tuple[StoredMessage, ...], Counter[str]]:
        """Return the person's ids, up to limit messages, and how many there are of each kind."""
        session, read = session_of(user), self._scripts.read
        answers = await self._load_answers((user,))
        facts = answers.facts
        ids = tuple(one for one in facts.known.ids_of(user) if one)
        found: list[tuple[str, Command]] = []  # where it is, and how to read it
        for one in ids:
            (tenants,) = await read(session, ["SMEMBERS", f"tenants_of:{one}"])
            queues = await read(
                session, *(["ZRANGE", f"queue:{its.decode()}:{one}", "0", "-1"] for its in tenants)
            )
            for id_ in (id_.decode() for queue in queues for id_ in queue):
                found.append(("waiting", ["HMGET", f"d:{id_}", *_MESSAGE]))
            for held in facts.held.get(one, ()):
                found.append(("held", ["HGET", "held_body", held.body]))
            (letters,) = await read(session, ["ZRANGE", f"dead_letters_of:{one}", "0", "-1"])
            for id_ in (id_.decode() for id_ in letters):
                found.append(("dead_letter", ["HMGET", f"x:{id_}", *_MESSAGE]))
            for id_ in await unreadable.ids_of(self._scripts, session, one):
                found.append(("unreadable", ["HMGET", f"u:{id_}", "tenant", *_MESSAGE[1:]]))
        counts = Counter(where for where, _ in found)
        all_held = iter([held for one in ids for held in facts.held.get(one, ())])
        messages: list[StoredMessage] = []
        for batch in in_batches(found[:limit], _BODIES):
            for (where, _), row in zip(
                batch, await read(session, *(command for _, command in batch)), strict=True
            ):
                if where == "held":
                    held = next(all_held)
                    texts = (held.content["arrived"], held.content["message_id"])
                    row = [b"", *(text.encode() for text in texts), row or b""]
                if row[1] is not None:  # else it is gone meanwhile
                    messages.append(rows.stored_message(where, *row))
        return ids, tuple(messages), counts

    # unreadable messages

    async def add_unreadable(self, message: InboundMessage, reason: UnreadableReason) -> None:
        # Under the user's session as far as there is a user; else all are together.
        user = message.phone or message.lid
        session = await self._know(user) if user else HOME
        await unreadable.add(self._scripts, session, message, reason)

    async def unreadable(self, *, limit: int, before: int | None = None) -> list[Unreadable]:
        found: list[Unreadable] = []
        for place, session in enumerate(self._by_number()):
            # Ids are counted by each session for itself: here its number distinguishes them.
            many = len(self._sessions)
            own = None if before is None else (before - place + many - 1) // many
            some = await unreadable.some(self._scripts, session, limit=limit, before=own)
            found += [replace(one, id=one.id * many + place) for one in some]
        return heapq.nlargest(limit, found, key=lambda one: one.id)

    # dead letters

    async def dead_letters(
        self, which: Selection, *, limit: int, before: int | None = None
    ) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        last = "+inf" if before is None else f"({before}"
        for session in self._of(which):
            ids = await self._selected(session, which, "-inf", last, limit, newest_first=True)
            for batch in in_batches(ids, _CHUNK):
                some = await self._scripts.read(
                    session, *(["HMGET", f"x:{id_.decode()}", *rows.DEAD_LETTER] for id_ in batch)
                )
                found += [
                    rows.dead_letter(id_, row, with_body=False)
                    for id_, row in zip(batch, some, strict=True)
                    if row[0] is not None
                ]
        return heapq.nlargest(limit, found, key=lambda dead_letter: dead_letter.id)

    async def dead_letter(self, id_: int) -> DeadLetter | None:
        for session in list(self._sessions):
            (row,) = await self._scripts.read(
                session, ["HMGET", f"x:{padded(id_)}", *rows.DEAD_LETTER]
            )
            if row[0] is not None:
                return rows.dead_letter(padded(id_).encode(), row, with_body=True)
        return None

    async def replay(self, which: Selection) -> int:
        return await self._each_dead_letter("replay", which)

    async def delete_dead_letters(self, which: Selection) -> int:
        return await self._each_dead_letter("delete_dead_letter", which)

    async def _each_dead_letter(self, command: str, which: Selection) -> int:
        total = 0
        for session in self._of(which):
            (newest,) = await self._scripts.read(session, ["ZREVRANGE", "dead_letters", "0", "0"])
            # What dies meanwhile is not taken again.
            last = newest[0].decode() if newest else "-inf"
            while ids := await self._selected(session, which, "-inf", last, _CHUNK):
                _, found = await self._scripts.transact(
                    session, [[command, id_.decode()] for id_ in ids], makes_room=True
                )
                total += sum(found)
        self._work.set()
        return total

    async def _selected(
        self,
        session: str,
        which: Selection,
        first: str,
        last: str,
        limit: int,
        *,
        newest_first: bool = False,
    ) -> list[bytes]:
        """Return up to limit ids of dead letters, from first to last."""
        read = self._scripts.read
        if which.id is not None:
            found = await read(session, ["EXISTS", f"x:{padded(which.id)}"])
            return [padded(which.id).encode()] if found[0] else []
        key, user = "dead_letters", None
        if which.tenant is not None:
            key = f"dead_letters_to:{which.tenant}"
        if which.user:
            user = (await self._all_ids_of(which.user))[0]
            key = f"dead_letters_of:{user}"
        command, ends = "ZRANGEBYSCORE", (first, last)
        if newest_first:
            command, ends = "ZREVRANGEBYSCORE", (last, first)
        ids: list[bytes] = []
        at = 0
        while len(ids) < limit:
            (some,) = await read(session, [command, key, *ends, "LIMIT", str(at), str(limit)])
            if not some:
                break
            at += len(some)
            if user and which.tenant is not None:
                tenants = await read(
                    session, *(["HGET", f"x:{id_.decode()}", "tenant"] for id_ in some)
                )
                its = str(which.tenant).encode()
                some = [id_ for id_, one in zip(some, tenants, strict=True) if one == its]
            ids += some
        return ids[:limit]

    def _of(self, which: Selection) -> list[str]:
        return [session_of(which.user)] if which.user else sorted(self._sessions)
