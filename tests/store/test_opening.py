"""Every refusal to start names file and cure and damages nothing; and what is taken over."""

import errno
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.model import Moment
from gateway.errors import StartRefused
from gateway.store import open_store
from gateway.store.files import journal
from gateway.store.files.opening import rebuild
from tests.conftest import LIMITS
from tests.e2e.router import ROOT
from tests.messages import ALI, LID, NOW, SARA, by_the_rules, message, user


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def mappings(folder: Path) -> Path:
    return folder / "router_mappings.json"


async def start(folder: Path) -> None:
    await (await open_store(f"file:{folder}", LIMITS)).close()


async def lock(folder: Path, text: str = "start_realty_2", user: str = ALI, **how: Any) -> None:
    store = await open_store(f"file:{folder}", LIMITS)
    inbound = message(text, user, **how)
    await store.accept(inbound, by_the_rules(inbound))
    await store.close()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", "not JSON, or cut off"),
        (b'{"971501234567": 2', "not JSON, or cut off"),
        (b"\x00" * 100, "not JSON, or cut off"),
        (b"\xff", "not JSON, or cut off"),
        (b"[]", "must hold an object"),
        (b"null", "must hold an object"),
        (b'{"971501234567": 2, "971501234567": 3}', "is in it twice"),
        (b'{"971501234567": 2, "97150123456\\u0037": 3}', "is in it twice"),
        (b'{"+971501234567": 2}', "'+971501234567' is no user"),
        (b'{"971501234567@c.us": 2}', "is no user"),
        (b'{"1234": 2}', "is no user"),
        (b'{"": 2}', "is no user"),
        (b'{"a/b/971501234567": 2}', "is no user"),
        (b'{"971501234567": 0}', "not a whole number"),
        (b'{"971501234567": -2}', "not a whole number"),
        (b'{"971501234567": 2.0}', "not a whole number"),
        (b'{"971501234567": "2"}', "not a whole number"),
        (b'{"971501234567": true}', "not a whole number"),
        (b'{"971501234567": null}', "not a whole number"),
        (b'{"971501234567": 2147483648}', "not a whole number"),
    ],
)
async def test_a_damaged_mappings_file_is_refused_and_left_as_it_is(
    folder: Path, content: bytes, names: str
) -> None:
    mappings(folder).write_bytes(content)
    with pytest.raises(StartRefused) as refused:
        await start(folder)
    line = str(refused.value)
    assert str(mappings(folder)) in line
    assert names in line
    assert "\n" not in line
    assert mappings(folder).read_bytes() == content


async def test_a_vanished_mappings_file_is_refused_and_rebuilt_from_the_history(
    folder: Path,
) -> None:
    await lock(folder)
    await lock(folder, "start_realty_7", SARA)
    await lock(folder, "start_realty_9", LID)
    await lock(folder, "hello", LID, other_id="971501234999")  # its lock follows to the phone
    await lock(folder, "start_realty_8", SARA)
    stored = json.loads(mappings(folder).read_text())
    mappings(folder).unlink()
    with pytest.raises(StartRefused, match=r"missing.*rebuild"):
        await start(folder)
    assert not mappings(folder).exists()

    assert rebuild(folder) == (mappings(folder), 3)
    assert (
        json.loads(mappings(folder).read_text())
        == stored
        == {
            ALI: 2,
            SARA: 8,
            "971501234999": 9,
        }
    )
    await start(folder)


async def test_rebuild_overwrites_nothing_and_disturbs_nobody(folder: Path) -> None:
    with pytest.raises(StartRefused, match=r"router\.db: missing"):
        rebuild(folder)
    await lock(folder)
    with pytest.raises(StartRefused, match="exists; move it away"):
        rebuild(folder)
    running = await open_store(f"file:{folder}", LIMITS)
    mappings(folder).unlink()
    with pytest.raises(StartRefused, match="another router uses this folder"):
        rebuild(folder)
    await running.close()


@pytest.mark.parametrize("damage", ["garbage", "header", "page"])
async def test_a_damaged_database_is_refused(folder: Path, damage: str) -> None:
    await lock(folder)
    path = folder / "router.db"
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content[:] = os.urandom(len(content))
    elif damage == "header":
        content[:16] = b"SQLite format 2\0"
    else:
        content[4096:8192] = os.urandom(4096)
    path.write_bytes(content)
    with pytest.raises(StartRefused, match=r"router\.db: SQLite c.*back-up"):
        await start(folder)
    assert path.read_bytes() == content


