"""What the file store promises beyond the contract: the JSON behind the commit, failing disks."""

import asyncio
import itertools
import json
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.model import (
    Accepted,
    AskForLink,
    Bind,
    Delivered,
    Delivery,
    Moment,
    Requeue,
    Retry,
    TenantId,
    UserId,
)
from gateway.errors import StoreUnavailable
from gateway.store import Limits, Store, retry_after
from gateway.store.files import dedup, deliveries, journal, mappings
from gateway.store.files import store as store_module
from gateway.store.files.dedup import DedupKeys
from gateway.store.files.scheduler import Head
from gateway.store.files.store import FileStore
from tests.conftest import LIMITS, wait_until
from tests.contract.test_model import Play, play
from tests.messages import ALI, NOW, OMAR, SARA, by_the_rules, message, user


class Disk:
    """The real one, unless it is told to fail."""

    def __init__(self) -> None:
        self.fails_commit = False
        self.fails_rollback = False
        self.fails_file = False
        self.fails_at_random: random.Random | None = None
        self.poison: str | None = None  # an INSERT that names it fails at its commit
        self.commits = 0
        self.writes = 0

    def connect(self, path: Path) -> sqlite3.Connection:
        disk = self
        journal.connect(path).close()  # as it should be

        class Connection(sqlite3.Connection):
            poisoned = False
            changes_before = 0

            def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
                if disk.poison and disk.poison in tuple(parameters):
                    self.poisoned = True
                if sql == "COMMIT":
                    disk.commits += 1
                    chance = disk.fails_at_random
                    wrote = self.total_changes > self.changes_before
                    unlucky = wrote and chance is not None and chance.random() < 0.2
                    if disk.fails_commit or self.poisoned or unlucky:
                        raise sqlite3.OperationalError("database or disk is full")
                if sql.startswith("BEGIN"):
                    self.changes_before = self.total_changes
                if sql == "ROLLBACK":
                    self.poisoned = False
                    if disk.fails_rollback:
                        raise sqlite3.OperationalError("disk I/O error")
                return super().execute(sql, parameters)

        return sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, factory=Connection
        )

    def write_file(self, path: Path, data: bytes) -> None:
        self.writes += 1
        if self.fails_file:
            raise OSError(28, "No space left on device")
        mappings.replace_file(path, data)


@pytest.fixture
def disk() -> Disk:
    return Disk()


Open = Callable[..., Awaitable[FileStore]]


@pytest.fixture
async def open_files(tmp_path: Path, disk: Disk) -> AsyncIterator[Open]:
    opened: list[FileStore] = []

    async def open_(limits: Limits = LIMITS, **how: Any) -> FileStore:
        if opened:
            await opened.pop().close()
        opened.append(
            await FileStore.open(
                tmp_path, limits, write_file=disk.write_file, connect_to=disk.connect, **how
            )
        )
        return opened[-1]

    yield open_
    for store in opened:
        await store.close()


async def say(store: FileStore, text: str, user: str = ALI, **how: Any) -> Accepted:
    inbound = message(text, user, **how)
    return await store.accept(inbound, by_the_rules(inbound))


def in_file(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "router_mappings.json").read_text())


