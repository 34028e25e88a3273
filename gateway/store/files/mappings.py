"""router_mappings.json: the locks and nothing else, {"971501234567": 2}.

The file is read at start and kept in memory. A rewrite carries all changes so far and replaces the
file atomically. A damaged file is never overwritten: the start is refused, with the cure.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from gateway.domain.model import LARGEST_TENANT, SESSION_NAME, TenantId, UserId
from gateway.errors import StartRefused
from gateway.store.files.identity import stamp

FILE_NAME = "router_mappings.json"
_USER = re.compile(rf"(?:{SESSION_NAME}/)?[0-9]{{5,20}}(?:@lid)?")
_AT_ONCE = 100_000  # locks encoded in one go: some 5 ms
_SLICE = 10_000  # of more: 1 to 2 ms, but most of that is the slicing
_LOAD_SHARE = 5  # under load a rewrite takes at most this part of the time
_RETRY_SECONDS = 5.0
_CURE = (
    "put the back-up in its place, or move the file away and run"
    " `python whatsapp_router.py rebuild`"
)

log = logging.getLogger(__name__)


def read(path: Path) -> dict[UserId, TenantId] | None:
    """The locks in the file, None if there is none; raise StartRefused if it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StartRefused(
            f"{path}: cannot be read ({exc.strerror}): check owner and rights"
        ) from exc
    try:
        locks = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise StartRefused(f"{path}: not JSON, or cut off ({exc}): {_CURE}") from exc
    check(path, locks)
    # No user holds a quote, and no tenant is text: the file has two quotes for each key.
    if data.count(b'"') != 2 * len(locks) or b"\\" in data:
        raise StartRefused(f"{path}: a user is in it twice, or with \\: keep one plain line")
    checked: dict[UserId, TenantId] = locks
    return checked


def check(path: Path, locks: object) -> None:
    """Raise StartRefused if locks are not what may be in path."""
    if not isinstance(locks, dict):
        raise StartRefused(f'{path}: must hold an object such as {{"971501234567": 2}}: {_CURE}')
    if _all_valid(locks):  # the usual case, of perhaps a million
        return
    for user, tenant in locks.items():
        if not isinstance(user, str) or not _USER.fullmatch(user):
            raise StartRefused(
                f"{path}: {str(user)[:60]!r} is no user: must be 5-20 digits or …@lid: {_CURE}"
            )
        if type(tenant) is not int or not 0 < tenant <= LARGEST_TENANT:
            raise StartRefused(
                f"{path}: the tenant of {user!r} is {str(tenant)[:60]!r}, "
                f"not a whole number of 1-{LARGEST_TENANT}: {_CURE}"
            )


def _all_valid(locks: dict[Any, Any]) -> bool:
    """What check() asks, in less time, without saying what is wrong."""
    tenants = locks.values()
    return (
        set(map(type, locks)) <= {str}
        and all(map(_USER.fullmatch, locks))
        and set(map(type, tenants)) <= {int}
        and min(tenants, default=1) > 0
        and max(tenants, default=1) <= LARGEST_TENANT
    )


def replace_file(path: Path, data: bytes) -> None:
    """Put data at path so that a crash leaves the old bytes or the new, never a mix."""
    temporary = path.with_name(path.name + ".tmp")  # same directory: the rename stays atomic
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)  # or the rename itself may be lost with the power


def encode(locks: dict[UserId, TenantId]) -> bytes:
    return orjson.dumps(locks) + b"\n"