@pytest.fixture
async def killed(folder: Path, tmp_path: Path) -> Path:
    """A folder as a kill leaves it: the newest commit is in the WAL only."""
    await start(folder)
    store = await open_store(f"file:{folder}", LIMITS)
    inbound = message("start_realty_2")
    await store.accept(inbound, by_the_rules(inbound))
    left = tmp_path / "killed"
    shutil.copytree(folder, left, ignore=shutil.ignore_patterns("*-shm"))
    await store.close()
    assert (left / "router.db-wal").stat().st_size > 0
    return left


def files(folder: Path) -> dict[str, bytes]:
    names = ("router.db", "router.db-wal", "router_mappings.json")
    return {name: (folder / name).read_bytes() for name in names}


async def test_a_refusal_of_a_damaged_database_leaves_its_wal_alone(killed: Path) -> None:
    untouched = "SELECT rootpage FROM sqlite_master WHERE name = 'dead_letter'"
    database = sqlite3.connect(f"file:{killed / 'router.db'}?immutable=1", uri=True)
    (page,) = database.execute(untouched).fetchone()
    database.close()
    with (killed / "router.db").open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xff" * 4096)
    before = files(killed)
    with pytest.raises(StartRefused, match="back-up"):
        await start(killed)
    assert files(killed) == before