async def test_the_lock_is_in_the_file_right_after_the_answer(
    open_files: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAPPINGS_WAIT_SECONDS", 10.0)  # this disk may be slow today
    store = await open_files()
    await say(store, "start_realty_2")
    assert in_file(tmp_path) == {ALI: 2}
    await store.unlock(user(ALI))
    assert in_file(tmp_path) == {}
    assert not (tmp_path / "router_mappings.json.tmp").exists()


async def test_one_rewrite_carries_all_changes_so_far(
    open_files: Open, disk: Disk, tmp_path: Path
) -> None:
    store = await open_files()
    people = [f"97150{number:07}" for number in range(500)]
    await asyncio.gather(*(say(store, "start_realty_2", who) for who in people))
    await wait_until(lambda: len(in_file(tmp_path)) == 500)
    assert disk.writes < 100


async def test_many_messages_share_one_commit(open_files: Open, disk: Disk) -> None:
    store = await open_files()
    before = disk.commits
    await asyncio.gather(*(say(store, "hello", f"97150{n:07}") for n in range(200)))
    assert disk.commits - before < 20


async def test_while_the_file_cannot_be_written_locks_are_safe_in_the_database(
    open_files: Open, disk: Disk, tmp_path: Path
) -> None:
    store = await open_files()
    disk.fails_file = True
    accepted = await asyncio.wait_for(say(store, "start_realty_2"), 5)
    assert accepted.decision == Bind(2)  # type: ignore[arg-type]
    assert in_file(tmp_path) == {}
    trouble = store.health().mappings_behind
    assert trouble is not None
    assert "No space left" in trouble
    assert store.health().refusing is None

    store = await open_files()  # it may end and start, too
    assert in_file(tmp_path) == {ALI: 2}
    assert store.totals() == (1, 1)


async def test_the_file_catches_up_by_itself(
    open_files: Open, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_RETRY_SECONDS", 0.01)
    store = await open_files()
    disk.fails_file = True
    await say(store, "start_realty_2")
    disk.fails_file = False
    await wait_until(lambda: in_file(tmp_path) == {ALI: 2})
    await wait_until(lambda: store.health().mappings_behind is None)


async def test_a_commit_that_fails_promises_nothing_and_keeps_nothing(
    open_files: Open, disk: Disk, tmp_path: Path
) -> None:
    store = await open_files()
    inbound = message("start_realty_2")
    disk.fails_commit = True
    with pytest.raises(StoreUnavailable) as refused:
        await store.accept(inbound, by_the_rules(inbound))
    assert refused.value.retry_after == 2
    assert store.totals() == (0, 0)
    refusing = store.health().refusing
    assert refusing is not None
    assert "disk is full" in refusing

    disk.fails_commit = False
    assert (await store.accept(inbound, by_the_rules(inbound))).decision == Bind(2)  # type: ignore[arg-type]
    assert store.health().refusing is None
    await wait_until(lambda: in_file(tmp_path) == {ALI: 2})
    assert len(await store.claim(10, wait=0)) == 1


async def test_after_ten_seconds_of_trouble_waha_is_asked_to_wait_longer(
    open_files: Open, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_files()
    disk.fails_commit = True
    with pytest.raises(StoreUnavailable):
        await say(store, "start_realty_2")
    monkeypatch.setattr(retry_after, "_LONG_TROUBLE_SECONDS", -1.0)
    with pytest.raises(StoreUnavailable) as refused:
        await say(store, "start_realty_2")
    assert refused.value.retry_after == 20


async def test_it_heals_without_traffic(
    open_files: Open, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_TEST_SECONDS", 0.01)
    store = await open_files()
    disk.fails_commit = True
    with pytest.raises(StoreUnavailable):
        await say(store, "start_realty_2")
    assert store.health().refusing
    disk.fails_commit = False
    await wait_until(lambda: store.health().refusing is None)


async def test_a_transaction_that_cannot_be_undone_ends_the_trust(
    open_files: Open, disk: Disk
) -> None:
    reasons: list[str] = []
    store = await open_files(on_corruption=reasons.append)
    disk.fails_commit = disk.fails_rollback = True
    with pytest.raises(StoreUnavailable):
        await say(store, "start_realty_2")
    disk.fails_commit = disk.fails_rollback = False
    with pytest.raises(StoreUnavailable):
        await say(store, "start_realty_2")
    assert reasons == ["a failed transaction cannot be undone: disk I/O error"]
    assert store.health().refusing


async def test_in_a_batch_that_fails_only_the_culprit_is_refused(
    open_files: Open, disk: Disk
) -> None:
    store = await open_files()
    culprit = message("start_realty_3", SARA)
    disk.poison = culprit.idempotency_key
    results = await asyncio.gather(
        say(store, "start_realty_2", ALI),
        store.accept(culprit, by_the_rules(culprit)),
        say(store, "start_realty_4", OMAR),
        say(store, "hello", ALI),
        return_exceptions=True,
    )
    assert [isinstance(one, StoreUnavailable) for one in results] == [False, True, False, False]
    assert store.totals() == (2, 2)
    claimed = await store.claim(10, wait=0)
    assert {one.user for one in claimed} == {ALI, OMAR}


async def test_a_copy_of_a_message_whose_commit_failed_is_the_first(
    open_files: Open, disk: Disk
) -> None:
    store = await open_files()
    inbound = message("start_realty_2")
    disk.fails_commit = True
    with pytest.raises(StoreUnavailable):
        await store.accept(inbound, by_the_rules(inbound))
    disk.fails_commit = False
    assert (await store.accept(inbound, by_the_rules(inbound))).decision is not None


async def test_a_settle_that_fails_can_be_repeated(open_files: Open, disk: Disk) -> None:
    store = await open_files()
    await say(store, "start_realty_2")
    await say(store, "next")
    (first,) = await store.claim(10, wait=0)
    disk.fails_commit = True
    with pytest.raises(StoreUnavailable):
        await store.settle(first, Delivered())
    assert await store.claim(10, wait=0) == [], "its line is still held"
    disk.fails_commit = False
    await store.settle(first, Delivered())
    assert len(await store.claim(10, wait=0)) == 1


async def test_a_full_disk_refuses_before_anything_is_written(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_files(Limits(min_free_disk_bytes=2**62))
    with pytest.raises(StoreUnavailable, match="MB are needed"):
        await say(store, "start_realty_2")
    assert store.health().refusing
    monkeypatch.setattr(retry_after, "_LONG_TROUBLE_SECONDS", -1.0)
    with pytest.raises(StoreUnavailable) as refused:
        await say(store, "start_realty_2")
    assert refused.value.retry_after == 20


async def test_history_shows_every_change_and_every_link_that_changed_none(
    open_files: Open, tmp_path: Path
) -> None:
    store = await open_files()
    await say(store, "start_realty_2", sent=NOW - 9, bare_id="A1")
    await say(store, "start_realty_5", sent=NOW - 8, bare_id="A2")
    await say(store, "start_realty_2", sent=NOW - 8.5, raised=NOW - 8.5, bare_id="A3")
    await say(store, "see start_realty_2", sent=NOW - 7, bare_id="A4")
    await say(store, "start_realty_5", sent=NOW - 6, bare_id="A5")
    await store.unlock(user(ALI))
    rows = sqlite3.connect(tmp_path / "router.db").execute(
        "SELECT user, kind, from_tenant, to_tenant, message_id, changed_second NOT NULL"
        " FROM history ORDER BY id"
    )
    assert rows.fetchall() == [
        (ALI, "locked", None, 2, "A1", 1),
        (ALI, "moved", 2, 5, "A2", 1),
        (ALI, "stale", 5, 2, "A3", 0),
        (ALI, "quoted", 5, 2, "A4", 0),
        (ALI, "confirmed", 5, 5, "A5", 1),
        (ALI, "unlocked", 5, None, None, 1),
    ]


async def test_seen_keys_last_48_hours_and_are_then_emptied_little_by_little(
    open_files: Open, tmp_path: Path
) -> None:
    store = await open_files()
    hour = 3600.0
    await say(store, "hello", bare_id="A1", now=NOW)
    assert (await say(store, "hello", bare_id="A1", now=NOW + 47 * hour)).decision is None
    assert (await say(store, "hello", bare_id="A1", now=NOW + 97 * hour)).decision == AskForLink(
        hold=True
    )

    connection = sqlite3.connect(tmp_path / "router.db")
    tables = ("dedup_0", "dedup_1", "dedup_2")

    def rows() -> int:
        return sum(connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables)

    assert rows() == 2
    keys = DedupKeys(connection)
    for days in range(0, 14, 2):
        keys.purge(connection, NOW + 97 * hour + days * 24 * hour)
    connection.commit()
    assert rows() == 0
    connection.close()


async def test_many_old_keys_go_faster_than_the_maintenance_looks(
    open_files: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "CHUNK", 10)
    monkeypatch.setattr(store_module, "_MAINTENANCE_SECONDS", 1.0)
    monkeypatch.setattr(store_module, "_SWEEP_SECONDS", 0.001)
    now = NOW
    store = await open_files(clock=lambda: now)
    await asyncio.gather(*(say(store, "hello", bare_id=f"A{n}", now=NOW) for n in range(200)))
    now = NOW + 97 * 3600
    connection = sqlite3.connect(tmp_path / "router.db")
    tables = " UNION ALL ".join(f"SELECT * FROM dedup_{n}" for n in range(3))
    left = f"SELECT count(*) FROM ({tables})"
    await wait_until(lambda: connection.execute(left).fetchone() == (0,))
    connection.close()


async def test_a_start_with_a_clock_that_went_back_forgets_no_key(
    open_files: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store_module, "_MAINTENANCE_SECONDS", 0.01)
    store = await open_files(clock=lambda: NOW)
    await say(store, "start_realty_2", bare_id="A1", now=NOW)
    connection = sqlite3.connect(tmp_path / "router.db")
    period = "SELECT value FROM meta WHERE name = 'dedup_period'"
    await wait_until(lambda: connection.execute(period).fetchone())
    connection.close()
    earlier = NOW - DedupKeys.PERIOD_SECONDS
    store = await open_files(clock=lambda: earlier)
    sweep, sweeps = store._sweep, 0

    async def counted() -> bool:
        nonlocal sweeps
        more = await sweep()
        sweeps += 1
        return more

    monkeypatch.setattr(store, "_sweep", counted)
    await wait_until(lambda: sweeps)
    assert (await say(store, "start_realty_2", bare_id="A1", now=earlier)).decision is None


async def test_very_many_backoffs_end_in_steps(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "CHUNK", 10)
    store = await open_files()
    for number in range(35):
        await say(store, "start_realty_2", f"97150{number:07}")
    for delivery in await store.claim(100, wait=0):
        outcome = Retry(3600.0, "503", poison=False, tried_at=time.time(), age=0.0)
        await store.settle(delivery, outcome)
    assert await store.claim(100, wait=0) == []
    await store.make_due()
    assert len(await store.claim(100, wait=0)) == 35


async def test_a_clock_that_goes_back_delays_nobody(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MAINTENANCE_SECONDS", 0.01)
    monkeypatch.setattr(deliveries, "CHUNK", 30)  # it takes more than one step
    now = NOW
    store = await open_files(clock=lambda: now)
    for number in range(100):  # more than are kept in memory
        await say(store, "start_realty_2", f"97150{number:07}", now=NOW)
    now = NOW - 86_400
    claimed: list[Delivery] = []
    while len(claimed) < 100:
        claimed += await asyncio.wait_for(store.claim(100, wait=5), 10)
    assert len({one.user for one in claimed}) == 100


class PlayOnABadDisk(Play):
    """Every few commits fail: what is refused leaves no trace, what is promised is kept."""

    async def open(self) -> Store:
        self.disk = Disk()
        self.disk.fails_at_random = random.Random(self.seed())
        folder = Path(self.url.removeprefix("file:"))
        return await FileStore.open(folder, LIMITS, connect_to=self.disk.connect)

    def seed(self) -> int:
        return next(self.numbers)

    def teardown(self) -> None:
        self.disk.fails_at_random = None
        super().teardown()


def test_play_on_a_bad_disk(tmp_path: Path) -> None:
    numbers = itertools.count()
    play(PlayOnABadDisk, lambda: f"file:{tmp_path / str(next(numbers))}", examples=40)


async def test_held_messages_are_deleted_when_their_time_is_over(
    open_files: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MAINTENANCE_SECONDS", 0.01)
    now = NOW
    store = await open_files(clock=lambda: now)
    await say(store, "hello", now=NOW)
    connection = sqlite3.connect(tmp_path / "router.db")

    def held() -> int:
        count: int = connection.execute("SELECT count(*) FROM held").fetchone()[0]
        return count

    assert held() == 1
    now = NOW + 901
    await wait_until(lambda: held() == 0)
    connection.close()


async def test_a_change_made_during_a_rewrite_keeps_its_redo_row(
    open_files: Open, disk: Disk, tmp_path: Path
) -> None:
    """Only what is in the file that was written may be forgotten."""
    store = await open_files()
    writing, go_on = threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        writing.set()
        go_on.wait(10)
        mappings.replace_file(path, data)

    store._mappings._write_file = slow
    await say(store, "start_realty_2")
    assert await asyncio.to_thread(writing.wait, 10)
    await say(store, "start_realty_3", SARA)
    connection = sqlite3.connect(tmp_path / "router.db")

    def redo() -> list[tuple[str, int]]:
        return connection.execute("SELECT user, tenant FROM lock_redo").fetchall()

    assert redo() == [(ALI, 2), (SARA, 3)]
    writing.clear()
    disk.fails_file = True
    store._mappings._write_file = disk.write_file
    go_on.set()
    await wait_until(lambda: redo() == [(SARA, 3)])
    assert in_file(tmp_path) == {ALI: 2}
    disk.fails_file = False
    await open_files()
    assert in_file(tmp_path) == {ALI: 2, SARA: 3}
    await wait_until(lambda: redo() == [])
    connection.close()


def test_the_database_is_opened_as_the_promises_need_it(tmp_path: Path) -> None:
    connection = journal.connect(tmp_path / "router.db")

    def pragma(name: str) -> object:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2  # FULL: the WAL is synced at every commit
    assert pragma("secure_delete") == 1
    connection.close()


async def test_the_backlog_counts_those_in_the_same_commit(open_files: Open) -> None:
    store = await open_files(Limits(max_backlog=3, min_free_disk_bytes=0))
    calls = (say(store, "start_realty_2", f"9715000000{n}") for n in range(8))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(one, Accepted) for one in results) == 3


async def test_a_publish_that_fails_does_not_stop_the_others(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_files()
    publish = store._publish

    def fails(changes: Any) -> None:
        monkeypatch.setattr(store, "_publish", publish)
        raise RuntimeError("stumbled")

    monkeypatch.setattr(store, "_publish", fails)
    with pytest.raises(RuntimeError):
        await say(store, "start_realty_2")
    await asyncio.wait_for(say(store, "start_realty_3", SARA), 5)


async def test_close_writes_what_changed_during_the_last_rewrite(
    open_files: Open, tmp_path: Path
) -> None:
    store = await open_files()

    def slow(path: Path, data: bytes) -> None:
        time.sleep(0.1)
        mappings.replace_file(path, data)

    store._mappings._write_file = slow
    await asyncio.gather(*(say(store, "start_realty_2", f"9715000000{n}") for n in range(3)))
    await say(store, "start_realty_2", SARA)
    await store.close()
    assert len(in_file(tmp_path)) == 4
    connection = sqlite3.connect(tmp_path / "router.db")
    assert connection.execute("SELECT count(*) FROM lock_redo").fetchone() == (0,)
    connection.close()
    await open_files()


async def test_what_was_put_back_under_a_wrong_clock_is_due_when_it_is_right(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = NOW
    store = await open_files(clock=lambda: now)
    await say(store, "start_realty_2")
    (first,) = await store.claim(1, wait=0)
    await store.settle(first, Retry(1.0, "503", poison=False, tried_at=now, age=0))
    now = NOW + 365 * 86_400
    (again,) = await store.claim(1, wait=5)
    await store.settle(again, Requeue())
    now = NOW + 60
    store = await open_files(clock=lambda: now)
    assert len(await store.claim(1, wait=5)) == 1


async def test_a_failed_read_of_a_head_forgets_nothing_newer(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_files()
    await say(store, "start_realty_2", raised=NOW - 5)
    store._scheduler.forget_all()  # so that it must be read
    with monkeypatch.context() as broken:

        def fails(*_: Any) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        broken.setattr(deliveries, "load", fails)
        claiming = asyncio.create_task(store.claim(1, wait=5))
        with pytest.raises(StoreUnavailable):
            await claiming
        await say(store, "older", raised=NOW - 9)
    (delivery,) = await store.claim(1, wait=5)
    assert b"older" in delivery.body


async def test_what_was_acknowledged_while_a_head_is_read_back_goes_before_it(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_files()
    await say(store, "start_realty_2", raised=NOW - 5)
    store._scheduler.forget_all()  # so that it must be read
    read = store._read

    async def late(heads: list[Head]) -> list[Delivery]:
        monkeypatch.setattr(store, "_read", read)
        await say(store, "older", raised=NOW - 9)
        return await read(heads)

    monkeypatch.setattr(store, "_read", late)
    arrived: list[bytes] = []
    while len(arrived) < 2:
        for delivery in await store.claim(10, wait=0):
            arrived.append(delivery.body)
            await store.settle(delivery, Delivered())
    assert b"older" in arrived[0]


async def test_a_message_beside_the_healing_of_the_clock_does_not_bring_the_wrong_time_back(
    open_files: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was loaded in the same transaction, from memory."""
    monkeypatch.setattr(store_module, "_MAINTENANCE_SECONDS", 10_000)
    now = NOW + 3600.0  # ahead
    store = await open_files(clock=lambda: now)
    await store.lock(UserId(ALI), TenantId(2))
    await say(store, "hello")
    now = NOW + 5.0

    async def write(who: int) -> None:
        for number in range(30):
            await say(store, f"hello {who} {number}")

    await asyncio.gather(store._heal_clock_step(now, 3595.0), *map(write, range(8)))
    assert (await store.lock_of(UserId(ALI)))[1].changed <= Moment.of(now)


async def test_a_dry_run_counts_what_waits_once(open_files: Open) -> None:
    store = await open_files(limits=replace(LIMITS, max_backlog=4))
    inbound = message("hello")
    # The first is committed alone; the others and what the dry run asks for share the next commit.
    *_, found = await asyncio.gather(
        say(store, "start_realty_2", OMAR),
        say(store, "start_realty_2"),
        say(store, "start_realty_2", SARA),
        store.dry_run(inbound, by_the_rules(inbound)),
    )
    assert found.refused is None


async def test_a_user_who_opens_his_link_again_and_again_takes_no_more_memory(
    open_files: Open,
) -> None:
    store = await open_files()
    for number in range(50):
        await say(store, "start_realty_2", sent=NOW + number, now=NOW + number)
    known = await store.load((UserId(ALI),))
    assert known.person(UserId(ALI)).lock_changes == ()
    assert known.seen == ()
