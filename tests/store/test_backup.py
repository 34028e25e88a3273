"""A back-up is consistent, checked, and brings everything back."""

import asyncio
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from gateway.domain.model import Selection
from gateway.errors import NoBackUp, StartRefused
from gateway.store import Limits, Store, open_store
from gateway.store.files import backup, opening
from gateway.store.files.store import FileStore
from tests.conftest import LIMITS
from tests.messages import ALI, OMAR, SARA, by_the_rules, message, user


async def say(store: Store, text: str, who: str) -> None:
    inbound = message(text, who)
    await store.accept(inbound, by_the_rules(inbound))


async def filled(folder: Path) -> Store:
    store = await open_store(f"file:{folder}", LIMITS)
    await say(store, "start_realty_2", ALI)
    await say(store, "start_realty_3", SARA)
    await say(store, "hello", ALI)
    return store


async def test_what_is_restored_is_what_was_there(tmp_path: Path) -> None:
    data = tmp_path / "data"
    store = await filled(data)
    (data / "tenants.json").write_text("{}")
    shutil.move(await store.back_up(), tmp_path / "kept")
    await say(store, "start_realty_9", OMAR)
    await say(store, "start_realty_9", ALI)
    await store.close()
    (data / "tenants.json").write_text('{"9": {}}')

    aside = backup.restore(tmp_path / "kept", data)
    assert aside
    assert json.loads((aside / "router_mappings.json").read_text())[OMAR] == 9, "kept, for now"
    assert (aside / "tenants.json").read_text() == '{"9": {}}'
    again = await open_store(f"file:{data}", LIMITS)
    assert (await again.locks(9, None)).locks == {ALI: 2, SARA: 3}
    assert (await again.backlog()).waiting == 3
    assert len(await again.history(user(ALI), limit=9)) == 1
    assert (data / "tenants.json").read_text() == "{}"
    await again.close()


async def test_webhooks_go_on_while_a_copy_is_written(tmp_path: Path) -> None:
    """And every copy holds whole messages and the locks that they belong to."""
    data = tmp_path / "data"
    store = await filled(data)
    stop = False

    async def write(place: int) -> int:
        number = 0
        while not stop:
            await say(store, "start_realty_2", f"97150{place}{number:06}")
            number += 1
        return number

    writers = [asyncio.create_task(write(place)) for place in range(8)]
    for number in range(5):
        shutil.move(await store.back_up(), tmp_path / f"kept{number}")
    stop = True
    wrote = await asyncio.gather(*writers)
    await store.close()
    assert min(wrote) >= 1, "nobody waited for the copies"
    for number in range(5):
        place = tmp_path / f"kept{number}"
        backup.restore(place, tmp_path / f"back{number}")
        again = await open_store(f"file:{tmp_path / f'back{number}'}", LIMITS)
        users = again.totals()[0]
        waiting = (await again.backlog()).waiting
        assert users >= waiting - 1 >= 2, "ALI has two that wait, the others one"
        await again.close()


async def test_one_at_a_time_and_only_if_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await filled(tmp_path / "data")
    assert isinstance(store, FileStore)
    write = backup.write

    def slow(folder: Path, *, least_free: int) -> Path:
        time.sleep(0.2)
        return write(folder, least_free=least_free)

    with monkeypatch.context() as patch:
        patch.setattr(backup, "write", slow)
        first = asyncio.create_task(store.back_up())
        await asyncio.sleep(0)
        with pytest.raises(NoBackUp, match="another back-up is under way"):
            await store.back_up()
        await first
    await store.close()
    with pytest.raises(NoBackUp, match="are needed for a copy"):
        backup.write(tmp_path / "data", least_free=2**60)


def break_one(place: Path) -> None:
    with (place / "router.db").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00damaged")


@pytest.mark.parametrize(
    ("harm", "reported"),
    [
        (break_one, "damaged: router.db: take another one"),
        (lambda place: (place / "router.db").unlink(), "is no back-up, or not whole"),
        (lambda place: (place / "SHA256SUMS").unlink(), "is no back-up, or not whole"),
        (lambda place: (place / "SHA256SUMS").write_text(""), "SHA256SUMS names other files"),
    ],
)
async def test_a_damaged_back_up_changes_nothing(
    tmp_path: Path, harm: object, reported: str
) -> None:
    data = tmp_path / "data"
    store = await filled(data)
    stored = shutil.move(await store.back_up(), tmp_path / "kept")
    await say(store, "start_realty_9", OMAR)
    await store.close()
    harm(Path(stored))  # type: ignore[operator]
    with pytest.raises(StartRefused, match=reported):
        backup.restore(Path(stored), data)
    again = await open_store(f"file:{data}", LIMITS)
    assert again.totals() == (3, 3)
    await again.close()


