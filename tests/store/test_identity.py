"""Files that vanish, are replaced, or can be read by others, under a running store."""

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.domain.model import Accepted, Delivered
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store.files import backup, mappings, opening
from gateway.store.files.mappings import Mappings
from gateway.store.files.store import FileStore
from tests.conftest import LIMITS, wait_until
from tests.messages import ALI, OMAR, SARA, by_the_rules, message, tenant, user


async def say(store: FileStore, text: str, user: str = ALI) -> Accepted:
    inbound = message(text, user)
    return await store.accept(inbound, by_the_rules(inbound))


def removed(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    os.replace(copy, path)


def emptied(path: Path) -> None:
    (path.parent / "new").write_bytes(b"")
    os.replace(path.parent / "new", path)


NAMES = ["router.db", "router.db-wal", "router.db-shm", "router_mappings.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [removed, replaced, emptied])
@pytest.mark.parametrize("busy", [True, False])
async def test_a_file_that_is_no_longer_ours_is_noticed_within_a_second(
    tmp_path: Path, name: str, how: Callable[[Path], None], busy: bool
) -> None:
    """200s went on, and after the restart 21 messages were gone."""
    reasons: list[str] = []
    store = await FileStore.open(tmp_path, LIMITS, on_corruption=reasons.append)
    await say(store, "start_realty_2")
    await say(store, "start_realty_3", SARA)
    await wait_until(lambda: store.health().mappings_lag == 0)
    how(tmp_path / name)
    if busy and name != "router_mappings.json":
        with pytest.raises(StoreUnavailable, match="while the router ran"):
            await say(store, "not promised", OMAR)
    await wait_until(lambda: reasons, seconds=1.5)
    assert name in reasons[0]
    assert "removed" in reasons[0] if how is removed else "replaced" in reasons[0]
    assert store.health().refusing
    with pytest.raises(StoreUnavailable):
        await say(store, "start_realty_4", OMAR)
    await store.close()
    if how is not removed:
        return  # whose files these are is not for us to say
    again = await FileStore.open(tmp_path, LIMITS)
    assert (await again.backlog()).by_tenant == {2: 1, 3: 1}
    assert again.totals() == (2, 2)
    for delivery in await again.claim(10, wait=1):
        await again.settle(delivery, Delivered())
    await again.close()


async def test_what_others_put_in_our_place_is_left_as_it_is(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path, LIMITS)
    await say(store, "start_realty_2")
    path = tmp_path / "router_mappings.json"
    theirs = path.with_name("theirs")
    theirs.write_text('{"971500000009": 9}\n')
    os.replace(theirs, path)
    await store.unlock(user(ALI))  # which would be written to the file
    await wait_until(lambda: store.health().refusing, seconds=2)
    await store.close()
    assert json.loads(path.read_text()) == {"971500000009": 9}


async def test_a_folder_that_is_replaced_gets_nothing_of_ours(tmp_path: Path) -> None:
    folder, reasons = tmp_path / "data", list[str]()
    store = await FileStore.open(folder, LIMITS, on_corruption=reasons.append)
    await say(store, "start_realty_2")
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    await wait_until(lambda: reasons, seconds=1.5)
    await store.close()
    assert list(folder.iterdir()) == []
    again = await FileStore.open(tmp_path / "moved", LIMITS)
    assert again.totals() == (1, 1)
    await again.close()


async def test_a_folder_that_is_removed_is_made_again_with_all_that_was_in_it(
    tmp_path: Path,
) -> None:
    folder, reasons = tmp_path / "data", list[str]()
    store = await FileStore.open(folder, LIMITS, on_corruption=reasons.append)
    await say(store, "start_realty_2")
    shutil.rmtree(folder)
    await wait_until(lambda: reasons, seconds=1.5)
    await store.close()
    again = await FileStore.open(folder, LIMITS)
    assert again.totals() == (1, 1)
    assert (await again.backlog()).waiting == 1
    await again.close()


@pytest.mark.parametrize("name", ["router.lock", None])
async def test_nobody_else_gets_in_though_the_lock_file_is_removed(
    tmp_path: Path, name: str | None
) -> None:
    store = await FileStore.open(tmp_path, LIMITS)
    if name:
        (tmp_path / name).unlink()
    with pytest.raises(StartRefused, match="another router uses this folder"):
        opening.take_folder(tmp_path)
    with pytest.raises(StartRefused, match="a router on files uses this folder"):
        opening.share_folder(tmp_path)
    await store.close()
    opening.take_folder(tmp_path).close()


# whose eyes


async def test_what_is_stored_is_nobody_elses_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    before = os.umask(0)
    try:
        store = await FileStore.open(folder, LIMITS)
        await say(store, "start_realty_2")
        await store.back_up()
        found = [folder, *folder.rglob("*")]
        assert {path.name for path in found} >= {*NAMES, "router.lock", "backup.new"}
        assert [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
        await store.close()
        assert opening.open_to_others(folder) == []
    finally:
        os.umask(before)


async def test_what_others_can_read_is_taken_from_them_at_the_start(tmp_path: Path) -> None:
    store = await FileStore.open(tmp_path, LIMITS)
    await say(store, "start_realty_2")
    await store.back_up()
    await store.close()
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    assert len(opening.open_to_others(tmp_path)) >= 4
    store = await FileStore.open(tmp_path, LIMITS)
    assert opening.open_to_others(tmp_path) == []
    await store.close()


@pytest.mark.parametrize("there", [True, False])
async def test_mappings_that_are_a_link_are_refused_not_replaced(
    tmp_path: Path, there: bool
) -> None:
    real = tmp_path / "real.json"
    if there:
        real.write_text('{"971501234567": 2}')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "router_mappings.json").symlink_to(real)
    with pytest.raises(StartRefused, match=r"router_mappings.json: is a link to .*real.json"):
        await FileStore.open(folder, LIMITS)
    assert (folder / "router_mappings.json").is_symlink()


# hostile back-ups


def endless(place: Path) -> None:
    (place / "SHA256SUMS").write_text(f"{'0' * 64}  /dev/zero\n")


def outside(place: Path) -> None:
    sums = (place / "SHA256SUMS").read_text()
    (place / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  ../router.db\n")


def linked(place: Path) -> None:
    (place / "router.db").rename(place.parent / "secret")
    (place / "router.db").symlink_to(place.parent / "secret")


def device(place: Path) -> None:
    (place / "router.db").unlink()
    (place / "router.db").symlink_to("/dev/zero")


def pipe(place: Path) -> None:
    (place / "router.db").unlink()
    os.mkfifo(place / "router.db")


def sums_are_a_pipe(place: Path) -> None:
    (place / "SHA256SUMS").unlink()
    os.mkfifo(place / "SHA256SUMS")


def sums_are_endless(place: Path) -> None:
    (place / "SHA256SUMS").unlink()
    (place / "SHA256SUMS").symlink_to("/dev/zero")


def a_folder(place: Path) -> None:
    (place / "router.db").unlink()
    (place / "router.db").mkdir()


@pytest.mark.parametrize(
    "hostile",
    [endless, outside, linked, device, pipe, sums_are_a_pipe, sums_are_endless, a_folder],
)
async def test_a_hostile_back_up_is_refused_and_changes_nothing(
    tmp_path: Path, hostile: Callable[[Path], None]
) -> None:
    store = await FileStore.open(tmp_path / "data", LIMITS)
    await say(store, "start_realty_2")
    place = await store.back_up()
    await store.close()
    place = place.rename(tmp_path / "backup")
    hostile(place)
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    async with asyncio.timeout(5):
        with pytest.raises(StartRefused):
            await asyncio.to_thread(backup.restore, place, tmp_path / "data")
    after = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert {p for p in before if p.name != "router.lock"} <= set(after)
    assert all(after[path] == before[path] for path in before if path.name != "router.lock")


# looked at by a thread


async def test_users_of_misses_nobody_while_a_large_file_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that were kept beside the locks were, for a moment, in neither."""
    monkeypatch.setattr(mappings, "_AT_ONCE", 10)
    monkeypatch.setattr(mappings, "_SLICE", 10)
    old = {user(f"9715{number:08}"): tenant(1) for number in range(200)}
    made = Mappings(tmp_path / "router_mappings.json", dict(old), written=lambda _: None)
    seen: list[int] = []
    put = made._put

    def watched(who: str, its: int | None) -> None:
        in_thread = threading.Thread(target=lambda: seen.append(len(made.users_of(tenant(2)))))
        in_thread.start()
        in_thread.join()
        put(user(who), tenant(its) if its else None)

    monkeypatch.setattr(made, "_put", watched)
    made.change(user("971600000000"), tenant(1), 1)  # a rewrite begins
    while made._newer is None:
        await asyncio.sleep(0)
    for number in range(50):
        made.change(user(f"9717{number:08}"), tenant(2), number + 2)
    await wait_until(lambda: made._newer is None)
    assert seen
    assert set(seen[1:]) == {50}
    await made.close()


# clocks


@pytest.mark.parametrize("restarted", [True, False])
async def test_what_a_clock_that_was_ahead_decided_no_longer_lies_in_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """Every link was stale for as long as the clock had been ahead, a year say."""
    monkeypatch.setattr("gateway.store.files.store._MAINTENANCE_SECONDS", 0.05)
    now, ahead = 1_782_900_000.0, 365 * 86_400.0
    clock = [now + ahead]
    store = await FileStore.open(tmp_path, LIMITS, clock=lambda: clock[0])
    await store.lock(user(ALI), tenant(2))
    await store.lock(user(SARA), tenant(2))
    await store.unlock(user(SARA))
    await store.lock(user(OMAR), tenant(2))
    await store.move(tenant(2), tenant(5))
    if restarted:
        await store.close()
        store = await FileStore.open(tmp_path, LIMITS, clock=lambda: clock[0] - ahead)
    else:
        clock[0] = now + 1

    async def changed(who: str) -> float:
        return (await store.lock_of(user(who)))[1].changed.fraction

    for who in (ALI, SARA, OMAR):
        while await changed(who) > now + 2:
            await asyncio.sleep(0.01)
        inbound = message("start_realty_7", who, sent=now + 5, now=now + 5)
        await store.accept(inbound, by_the_rules(inbound))
        assert (await store.lock_of(user(who)))[1].tenant == 7
    lines = await store.history(user(ALI), limit=10)
    assert max(line.at for line in lines) <= now + 10
    await store.close()


async def test_a_clock_that_is_behind_rewrites_no_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that starts without a clock of its own, before the network tells the time: else
    older links counted as newer once it does."""
    monkeypatch.setattr("gateway.store.files.store._MAINTENANCE_SECONDS", 0.02)
    now = 1_782_900_000.0
    clock = [now]
    store = await FileStore.open(tmp_path, LIMITS, clock=lambda: clock[0])
    await store.lock(user(ALI), tenant(2))
    inbound = message("start_realty_3", SARA, sent=now - 1, now=now)
    await store.accept(inbound, by_the_rules(inbound))
    before = await store.history(user(ALI), limit=10)
    clock[0] = 0.0  # while it runs
    await asyncio.sleep(0.3)
    await store.close()
    store = await FileStore.open(tmp_path, LIMITS, clock=lambda: now - 86_400)
    clock[0] = now + 10
    assert (await store.lock_of(user(ALI)))[1].changed.fraction == now
    assert await store.history(user(ALI), limit=10) == before
    await store.close()


async def test_a_slow_sweep_is_no_clock_that_has_gone_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.store.files.store._MAINTENANCE_SECONDS", 0.02)
    store = await FileStore.open(tmp_path, LIMITS)
    sweep, slow = store._sweep, [True]

    async def stalled() -> bool:
        if slow:
            slow.pop()
            await asyncio.sleep(1.0)
        return await sweep()

    monkeypatch.setattr(store, "_sweep", stalled)
    await store.lock(user(ALI), tenant(2))
    changed = (await store.lock_of(user(ALI)))[1].changed
    await asyncio.sleep(1.5)
    assert (await store.lock_of(user(ALI)))[1].changed == changed
    assert "gone back" not in caplog.text
    await store.close()


async def test_a_rewrite_that_fails_after_its_rename_is_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    fails = [True]

    def write(path: Path, data: bytes) -> None:
        mappings.replace_file(path, data)
        if fails:
            fails.pop()
            raise OSError(5, "Input/output error")

    store = await FileStore.open(tmp_path, LIMITS, on_corruption=reasons.append, write_file=write)
    monkeypatch.setattr(mappings, "_RETRY_SECONDS", 0.1)
    await say(store, "start_realty_2")
    await asyncio.sleep(1.2)
    assert reasons == []
    await wait_until(lambda: store.health().mappings_behind is None)
    await store.close()


async def test_keys_are_forgotten_in_time_though_the_clock_was_far_ahead(tmp_path: Path) -> None:
    """Else they gather for as long as it was ahead."""
    now, day = 1_782_900_000.0, 86_400.0
    clock = [now + 400 * day]
    store = await FileStore.open(tmp_path, LIMITS, clock=lambda: clock[0])
    one = message("start_realty_2", bare_id="A1", now=clock[0])
    await store.accept(one, by_the_rules(one))
    clock[0] = now

    async def known() -> bool:
        again = message("start_realty_2", bare_id="A1", now=clock[0])
        return (await store.are_known([again]))[0]

    def rows() -> int:
        with sqlite3.connect(tmp_path / "router.db") as database:
            queries = [f"SELECT count(*) FROM dedup_{turn}" for turn in range(3)]
            return sum(database.execute(query).fetchone()[0] for query in queries)

    await store._sweep()
    assert await known()
    clock[0] = now + 10 * day
    for _ in range(4):
        await store._sweep()
        clock[0] += 2 * day
    assert not await known()
    assert rows() == 0
    await store.close()


async def test_a_record_of_a_person_ends_with_what_it_says(tmp_path: Path) -> None:
    clock = [1_782_900_000.0]
    store = await FileStore.open(tmp_path, LIMITS, clock=lambda: clock[0])
    asks = message("hello", now=clock[0])
    await store.accept(asks, by_the_rules(asks, may_help=True))

    def rows() -> int:
        with sqlite3.connect(tmp_path / "router.db") as database:
            return int(database.execute("SELECT count(*) FROM person").fetchone()[0])

    clock[0] += 1
    await store._sweep()
    assert rows() == 1
    assert len(await store.help_waits()) == 1
    clock[0] += LIMITS.help_cooldown
    await store._sweep()
    assert rows() == 0
    await store.close()
