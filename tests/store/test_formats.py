"""The format of router.db: each that was ever released starts under this router, with nothing lost.

formats/1 and redis-1.json were written by the last code before formats had numbers. They hold what
can be stored: locks by link, operator, merge and tenant move; notes; waiting, held, dead and
unreadable messages; pairs of ids; help; dedup keys; and the entries of a person who was erased.
redis-1.json is each key with its type, for a Redis of any version.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway.domain.model import Selection
from gateway.errors import StartRefused
from gateway.store import Store, open_store
from gateway.store.files import backup, formats
from gateway.store.files.journal import connect
from gateway.store.migration.migrate import migrate
from gateway.store.redis import formats as redis_formats
from gateway.store.redis import scripts
from gateway.store.redis.scripts import Scripts, open_scripts
from tests.conftest import LIMITS
from tests.messages import ALI, LID, NOW, OMAR, SARA, user

FORMATS = Path(__file__).parent / "formats"
RELEASED = sorted(path for path in FORMATS.iterdir() if path.is_dir())


@pytest.fixture(params=RELEASED, ids=lambda path: str(path.name))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "data"))


async def opened(folder: Path) -> Store:
    return await open_store(f"file:{folder}", LIMITS)


async def contents(store: Store) -> dict[str, Any]:
    """All that can be asked for."""
    people = (ALI, LID, OMAR, "971508888888", "971506666666", "971507777777")
    backlog = await store.backlog()
    return {
        "locks": dict((await store.locks(100, None)).locks),
        "history": {
            who: [
                (one.kind, one.from_tenant, one.to_tenant, one.message_id, one.cause, one.other)
                for one in await store.history(user(who), limit=100)
            ]
            for who in people
        },
        "messages": {
            who: sorted((one.where, one.body) for one in (await store.export(user(who))).messages)
            for who in people
        },
        "dead letters": await store.dead_letters(Selection(), limit=100),
        "unreadable": await store.unreadable(limit=100),
        "backlog": (backlog.waiting, backlog.held, backlog.dead),
        "totals": await store.tenant_totals(),
        "heard": await store.heard(),
    }


async def test_a_folder_of_that_format_starts_with_all_that_it_holds(folder: Path) -> None:
    store = await opened(folder)
    found = await contents(store)
    who, lock = await store.lock_of(user(LID))
    await store.close()

    assert found["locks"] == {ALI: 9, SARA: 4, "971508888888": 7, "971506666666": 8}
    assert (who, lock.tenant) == (SARA, 4)
    assert found["history"][LID][0][4:] == ("merged_from", LID)
    assert found["history"][LID][1][4:] == ("merged_into", SARA)
    assert found["history"][ALI][0][0] == "confirmed"
    assert {one[4] for one in found["history"][ALI]} == {"link"}
    assert [one[4] for one in found["history"][OMAR]] == ["operator", "operator"]
    assert [one[4] for one in found["history"]["971508888888"]] == ["tenant_move", "link"]
    assert found["history"]["971506666666"][0][4:] == ("merged_from:waha", "158764321000077@lid")
    assert found["backlog"] == (8, 1, 1)
    assert [one.reason for one in found["dead letters"]] == ["refused: 422"]
    assert len(found["unreadable"]) == 1
    assert found["heard"] == {"default": NOW}
    with closing(sqlite3.connect(folder / "router.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (formats.FORMAT,)
        assert database.execute("SELECT max(poison_attempts) FROM delivery").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM dedup_0").fetchone()[0] > 9
        erased = "SELECT why, who, other FROM history WHERE user LIKE 'erased-%' ORDER BY id"
        assert database.execute(erased).fetchall()[0] == (None, None, None)


async def test_it_is_the_same_after_another_start_and_the_copy_stays(
    folder: Path, tmp_path: Path
) -> None:
    before = shutil.copy(folder / "router.db", tmp_path / "before.db")
    store = await opened(folder)
    first = await contents(store)
    await store.close()
    store = await opened(folder)
    assert await contents(store) == first
    await store.close()
    (copy,) = folder.glob(f"router.db{formats.COPY_SUFFIX}*")
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as old, closing(sqlite3.connect(before)) as known:
        assert list(old.iterdump()) == list(known.iterdump())


class _Dies(sqlite3.Connection):
    """Ends, as a kill would, before its nth statement of the upgrade."""

    left = 10**6

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        _Dies.left -= 1
        if _Dies.left < 0:
            raise KeyboardInterrupt
        return super().execute(sql, *args)


@pytest.mark.parametrize("number", list(range(len(formats.steps_from(1)) + 6)))
async def test_killed_at_any_step_the_next_start_finds_all(folder: Path, number: int) -> None:
    path = folder / "router.db"
    _Dies.left = number
    connection = sqlite3.connect(path, isolation_level=None, factory=_Dies)
    try:
        formats.set_up(connection, path)
    except KeyboardInterrupt:
        pass
    finally:
        _Dies.left = 10**6
        connection.close()

    store = await opened(folder)
    found = await contents(store)
    await store.close()
    assert found["locks"] == {ALI: 9, SARA: 4, "971508888888": 7, "971506666666": 8}
    assert found["backlog"] == (8, 1, 1)


@pytest.mark.parametrize("missing", ["unreadable", "heard", "history_why"])
async def test_an_older_one_of_that_format_that_lacks_something_starts(
    tmp_path: Path, missing: str
) -> None:
    """A router of format 1 made what was missing at each start."""
    folder = Path(shutil.copytree(FORMATS / "1", tmp_path / "data"))
    with closing(sqlite3.connect(folder / "router.db")) as database:
        kind = "INDEX" if missing == "history_why" else "TABLE"
        database.execute(f"DROP {kind} {missing}")
    store = await opened(folder)
    assert (await store.backlog()).waiting == 8
    assert await store.unreadable(limit=9) == [] or missing != "unreadable"
    await store.close()


async def test_the_copy_is_of_the_last_upgrade(tmp_path: Path) -> None:
    """Who went back to an older router, and comes again, goes back to that."""
    folder = Path(shutil.copytree(FORMATS / "1", tmp_path / "data"))
    await (await opened(folder)).close()
    shutil.copy(FORMATS / "1" / "router.db", folder / "router.db")
    with closing(sqlite3.connect(folder / "router.db")) as database, database:
        database.execute("DELETE FROM held")
    await (await opened(folder)).close()
    with closing(sqlite3.connect(folder / "router.db.format-1")) as copy:
        assert copy.execute("SELECT count(*) FROM held").fetchone() == (0,)


async def test_without_room_for_the_copy_nothing_is_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "router.db").read_bytes()
    with monkeypatch.context() as full:
        full.setattr("gateway.store.files.formats.os.replace", _no_room)
        with pytest.raises(StartRefused, match="make room on the disk"):
            await opened(folder)
    assert (folder / "router.db").read_bytes() == before
    assert not list(folder.glob("*.tmp"))
    await (await opened(folder)).close()


def _no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


async def test_a_newer_format_is_refused_in_one_line_and_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    await (await opened(folder)).close()
    with closing(sqlite3.connect(folder / "router.db")) as database:
        database.execute(f"PRAGMA user_version = {formats.FORMAT + 1}")
    with pytest.raises(StartRefused, match=rf"router\.db: has format {formats.FORMAT + 1}, and"):
        await opened(folder)
    with pytest.raises(StartRefused, match="run a newer router"):
        connect(folder / "router.db")


async def test_a_back_up_of_a_newer_format_is_not_put_back(tmp_path: Path) -> None:
    folder, saved = tmp_path / "data", tmp_path / "saved"
    await (await opened(folder)).close()
    shutil.copytree(backup.write_alone(folder), saved)
    with closing(sqlite3.connect(saved / "router.db")) as database:
        database.execute(f"PRAGMA user_version = {formats.FORMAT + 1}")
    sums = f"{backup.checksum(saved / 'router.db')}  router.db\n"
    (saved / backup.SUMS_NAME).write_text(sums)
    with pytest.raises(StartRefused, match="has format"):
        backup.restore(saved, folder)


# Redis


def put_back(client: redis.Redis, path: Path) -> None:
    """Make the keys that path lists; texts are bytes in Latin-1."""
    client.flushdb()
    for one in json.loads(path.read_text("utf-8")):
        key, value = one["key"].encode("latin-1"), one["value"]
        match one["type"]:
            case "string":
                client.set(key, value.encode("latin-1"))
            case "hash":
                pairs = {k.encode("latin-1"): v.encode("latin-1") for k, v in value.items()}
                client.hset(key, mapping=pairs)
            case "list":
                client.rpush(key, *(text.encode("latin-1") for text in value))
            case "set":
                client.sadd(key, *(text.encode("latin-1") for text in value))
            case "zset":
                client.zadd(key, {member.encode("latin-1"): score for member, score in value})


async def test_a_redis_of_before_formats_had_a_number_starts_with_all_that_it_holds(
    redis_socket: str,
) -> None:
    with redis.Redis(unix_socket_path=redis_socket) as client:
        put_back(client, FORMATS / "redis-1.json")
        assert len(list(client.scan_iter("gw:{~}:seen:*"))) == 11
    store = await open_store(f"unix:{redis_socket}", LIMITS)
    found = await contents(store)
    who, lock = await store.lock_of(user(LID))
    await store.close()

    assert found["locks"] == {ALI: 9, SARA: 4, "971508888888": 7, "971506666666": 8}
    assert (who, lock.tenant) == (SARA, 4)
    assert found["history"][LID][0][4:] == ("merged_from", LID)
    assert {one[4] for one in found["history"][ALI]} == {"link"}
    assert [one[4] for one in found["history"]["971508888888"]] == ["tenant_move", "link"]
    assert found["history"]["971506666666"][0][4:] == ("merged_from:waha", "158764321000077@lid")
    assert found["backlog"][0] == 8
    assert [one.reason for one in found["dead letters"]] == ["refused: 422"]


async def test_a_router_killed_while_it_brings_a_redis_up_loses_nothing(
    redis_socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every step of it in turn; the next start goes on."""
    url = f"unix:{redis_socket}"
    transact = Scripts.transact

    async def after_a_kill(step: int) -> tuple[bool, dict[str, Any]]:
        done = 0

        async def killed(self: Scripts, *args: Any, **named: Any) -> tuple[str, Any]:
            nonlocal done
            done += 1
            if done > step:
                raise ConnectionResetError("killed")
            return await transact(self, *args, **named)

        with redis.Redis(unix_socket_path=redis_socket) as client:
            put_back(client, FORMATS / "redis-1.json")
            scripts = await open_scripts(url)
            await scripts.adopt_store()
            with monkeypatch.context() as patched:
                patched.setattr(Scripts, "transact", killed)
                try:
                    await redis_formats.bring_up(scripts)
                    was_killed = False
                except ConnectionResetError:
                    was_killed = True
            await scripts.close()
            client.delete("gw:upgrading")  # a minute later
        store = await open_store(url, LIMITS)
        found = await contents(store)
        await store.close()
        with redis.Redis(unix_socket_path=redis_socket) as client:
            names = [key.decode().split(":")[2] for key in client.keys("gw:{~}:*")]
            assert not {"fly", "flying", "letters", "sighted", "help", "held_key"} & set(names)
            assert client.exists("gw:upgrade", "gw:upgrading") == 0
        return was_killed, found

    _, whole = await after_a_kill(99)
    step, was_killed = 0, True
    while was_killed:
        was_killed, found = await after_a_kill(step)
        assert found == whole, f"killed at step {step}"
        step += 1
    assert step > 5


