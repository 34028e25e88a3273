"""Group commit: many callers share one SQLite transaction, and wait for its fsync together.

Everything that touches the connection runs here, one batch after the other: the statements in the
event loop (they only change memory), the COMMIT with its fsync in a thread, without the GIL. While
it runs the next batch gathers. Statements in the thread would be slower: each one gives up the GIL
and must win it back from a busy event loop (switch interval 5 ms).
"""

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gateway.errors import StartRefused, StoreUnavailable
from gateway.store.files import formats
from gateway.store.files.identity import Identity
from gateway.store.retry_after import RetryAfter

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Committed = Callable[[float, int], None]  # how many seconds a commit took, of how many operations

_BATCH = 256
_TEST_SECONDS = 5.0  # between the store's tests of itself while it fails
_CHECK_SECONDS = 1.0  # of the start spent on looking for damage
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)  # low byte of a result code
SUSPECT_NAME = "router.suspect"  # in the folder: the next start checks the whole database
_OLD_SUSPECT_NAME = "router.distrust"  # as routers before format 2 call it
_PRAGMAS = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = ON;
PRAGMA busy_timeout = 5000;
PRAGMA temp_store = MEMORY;
PRAGMA journal_size_limit = 67108864;
"""

log = logging.getLogger(__name__)


def connect(path: Path) -> sqlite3.Connection:
    """Open the database and create what it lacks; raise StartRefused if SQLite calls it damaged."""
    if sqlite3.sqlite_version_info < (3, 35):
        raise StartRefused(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
    marks = [path.with_name(name) for name in (SUSPECT_NAME, _OLD_SUSPECT_NAME)]
    try:
        path = path.resolve()  # SQLite keeps the WAL beside the file itself, not beside a link
        if path.exists():
            rewrite_from_disk(path.with_name(path.name + "-wal"))
            if damage := _first_damage(
                path, math.inf if any(one.exists() for one in marks) else _CHECK_SECONDS
            ):
                raise StartRefused(
                    f"{path}: SQLite calls it damaged ({damage}): put the back-up in its place,"
                    " without its -wal and -shm"
                )
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.executescript(_PRAGMAS)
        formats.set_up(connection, path)
        for mark in marks:
            mark.unlink(missing_ok=True)
    except (sqlite3.OperationalError, OSError) as exc:
        raise StartRefused(f"{path}: {exc}: check the disk, the owner and the rights") from exc
    except sqlite3.Error as exc:
        raise StartRefused(
            f"{path}: SQLite cannot use it ({exc}): put the back-up in its place, without its -wal"
            " and -shm; it holds the messages that wait, so do not delete it lightly"
        ) from exc
    return connection


def rewrite_from_disk(wal: Path) -> None:
    """Write the WAL's bytes once more and sync them, before SQLite builds anything on them.

    A commit whose fsync failed is shown to the next process that reads the file, though the disk
    lacks it and no later fsync brings it there (Rebello et al., "Can Applications Recover from
    fsync Failures?", USENIX ATC 2020). SQLite would believe it: a copy of its message would be
    answered as a duplicate, and a checkpoint would mix old and new pages if the power fails in it.
    """
    with contextlib.suppress(FileNotFoundError), wal.open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _first_damage(path: Path, seconds: float) -> str | None:
    """What quick_check finds within so many seconds; the rest of a large file is not looked at.

    Read-only: the last writer to close would write the WAL into a damaged database.
    """
    deadline = time.monotonic() + seconds
    uri = f"{path.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as exc:
            # The first start died before there was a WAL: opened for writing, it is undone.
            half_made = exc.sqlite_errorcode == sqlite3.SQLITE_READONLY_ROLLBACK
            if "interrupted" not in str(exc) and not half_made:
                raise
            return None
    return None if found == "ok" else " ".join(str(found).split())


@dataclass(slots=True)
class _Entry:
    work: Work[Any]
    publish: Callable[[Any], None] | None
    done: asyncio.Future[Any]
    prepare: Callable[[], Work[Any]] | None = None  # in place of work: in the thread, alone


class Journal:
    """The one writer. trouble is why it cannot commit, None while it can.

    on_corruption is called, once, with the reason when the database cannot be trusted any longer:
    SQLite calls it damaged, a failed transaction cannot be undone, its files are no longer where
    they were, or refuse() is called. Nothing is committed from then on.

    identity: of the database's files, checked after each commit, before anybody is answered.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        on_corruption: Callable[[str], None],
        committed: Committed = lambda _seconds, _operations: None,
        identity: Identity | None = None,
    ) -> None:
        self.trouble: str | None = None
        self.retry_after = RetryAfter()
        self._identity = identity
        self._put_back = False  # the files are gone, and what is open is all there is
        self.batch = 0  # number of the transaction that runs, or ran last
        self._connection = connection
        self._on_corruption = on_corruption
        self._committed = committed
        self._suspect: str | None = None
        self._queue: list[_Entry] = []
        self._filled = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._task = asyncio.create_task(self._commit_batches())
        self._tester: asyncio.Task[None] | None = None

    async def run(self, work: Work[T], publish: Callable[[T], None] | None = None) -> T:
        """work's result, once all that it wrote is durable; raise StoreUnavailable if it is not.

        work must be quick, and may run twice: after a batch failed, each of it is committed alone.
        publish is called with the result after the commit, in the order of the runs: it is where
        memory may follow the disk.
        """
        result: T = await self._enqueue(_Entry(work, publish, _future()))
        return result

    async def run_long(self, prepare: Callable[[], Work[T]], publish: Callable[[T], None]) -> T:
        """As run(), for work that would hold up the event loop: it runs in the thread, and others
        wait for their commits meanwhile, but for nothing else.

        prepare is called in the event loop when its turn has come, and returns the work. That may
        use the connection, and what nobody changes before its commit is published.
        """
        result: T = await self._enqueue(_Entry(_nothing, publish, _future(), prepare))
        return result

    async def _enqueue(self, entry: _Entry) -> Any:
        if self._closing:
            raise StoreUnavailable("the store is closing")
        self._queue.append(entry)
        self._filled.set()
        return await entry.done

    @property
    def in_transaction(self) -> bool:
        """Whether works have run that are not committed yet."""
        return self._connection.in_transaction

    async def close(self) -> None:
        """Commit what is queued, then close the file."""
        self._closing = True
        if self._tester:
            self._tester.cancel()
        self._filled.set()
        await self._task
        self._thread.shutdown()
        if self._identity and self._put_back:
            self._try_to_put_back(self._identity)
        try:
            self._connection.close()
        except sqlite3.Error as exc:
            log.error("router.db: %s", exc, extra={"event": "store.failed"})

    async def _commit_batches(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._queue:
                size = self._batch_size()
                batch, self._queue = self._queue[:size], self._queue[size:]
                await self._commit_or_single_out(batch)
            if self._closing:
                return

    def _batch_size(self) -> int:
        for place, entry in enumerate(self._queue[:_BATCH]):
            if entry.prepare:
                return place or 1
        return _BATCH

    async def _commit_or_single_out(self, batch: list[_Entry]) -> None:
        try:
            results = await self._commit(batch)
        except Exception as exc:
            if len(batch) == 1:
                self._fail(batch[0], exc)
                return
            for entry in batch:
                await self._commit_or_single_out([entry])
            return
        for entry, result in zip(batch, results, strict=True):
            self._announce(entry, result)

    def _announce(self, entry: _Entry, result: Any) -> None:
        try:
            if entry.publish:
                entry.publish(result)
        except Exception as exc:  # it is durable all the same, and the others' turn must come
            log.exception("memory did not follow the disk", extra={"event": "store.error"})
            if not entry.done.done():
                entry.done.set_exception(exc)
        if not entry.done.done():
            entry.done.set_result(result)

    async def _commit(self, batch: list[_Entry]) -> list[Any]:
        connection = self._connection
        if self._suspect:
            raise self.retry_after.unavailable(self._suspect)
        self.batch += 1
        try:
            connection.execute("BEGIN IMMEDIATE")
            changes = connection.total_changes
            if prepare := batch[0].prepare:
                loop = asyncio.get_running_loop()
                results = [await loop.run_in_executor(self._thread, prepare(), connection)]
            else:
                results = [entry.work(connection) for entry in batch]
            if connection.total_changes == changes:
                reason = self._commit_and_check()
            else:
                loop, began = asyncio.get_running_loop(), time.perf_counter()
                reason = await loop.run_in_executor(self._thread, self._commit_and_check)
                self._committed(time.perf_counter() - began, len(batch))
                if not reason:
                    self._is_healthy()
            if reason:
                self._lose_files(reason)
                raise self.retry_after.unavailable(f"router.db: {reason}")
        except BaseException:
            self._roll_back()
            raise
        return results

    def _commit_and_check(self) -> str | None:
        self._connection.execute("COMMIT")
        return self._identity.why_not_ours() if self._identity else None

    def check(self) -> None:
        """Leave if the database's files are no longer where they were."""
        if self._identity and (reason := self._identity.why_not_ours()):
            self._lose_files(reason)

    def _lose_files(self, reason: str) -> None:
        if self._suspect is None:
            self._put_back = True
            self.refuse(reason)

    def _try_to_put_back(self, identity: Identity) -> None:
        """What was acknowledged is in no file that the next start would find."""
        try:
            if not identity.can_be_put_back():
                log.critical(
                    "router.db is left as it is: what is in its place is not ours",
                    extra={"event": "store.lost"},
                )
                return
            identity.put_back(self._connection)
        except (OSError, sqlite3.Error) as exc:
            log.critical(
                "router.db cannot be put back (%s): what waited in it is lost",
                exc,
                extra={"event": "store.lost"},
            )
        else:
            log.warning(
                "router.db is put back, with all that was in it: the next start goes on with it",
                extra={"event": "store.file_restored"},
            )

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as exc:
                self.refuse(f"a failed transaction cannot be undone: {exc}")

    def _fail(self, entry: _Entry, exc: Exception) -> None:
        error: Exception = exc
        if isinstance(exc, sqlite3.Error):
            if not isinstance(exc, sqlite3.DataError | sqlite3.IntegrityError):
                self._unwell(exc)
            error = self.retry_after.unavailable(f"router.db: {exc}")
            error.__cause__ = exc
        if not entry.done.done():
            entry.done.set_exception(error)

    def refuse(self, reason: str) -> None:
        """Commit nothing any more, and leave, for that reason; once."""
        if self._suspect is None:
            self._suspect = self.trouble = reason
            log.critical(
                "What is kept cannot be trusted any longer (%s): the router ends; the next start"
                " looks for damage, and says what to do",
                reason,
                extra={"event": "store.suspect"},
            )
            self._on_corruption(reason)

    def _unwell(self, exc: sqlite3.Error) -> None:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
            self.refuse(str(exc))
        if self.trouble is None:
            log.error(
                "router.db cannot be written (%s): webhooks get 503 until it can",
                exc,
                extra={"event": "store.failed"},
            )
            if not self._closing:
                self._tester = asyncio.create_task(self._test_until_healed())
        self.trouble = str(exc)

    def _is_healthy(self) -> None:
        self.retry_after.over()
        if self.trouble is not None:
            self.trouble = None
            log.warning("router.db is written again", extra={"event": "store.healed"})

    async def _test_until_healed(self) -> None:
        """A quiet night must not leave /health red: the store tests itself, traffic or not."""
        while self.trouble is not None and self._suspect is None:
            await asyncio.sleep(_TEST_SECONDS)
            try:
                await self.run(
                    lambda connection: connection.execute(
                        "INSERT OR REPLACE INTO meta VALUES ('tested', ?)", (time.time(),)
                    )
                )
            except StoreUnavailable:
                continue


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _nothing(_: sqlite3.Connection) -> None:
    """The work of an entry whose work is still to be prepared."""
