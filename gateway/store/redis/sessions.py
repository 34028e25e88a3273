"""The keys of each WAHA session: which sessions there are, the lease on each, the clock, and how
many users and tenants they hold together."""

import asyncio
import time
import uuid
from dataclasses import dataclass

from gateway.domain.model import UserId
from gateway.errors import StoreUnavailable
from gateway.store.base import (
    Limits,
    OnLockEvent,
)
from gateway.store.files import opening
from gateway.store.person_operations import PersonOperations
from gateway.store.redis.scripts import (
    HOME,
    Scripts,
    first_id,
    session_of,
)

LEASE_SECONDS = 15.0


@dataclass(slots=True)
class Lease:
    """On one session's keys. name: ends in its fencing number. until: monotonic seconds."""

    name: str
    until: float


class SessionKeys(PersonOperations):
    """What the rest of the store builds on."""

    def __init__(self, scripts: Scripts, limits: Limits, on_lock_event: OnLockEvent) -> None:
        super().__init__(limits, on_lock_event)
        self._scripts = scripts
        self._router = uuid.uuid4().hex
        self._sessions: dict[str, int] = {}  # each with its number
        self._leases: dict[str, Lease] = {}
        self._renewals: dict[str, asyncio.Lock] = {}
        self._claims: dict[tuple[str, int], tuple[str, str]] = {}  # session, id → lease, key
        self._unknown: dict[str, set[str]] = {}  # claims of which nobody here knows, by session
        self._work = asyncio.Event()
        self._clock = time.time() - time.monotonic()  # Redis' as of the last look, less ours
        self._gone_back: dict[str, float] = {}  # sessions whose clock has, by seconds
        self._totals = (0, 0)
        self._counts_begun = 0
        self._counting = asyncio.Lock()
        self._full_sessions: dict[str, str] = {}  # MAX_BACKLOG is reached there, in words

    def now(self) -> float:
        return self._clock + time.monotonic()

    def unavailable(self, reason: str) -> StoreUnavailable:
        return self._scripts.retry_after.unavailable(reason)

    async def _know(self, user: UserId) -> str:
        """The session of user, from now on among those that are looked through."""
        session = session_of(user)
        if session not in self._sessions:
            await self._know_session(session)
            await self._renew(session)
        return session

    async def _know_session(self, session: str) -> None:
        self._sessions[session] = await self._scripts.number_of(session)

    def _by_number(self) -> list[str]:
        return sorted(self._sessions, key=self._sessions.__getitem__)

    async def _renew_all(self) -> None:
        for session, number in (await self._scripts.sessions()).items():
            if session not in self._sessions:  # another router knows it
                await self._scripts.mark(session)
                self._sessions[session] = number
        for session in list(self._sessions):
            await self._renew(session)
            await self._find_the_lost(session)

    async def _find_the_lost(self, session: str) -> None:
        """Free what is claimed by us and nobody here knows of, if that was so last time as well: an
        answer to a claim was lost, or came when nobody waited for it any more."""
        lease = self._leases[session].name
        (claimed,) = await self._scripts.read(session, ["SMEMBERS", f"claims:{lease}"])
        unknown = {one.decode() for one in claimed if (session, int(one)) not in self._claims}
        if lost := unknown & self._unknown.get(session, set()):
            await self._scripts.run(session, "release", lease=lease, ids=sorted(lost))
            self._work.set()
        self._unknown[session] = unknown - lost

    async def _renew(self, session: str) -> Lease:
        # One at a time: two that begin at once would each get a lease.
        async with self._renewals.setdefault(session, asyncio.Lock()):
            return await self._renew_now(session)

    async def _renew_now(self, session: str) -> Lease:
        began = time.monotonic()
        known = self._leases.get(session)
        name, now, back = await self._scripts.run(
            session,
            "renew",
            router=self._router,
            lease=known.name if known else None,
            milliseconds=int(LEASE_SECONDS * 1000),
            base=first_id(self._sessions[session]),
            step=opening.STEP_SECONDS,
        )
        # From before the question: the lease cannot end sooner there than here.
        lease = self._leases[session] = Lease(name.decode(), began + LEASE_SECONDS)
        if session == HOME:  # of a cluster this one node's is taken
            self._clock = float(now) - time.monotonic()
        if back:
            self._gone_back[session] = float(back)
        return lease

    async def _lease(self, session: str) -> Lease:
        lease = self._leases.get(session)
        return lease if lease else await self._renew(session)

    async def _count(self) -> None:
        """Count what is there now. Those who ask while one counts share the next count."""
        begun = self._counts_begun
        async with self._counting:
            if begun == self._counts_begun:
                self._counts_begun += 1
                await self._count_now()

    async def _count_now(self) -> None:
        users, tenants, many = 0, set[bytes](), 0
        is_one = len(self._sessions) == 1
        for session in list(self._sessions):
            count, its, waiting, *names = await self._scripts.read(
                session,
                ["HLEN", "lock"],
                ["HLEN", "owners"],
                ["HGET", "waiting", ""],
                *([] if is_one else [["HKEYS", "owners"]]),
            )
            users, many = users + count, max(many, its)
            tenants |= set(names[0]) if names else set()
            if int(waiting or 0) < self.limits.max_backlog:
                self._full_sessions.pop(session, None)
        self._totals = users, len(tenants) or many

    def totals(self) -> tuple[int, int]:
        return self._totals