async def test_a_redis_of_an_older_format_that_a_router_uses_is_left_as_it_is(
    redis_socket: str,
) -> None:
    with redis.Redis(unix_socket_path=redis_socket) as client:
        put_back(client, FORMATS / "redis-1.json")
        client.set("gw:{~}:lease:old-1", "1", ex=15)
        with pytest.raises(StartRefused, match="a router of an older version uses it"):
            await open_store(f"unix:{redis_socket}", LIMITS)
        assert client.exists("gw:{~}:letters")
        assert not client.hexists("gw:sessions", "%")
        client.delete("gw:{~}:lease:old-1")
        client.set("gw:upgrading", "x", ex=60)
        with pytest.raises(
            StartRefused, match=f"another router brings this Redis up to format {scripts.FORMAT}"
        ):
            await open_store(f"unix:{redis_socket}", LIMITS)
        client.flushdb()


async def test_a_redis_of_an_older_format_is_migrated_whole(
    redis_socket: str, tmp_path: Path
) -> None:
    url, folder = f"unix:{redis_socket}", tmp_path / "data"
    with redis.Redis(unix_socket_path=redis_socket) as client:
        put_back(client, FORMATS / "redis-1.json")
    await migrate(url, f"file:{folder}")
    store = await opened(folder)
    found = await contents(store)
    await store.close()
    assert found["locks"] == {ALI: 9, SARA: 4, "971508888888": 7, "971506666666": 8}
    assert found["history"]["971506666666"][0][4:] == ("merged_from:waha", "158764321000077@lid")
    assert found["backlog"] == (8, 1, 1)
    (held,) = found["messages"]["971507777777"]
    assert held[0] == "held"
    assert json.loads(held[1])["event"] == "message"


async def test_a_redis_of_a_newer_format_is_refused_in_one_line(redis_socket: str) -> None:
    with redis.Redis(unix_socket_path=redis_socket) as client:
        put_back(client, FORMATS / "redis-1.json")
        client.hset("gw:sessions", "%", str(scripts.FORMAT + 1))
        before = {key: client.dump(key) for key in client.scan_iter("gw:*")}
        with pytest.raises(
            StartRefused,
            match=rf"has format {scripts.FORMAT + 1}, and this router knows formats up",
        ):
            await open_store(f"unix:{redis_socket}", LIMITS)
        assert {key: client.dump(key) for key in client.scan_iter("gw:*")} == before
        client.flushdb()


async def test_a_new_redis_says_its_format(redis_socket: str) -> None:
    with redis.Redis(unix_socket_path=redis_socket) as client:
        client.flushdb()
        await (await open_store(f"unix:{redis_socket}", LIMITS)).close()
        assert client.hget("gw:sessions", "%") == str(scripts.FORMAT).encode()