class Mappings:
    """The locks in memory, and the file behind them.

    write_file is handed in so that tests can let it fail. written is called, in the event loop,
    with the number of the last change in the file, after each rewrite.
    """

    def __init__(
        self,
        path: Path,
        locks: dict[UserId, TenantId],
        *,
        written: Callable[[int], None],
        write_file: Callable[[Path, bytes], None] = replace_file,
    ) -> None:
        self.path = path
        self.trouble: str | None = None  # why the file lacks changes
        self._locks = locks
        # What changed while the locks are being encoded, and must not change under that.
        self._newer: dict[UserId, TenantId | None] | None = None
        self._of_tenant = Counter(locks.values())
        self._written = written
        self._write_file = write_file
        self._last_change = 0  # number of the newest change in memory
        self._in_file = 0  # number of the newest change in the file
        self._behind_since: float | None = None  # monotonic; None: it lacks none
        self._changed = asyncio.Event()
        self._waiters: dict[asyncio.Future[None], int] = {}  # for which change each waits
        self._closing = False
        self._writing = self._gone = False
        self._may_write = True
        self._stamp = _look_at(path)  # of the file as we know it
        self._has_file = self._stamp is not None  # or had one, if somebody has removed it
        self._task = asyncio.create_task(self._rewrite_behind())

    def __len__(self) -> int:
        return self._of_tenant.total()

    @property
    def tenants(self) -> int:
        return len(self._of_tenant)

    def of_tenants(self) -> dict[TenantId, int]:
        """How many users each tenant has, of those that have any."""
        return dict(self._of_tenant)

    def users_of(self, tenant: TenantId) -> list[UserId]:
        """May be called in a thread."""
        newer = dict(self._newer or {})  # first: if it is taken up meanwhile, nothing is missed
        locks = dict(self._locks)
        return [user for user, its in (locks | newer).items() if its == tenant]

    def get(self, user: UserId) -> TenantId | None:
        if self._newer is not None and user in self._newer:
            return self._newer[user]
        return self._locks.get(user)

    def users(self) -> list[UserId]:
        newer = self._newer or {}
        return [
            user
            for user in itertools.chain(self._locks, newer.keys() - self._locks.keys())
            if user not in newer or newer[user] is not None
        ]

    def change(self, user: UserId, tenant: TenantId | None, number: int) -> None:
        """Set or (None) remove a lock. number: of its lock_redo row, always growing."""
        before = self.get(user)
        if before is not None:
            self._of_tenant[before] -= 1
            if not self._of_tenant[before]:
                del self._of_tenant[before]
        if tenant is not None:
            self._of_tenant[tenant] += 1
        if self._newer is not None:
            self._newer[user] = tenant
        else:
            self._put(user, tenant)
        self._note_change(number)

    def move(self, users: list[UserId], old: TenantId, new: TenantId, number: int) -> None:
        """As change(), of users who are all locked to old."""
        (self._locks if self._newer is None else self._newer).update(dict.fromkeys(users, new))
        self._of_tenant[new] += len(users)
        del self._of_tenant[old]
        self._note_change(number)

    def _note_change(self, number: int) -> None:
        if self._behind_since is None:
            self._behind_since = time.monotonic()
        self._last_change = number
        self._changed.set()

    @property
    def lag(self) -> float:
        """Seconds for which the file has lacked a change; 0 if it lacks none."""
        return 0.0 if self._behind_since is None else time.monotonic() - self._behind_since

    def _put(self, user: UserId, tenant: TenantId | None) -> None:
        if tenant is None:
            self._locks.pop(user, None)
        else:
            self._locks[user] = tenant

    async def in_file(self, number: int, timeout: float) -> None:
        """Return when change `number` is in the file, or after timeout seconds."""
        if self._in_file >= number:
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        timer = loop.call_later(timeout, _end, waiter)
        self._waiters[waiter] = number
        try:
            await waiter
        finally:
            timer.cancel()
            del self._waiters[waiter]

    def _replace(self, data: bytes) -> None:
        if self._is_anothers():
            raise OSError("another file is in its place")
        try:
            self._write_file(self.path, data)
            self._has_file = True
        finally:
            # It may be in place though what came after that failed.
            self._stamp = _look_at(self.path)

    def _is_anothers(self) -> bool:
        now = _look_at(self.path)
        if self._stamp is None or now is None or now.inode == self._stamp.inode:
            return False
        # Some file systems of containers give a file another inode when they have forgotten it.
        return now.written != self._stamp.written

    def why_not_ours(self) -> str | None:
        """Who has removed or replaced our file, in words; None if nobody has."""
        if self._writing or not self._has_file:
            return None
        if stamp(self.path) is None:
            return f"{self.path} was removed while the router ran: it is written again"
        if self._is_anothers():
            return f"{self.path} was replaced by another while the router ran: that one stays"
        return None

    async def close(self, *, write: bool = True) -> None:
        """Write what is not in the file yet, once, however it goes; and the file, if it is gone.

        write: False if the folder is no longer ours.
        """
        self._closing, self._may_write = True, write
        with contextlib.suppress(OSError):
            self._gone = self._has_file and stamp(self.path) is None
        self._changed.set()
        await self._task

    async def _rewrite_behind(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            wrote = True
            if self._may_write and (self._last_change > self._in_file or self._gone):
                began = time.monotonic()
                wrote = await self._rewrite()
                took = time.monotonic() - began
                if not self._closing:
                    await self._pause(took * (_LOAD_SHARE - 1) if wrote else _RETRY_SECONDS)
                if not wrote:
                    self._changed.set()
            behind = self._last_change > self._in_file or self._gone
            done = not wrote or not self._may_write or not behind
            if self._closing and done:
                return
            if self._closing:
                self._changed.set()  # something changed during the last rewrite

    async def _rewrite(self) -> bool:
        number, began = self._last_change, time.monotonic()
        self._writing = True
        try:
            encoded = await self._encoded()
            await asyncio.to_thread(self._replace, encoded)
        except Exception as exc:  # whatever it is, the next rewrite must be tried
            if self.trouble is None:
                log.error(
                    "%s cannot be written (%s); locks are safe in router.db meanwhile",
                    self.path,
                    exc,
                    extra={"event": "mappings.failed"},
                )
            self.trouble = f"{self.path} cannot be written: {exc}"
            return False
        finally:
            self._writing = False
        if self.trouble is not None:
            log.warning("%s is written again", self.path, extra={"event": "mappings.healed"})
        self.trouble = None
        self._in_file, self._gone = number, False
        self._behind_since = None if number == self._last_change else began
        for waiter, wanted in self._waiters.items():
            if wanted <= number:
                _end(waiter)
        self._written(number)
        return True

    async def _encoded(self) -> bytes:
        """All locks as they are now, as encode() has them: if they are many in slices, between
        which others have their turn. What they change meanwhile is kept beside."""
        if len(self._locks) <= _AT_ONCE:
            return encode(self._locks)
        pieces: list[bytes] = []
        self._newer = {}
        try:
            locks = iter(self._locks.items())
            while some := dict(itertools.islice(locks, _SLICE)):
                pieces += (b"," if pieces else b"{", orjson.dumps(some)[1:-1])
                await asyncio.sleep(0)
        finally:
            # First there, then no longer here: users_of() in a thread misses none.
            for user, tenant in self._newer.items():
                self._put(user, tenant)
            self._newer = None
        return b"".join([*pieces, b"}\n"])

    async def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))


class _Stamp(NamedTuple):
    inode: tuple[int, int]  # with its device
    written: tuple[int, int]  # size, and when in nanoseconds


def _look_at(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _Stamp((found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns))


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
