"""The store for more than one router: everything in Redis (6.2 or newer), changed by scripts.

Each operation is one step of a script, which nothing interrupts, and all keys of one WAHA session
carry its hash tag, so that it touches one slot of a cluster. What each key holds is said at the
heads of facts.py and of the files in lua/. A 200 is as durable as Redis' `appendfsync`.

A router holds a lease on each session's keys (15 s, renewed every 5 s). What it has claimed is free
for others when the lease ends, and what it says afterwards is refused.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from gateway.domain.model import Health
from gateway.errors import NoBackUp, StartRefused, StoreUnavailable
from gateway.store.base import (
    Limits,
    OnLockEvent,
)
from gateway.store.files import mappings, opening
from gateway.store.files.journal import Committed
from gateway.store.redis import formats, rows, unreadable
from gateway.store.redis.listings import Listings
from gateway.store.redis.queues import HEAL_SECONDS, Queues
from gateway.store.redis.scripts import (
    HOME,
    LOOKING,
    MARK,
    UNFINISHED,
    Scripts,
    open_scripts,
    why_no_start,
)

_RENEW_SECONDS = 5.0

log = logging.getLogger(__name__)


class RedisStore(Listings, Queues):
    """See base.Store. Any number of routers may share one Redis."""

    @classmethod
    async def open(
        cls,
        url: str,
        limits: Limits,
        committed: Committed = lambda _seconds, _operations: None,
        on_lock_event: OnLockEvent = lambda _: None,
        *,
        beside: Path | None = None,
    ) -> "RedisStore":
        """url: see scripts.open_scripts. beside: the data folder of the same router.

        Raise StartRefused if Redis cannot be reached or used, or is empty while that folder holds
        what a router on files has kept.
        """
        scripts = await open_scripts(url, committed=committed)
        store = cls(scripts, limits, on_lock_event)
        try:
            await store._start(beside)
        except StoreUnavailable as exc:
            await scripts.close()
            raise StartRefused(f"STORE_URL: {why_no_start(exc.__cause__ or exc)}") from exc
        except StartRefused:
            await scripts.close()
            raise
        return store

    def __init__(self, scripts: Scripts, limits: Limits, on_lock_event: OnLockEvent) -> None:
        super().__init__(scripts, limits, on_lock_event)
        self._dropped_before = 0  # keys that Redis had dropped before we began
        self._at_risk: str | None = None  # why it may come to that
        self._tasks: list[asyncio.Task[None]] = []

    async def _start(self, beside: Path | None) -> None:
        await self._refuse_moved()
        if beside and (held := opening.what_it_holds(beside)) and await self._holds_no_lock():
            raise StartRefused(
                f"STORE_URL: this Redis holds no lock, while {beside} holds {held}: carry it over"
                f" with python whatsapp_router.py migrate --from file:{beside} --to …, or move"
                f" router.db and {mappings.FILE_NAME} away to begin with nothing"
            )
        await self._adopt_store(beside)
        self._dropped_before = (await self._scripts.memory()).dropped
        await self._know_session(HOME)
        await self._renew_all()
        await self._refuse_moved()  # again: a migration looks for leases after it has set its mark
        await self._scripts.call(self._scripts.client.delete(MARK))
        await self._count()
        self._tasks = [
            asyncio.create_task(self._keep(work, seconds))
            for work, seconds in (
                (self._renew_all, _RENEW_SECONDS),
                (self._sweep, _RENEW_SECONDS),
                (self._check_memory, _RENEW_SECONDS),
                (self._test, _RENEW_SECONDS),
                (self._heal_clocks, HEAL_SECONDS),
            )
        ]

    async def _adopt_store(self, beside: Path | None) -> None:
        """And remember which it was: the next start must not take an empty one for it."""
        note = beside / opening.STORE_NOTE_NAME if beside and beside.is_dir() else None
        known = note.read_text("utf-8").strip() if note and note.exists() else None
        if known and known != await self._scripts.store_id():
            raise StartRefused(
                "STORE_URL: this Redis does not hold the store that a router with this DATA_DIR"
                " worked on last: it came back empty, or is another one. Restore it; or, to begin"
                f" with what it holds, delete {note}"
            )
        id_ = await self._scripts.adopt_store()
        await formats.bring_up(self._scripts)
        if note and id_ != known:
            with contextlib.suppress(OSError):  # a folder that cannot be written notes nothing
                note.write_text(f"{id_}\n", "utf-8")

    async def _holds_no_lock(self) -> bool:
        for session in await self._scripts.sessions():
            if await self._scripts.call(self._scripts.client.hlen(f"gw:{{{session}}}:lock")):
                return False
        return True

    async def _refuse_moved(self) -> None:
        client = self._scripts.client
        place = await self._scripts.call(client.get(f"gw:{{{HOME}}}:closed"))
        if place:
            raise StartRefused(
                f"STORE_URL: all that was in this Redis has been migrated to {place.decode()}, or"
                " is being migrated there; to go on with what it was then: python"
                " whatsapp_router.py migrate --reopen redis://…"
            )
        mark = await self._scripts.call(client.get(MARK))
        if mark == LOOKING:
            raise StartRefused("STORE_URL: a migration to this Redis begins: wait a minute")
        if mark == UNFINISHED:
            raise StartRefused("STORE_URL: a migration to this Redis did not finish: run it again")

    async def _keep(self, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except StoreUnavailable:
                pass  # the call has said so, and the next look may be luckier
            except Exception:
                log.exception("the maintenance failed unexpectedly", extra={"event": "store.error"})

    async def _test(self) -> None:
        """A quiet night must not leave /health red."""
        if self._scripts.trouble:
            for session in {HOME, *self._scripts.refusing}:
                with contextlib.suppress(StoreUnavailable):
                    await self._scripts.run(session, "test_write")

    async def _sweep(self) -> None:
        gone = 0
        for session in list(self._sessions):
            gone += await self._expire_held(session)
            await self._expire_records(session)
            await unreadable.sweep(self._scripts, session, self.now())
        if gone:
            log.info(
                "%s held messages got no link and are deleted",
                gone,
                extra={"event": "held.expired", "count": gone},
            )
        await self._count()

    async def _check_memory(self) -> None:
        """A Redis that drops keys may have been set to only now."""
        memory = await self._scripts.memory()
        # A server that was restarted counts anew.
        self._dropped_before = min(self._dropped_before, memory.dropped)
        dropped = memory.dropped - self._dropped_before
        # For good: what is gone does not come back with another policy.
        lost, at_risk = self._lost, None
        if lost is None and dropped > 0 and (memory.policy or "").startswith("allkeys"):
            lost = (
                f"it has dropped {dropped} keys for want of memory (maxmemory-policy"
                f" {memory.policy}), and locks may be among them: set noeviction, restore it, and"
                " restart the routers"
            )
        elif lost is None and memory.policy:
            at_risk = f"Redis drops keys when its memory is full (maxmemory-policy {memory.policy})"
            at_risk += f", {dropped} so far" if dropped > 0 else ""
            at_risk += ": set noeviction"
        if (lost, at_risk) != (self._lost, self._at_risk) and (lost or at_risk):
            log.error("%s", lost or at_risk, extra={"event": "store.evicts"})
        self._lost, self._at_risk = lost, at_risk

    # the whole

    async def note_heard(self, times: Mapping[str, float]) -> None:
        changes = [["greatest", "heard", session, repr(at)] for session, at in times.items()]
        if changes:
            await self._scripts.transact(HOME, changes)

    async def heard(self) -> dict[str, float]:
        (found,) = await self._scripts.read(HOME, ["HGETALL", "heard"])
        return {session.decode(): float(at) for session, at in rows.pairs(found)}

    async def back_up(self) -> Path:
        raise NoBackUp("the store is a Redis: back that up, by its append-only file")

    def health(self) -> Health:
        trouble = self._lost or self._scripts.trouble
        refusing = (
            f"Redis: {trouble}" if trouble else next(iter(self._full_sessions.values()), None)
        )
        return Health(refusing, None, has_file=False, at_risk=self._at_risk)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for session, lease in self._leases.items():
            with contextlib.suppress(StoreUnavailable):
                await self._scripts.run(session, "end_lease", lease=lease.name)
        await self._scripts.close()