async def test_no_restore_onto_a_running_router(tmp_path: Path) -> None:
    store = await filled(tmp_path / "data")
    shutil.move(await store.back_up(), tmp_path / "kept")
    with pytest.raises(StartRefused, match="another router uses this folder"):
        backup.restore(tmp_path / "kept", tmp_path / "data")
    await say(store, "start_realty_4", OMAR)
    await store.close()


@pytest.mark.parametrize("step", range(6))
async def test_a_restore_that_dies_anywhere_is_done_again(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then no router starts: half of it would be a store without its locks, or messages."""
    data = tmp_path / "data"
    store = await filled(data)
    shutil.move(await store.back_up(), tmp_path / "kept")
    await say(store, "start_realty_9", OMAR)
    await store.close()

    class Killed(BaseException):
        pass

    left, replace_ = step, os.replace

    def dies(source: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        replace_(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        try:
            backup.restore(tmp_path / "kept", data)
            died = False
        except Killed:
            died = True
    if died and step:
        with pytest.raises(StartRefused, match="did not finish: run it again"):
            await open_store(f"file:{data}", LIMITS)
    backup.restore(tmp_path / "kept", data)
    again = await open_store(f"file:{data}", LIMITS)
    assert (await again.locks(9, None)).locks == {ALI: 2, SARA: 3}
    assert (await again.backlog()).waiting == 3
    await again.close()
    assert died == (step < 5), "every step was tried"


async def test_a_copy_of_a_damaged_database_is_not_called_one(tmp_path: Path) -> None:
    store = await filled(tmp_path / "data")
    await store.close()
    (tmp_path / "data" / "router.db").write_bytes(b"no database" * 1000)
    with pytest.raises(NoBackUp, match="cannot be written"):
        backup.write(tmp_path / "data")
    assert not (tmp_path / "data" / opening.BACKUP_NAME).exists()


async def test_a_damaged_page_or_a_lost_mappings_file_is_no_back_up(tmp_path: Path) -> None:
    """The checksums are of the copy: they cannot tell that its original was damaged."""
    store = await filled(tmp_path / "data")
    for number in range(200):
        await say(store, "start_realty_2 " + "x" * 300, f"97150{number:07}")
    stored = Path(shutil.move(await store.back_up(), tmp_path / "kept"))
    await store.close()
    backup.prove(stored)
    with (stored / "router.db").open("r+b") as file:
        for page in range(3, (stored / "router.db").stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\x77" * 16)
    with pytest.raises(StartRefused, match=r"router\.db: SQLite"):
        backup.prove(stored)
    (tmp_path / "data" / "tenants.json").write_text("{")  # a start would be refused for it
    slip = Path(shutil.move(backup.write_alone(tmp_path / "data"), tmp_path / "slip"))
    with pytest.raises(StartRefused, match=r"tenants\.json: not JSON"):
        backup.prove(slip)
    (tmp_path / "data" / "tenants.json").unlink()
    (tmp_path / "data" / "router_mappings.json").unlink()
    lacking = backup.write_alone(tmp_path / "data")
    with pytest.raises(StartRefused, match=r"there are locks, but no router_mappings\.json"):
        backup.prove(lacking)


async def test_the_mappings_file_is_copied_after_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it could lack a lock that the database knows of."""
    store = await filled(tmp_path / "data")
    copied: list[str] = []
    copy_database, copy = backup._copy_database, backup.copy

    def noted_database(source: Path, target: Path) -> None:
        copied.append(source.name)
        copy_database(source, target)

    def noted(source: Path, target: Path) -> None:
        copied.append(source.name)
        copy(source, target)

    monkeypatch.setattr(backup, "_copy_database", noted_database)
    monkeypatch.setattr(backup, "copy", noted)
    await store.back_up()
    await store.close()
    assert copied[:2] == ["router.db", "router_mappings.json"]


async def test_dead_letters_and_what_is_held_come_back(tmp_path: Path) -> None:
    limits = Limits(min_free_disk_bytes=0, hold_seconds=1e9)
    store = await open_store(f"file:{tmp_path / 'data'}", limits)
    await say(store, "held", ALI)
    await say(store, "start_realty_2", SARA)
    await store.unlock(user(SARA), drop_waiting=True)
    shutil.move(await store.back_up(), tmp_path / "kept")
    await store.close()
    backup.restore(tmp_path / "kept", tmp_path / "back")
    again = await open_store(f"file:{tmp_path / 'back'}", limits)
    found = await again.backlog()
    assert (found.held, found.dead) == (1, 1)
    assert len(await again.dead_letters(Selection(), limit=9)) == 1
    await again.close()
    with sqlite3.connect(tmp_path / "back" / "router.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