async def test_a_wal_that_cannot_be_made_durable_is_not_built_on(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = files(killed)
    with monkeypatch.context() as broken:
        broken.setattr("gateway.store.files.journal.os.fsync", fails)
        with pytest.raises(StartRefused, match=r"Input/output error.*check the disk"):
            await start(killed)
    assert files(killed) == before
    store = await open_store(f"file:{killed}", LIMITS)
    assert len(await store.claim(10, wait=0)) == 1
    await store.close()


async def test_a_database_behind_a_link_is_served(killed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("router.db", "router.db-wal"):
        shutil.move(killed / name, tmp_path / "elsewhere" / name)
    (killed / "router.db").symlink_to(tmp_path / "elsewhere" / "router.db")
    store = await open_store(f"file:{killed}", LIMITS)
    assert len(await store.claim(10, wait=0)) == 1
    await store.close()


@pytest.mark.parametrize("name", ["router.suspect", "router.distrust"])
async def test_after_suspected_damage_the_whole_database_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[float] = []
    first_damage = journal._first_damage

    def looks(path: Path, seconds: float) -> str | None:
        asked.append(seconds)
        return first_damage(path, seconds)

    await lock(folder)
    monkeypatch.setattr(journal, "_first_damage", looks)
    (folder / name).touch()
    await start(folder)
    await start(folder)
    assert asked == [math.inf, 1.0]


async def test_a_second_router_on_the_folder_is_refused(folder: Path) -> None:
    first = await open_store(f"file:{folder}", LIMITS)
    with pytest.raises(StartRefused, match=r"another router uses this folder.*Redis"):
        await start(folder)
    await first.close()
    await start(folder)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartRefused, match="file/data: cannot be written"):
        await start(tmp_path / "file" / "data")


async def test_an_unknown_store_is_named() -> None:
    with pytest.raises(StartRefused, match=r"STORE_URL=mysql:….*file, redis"):
        await open_store("mysql://x", LIMITS)


async def test_the_first_start_makes_the_files(folder: Path) -> None:
    await start(folder)
    assert mappings(folder).read_bytes() == b"{}\n"
    assert (folder / "router.db").exists()


async def test_a_predecessors_pretty_file_is_taken_over_as_old_as_it_is(folder: Path) -> None:
    mappings(folder).write_text(json.dumps({ALI: 2, SARA: 12, LID: 3}, indent=4))
    os.utime(mappings(folder), (NOW - 100, NOW - 100))
    store = await open_store(f"file:{folder}", LIMITS)
    assert store.totals() == (3, 3)
    assert (await store.lock_of(user(ALI)))[1].changed == Moment.of(NOW - 100)

    older = message("start_realty_9", sent=NOW - 101)
    newer = message("start_realty_9", sent=NOW - 99)
    assert (await store.accept(older, by_the_rules(older))).decision is not None
    assert (await store.lock_of(user(ALI)))[1].tenant == 2
    await store.accept(newer, by_the_rules(newer))
    await store.close()
    assert json.loads(mappings(folder).read_text()) == {ALI: 9, SARA: 12, LID: 3}

    mappings(folder).unlink()
    assert rebuild(folder)[1] == 3
    assert json.loads(mappings(folder).read_text()) == {ALI: 9, SARA: 12, LID: 3}


async def test_a_lock_that_did_not_reach_the_file_is_applied_at_the_start(folder: Path) -> None:
    await lock(folder)
    before = mappings(folder).read_bytes()
    await lock(folder, "start_realty_7", SARA)
    after = json.loads(mappings(folder).read_text())
    database = sqlite3.connect(folder / "router.db")
    database.execute("INSERT INTO lock_redo (user, tenant) VALUES (?, 7)", (SARA,))
    database.execute("INSERT INTO lock_redo (user, tenant) VALUES ('971501234000', 4)")
    database.execute("INSERT INTO lock_redo (user, tenant) VALUES ('971501234000', NULL)")
    database.commit()
    database.close()
    mappings(folder).write_bytes(before)  # as if the process had died before the rewrite

    await start(folder)
    assert json.loads(mappings(folder).read_text()) == after
    database = sqlite3.connect(folder / "router.db")
    assert database.execute("SELECT count(*) FROM lock_redo").fetchone() == (0,)
    database.close()


@pytest.mark.parametrize("row", [("zzz", 2), (ALI, "abc"), (ALI, 0)])
async def test_nonsense_in_the_database_does_not_reach_the_file(
    folder: Path, row: tuple[str, object]
) -> None:
    await lock(folder)
    before = mappings(folder).read_bytes()
    database = sqlite3.connect(folder / "router.db")
    database.execute("INSERT INTO lock_redo (user, tenant) VALUES (?, ?)", row)
    database.execute(
        "INSERT INTO history (at, user, kind, to_tenant, changed_second) VALUES (1, ?, 'x', ?, 1)",
        row,
    )
    database.commit()
    database.close()
    with pytest.raises(StartRefused, match=r"router\.db is damaged"):
        await start(folder)
    assert mappings(folder).read_bytes() == before
    mappings(folder).unlink()
    with pytest.raises(StartRefused, match=r"router\.db is damaged"):
        rebuild(folder)
    assert not mappings(folder).exists()


async def test_a_clock_that_went_back_while_down_delays_nobody(folder: Path) -> None:
    await lock(folder)
    database = sqlite3.connect(folder / "router.db")
    later = time.time() + 86_400
    database.execute("UPDATE delivery SET due = ?, tried_at = ?", (later + 300, later))
    database.commit()
    database.close()
    store = await open_store(f"file:{folder}", LIMITS)
    assert len(await store.claim(1, wait=5)) == 1
    await store.close()


# what is another account's, or a mount of its own

OPEN = """
import os, sys, time
from pathlib import Path
from gateway.errors import StartRefused
from gateway.store.files.journal import connect
from gateway.store.files.opening import open_folder
if user := int(sys.argv[2]):  # not before: another account may not read this Python
    os.setgid(user)
    os.setuid(user)
try:
    open_folder(Path(sys.argv[1]), time.time(), connect)
except StartRefused as exc:
    print(exc)
else:
    print("opened")
"""
NOBODY = 65_534


def opened_by(folder: Path, *before: str, user: int = 0) -> str:
    """What a process of another account, or behind another command, says of folder."""
    command = [*before, sys.executable, "-c", OPEN, str(folder), str(user)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every account can reach."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make what belongs to another account")
@pytest.mark.parametrize("what", ["folder", "parent", "router.db", "router_mappings.json"])
def test_what_belongs_to_another_account_is_named_with_the_one_command(
    open_path: Path, what: str
) -> None:
    folder = open_path / "data"
    if what == "parent":
        belongs = open_path
    else:
        folder.mkdir()
        belongs = folder
        if what != "folder":
            os.chown(folder, NOBODY, NOBODY)
            belongs = folder / what
            belongs.write_text("{}")
            belongs.chmod(0o600)
    said = opened_by(folder, user=NOBODY)
    assert f"{belongs} belongs to uid 0, the router runs as uid {NOBODY}" in said
    assert re.search(rf"sudo chown -R {NOBODY}:\d+ {belongs} ", said)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("name", ["router_mappings.json", "router.db"])
def test_a_file_that_is_a_mount_of_its_own_is_refused_at_the_first_start(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "the data"
    folder.mkdir()
    (folder / name).touch()
    (tmp_path / "outside").write_text("{}")
    mount = f'mount --bind "{tmp_path}/outside" "{folder / name}" && exec "$@"'
    try:
        said = opened_by(folder, "unshare", "-m", "sh", "-c", mount, "sh")
    except AssertionError as exc:
        if "unshare" in str(exc) or "mount:" in str(exc):
            pytest.skip("nothing can be mounted here")
        raise
    assert f"{folder / name}: is a mount of its own" in said
    assert (tmp_path / "outside").read_text() == "{}"
