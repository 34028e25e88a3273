"""What a Redis must be, or the router does not start."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio

from gateway.domain.model import (
    Accepted,
    DeadLettered,
    Forward,
    Health,
    Selection,
    UnreadableReason,
)
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store import Store, open_store
from gateway.store.files.opening import share_folder, take_folder
from gateway.store.migration import migrate
from gateway.store.redis.scripts import _client
from tests.conftest import LIMITS, wait_until
from tests.e2e.redis import RedisServer
from tests.messages import ALI, LID, SARA, by_the_rules, message, tenant, user

Server = Callable[..., RedisServer]
SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"


async def say(store: Store, text: str, who: str, **how: Any) -> Accepted:
    inbound = message(text, who, **how)
    return await store.accept(inbound, by_the_rules(inbound))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        made.append(RedisServer(tmp_path / f"redis{len(made)}", *options).start())
        return made[-1]

    yield start
    for one in made:
        one.stop()


async def test_one_that_would_drop_locks_is_refused(server: Server) -> None:
    url = server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").url
    with pytest.raises(StartRefused, match=r"maxmemory-policy allkeys-lru.*set noeviction"):
        await open_store(url, LIMITS)
    await (await open_store(server("--maxmemory", "100mb").url, LIMITS)).close()


async def test_one_without_an_append_only_file_is_warned_of(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await (await open_store(server("--appendonly", "no").url, LIMITS)).close()
    assert "Set appendonly yes and appendfsync always" in caplog.text


@pytest.mark.parametrize(
    ("url", "sentinels", "login", "database"),
    [
        ("redis+sentinel://one:1,two:2/realty", [("one", 1), ("two", 2)], (None, None), 0),
        ("redis+sentinel://one/realty/3", [("one", 26379)], (None, None), 3),
        (
            "redis+sentinel://me:s%40c%2Fret@one:1/realty?sentinel_password=pw",
            [("one", 1)],
            ("me", "s@c/ret"),
            0,
        ),
        ("redis+sentinel://[::1]:7/realty", [("::1", 7)], (None, None), 0),
        ("redis+sentinel://:pw@one:1/realty", [("one", 1)], (None, "pw"), 0),
    ],
)
async def test_a_url_of_sentinels(
    url: str,
    sentinels: list[tuple[str, int]],
    login: tuple[str | None, str | None],
    database: int,
) -> None:
    pool: Any = cast(redis.asyncio.Redis, _client(url)).connection_pool
    asked = pool.sentinel_manager.sentinels
    places = [one.connection_pool.connection_kwargs for one in asked]
    assert [(one["host"], one["port"]) for one in places] == sentinels
    wanted = "pw" if "sentinel_password" in url else None
    assert [one.get("password") for one in places] == [wanted] * len(places)
    assert pool.service_name == "realty"
    kwargs = pool.connection_kwargs
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == (*login, database)


@pytest.mark.parametrize("url", ["redis+sentinel://one:1", "redis+sentinel:///realty",
                                 "redis+sentinel://one:x/realty", "redis://one:x"])  # fmt: skip
async def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(StartRefused, match="is no URL of a Redis"):
        await open_store(url, LIMITS)


@pytest.mark.parametrize(
    "url", ["redis://:s3/cret@one:1", "redis+sentinel://:s3/cret@one:1/realty"]
)
async def test_a_password_is_not_shown_when_a_url_is_none(url: str) -> None:
    with pytest.raises(StartRefused) as refused:
        await open_store(url, LIMITS)
    assert "s3" not in str(refused.value)


def test_on_one_folder_routers_on_files_and_on_redis_exclude_each_other(tmp_path: Path) -> None:
    one, two = share_folder(tmp_path), share_folder(tmp_path)
    assert one, "a router on Redis"
    assert two, "and another one"
    with pytest.raises(StartRefused, match="another router uses this folder"):
        take_folder(tmp_path)
    one.close()
    two.close()
    with take_folder(tmp_path), pytest.raises(StartRefused, match="a router on files uses"):
        share_folder(tmp_path)
    assert share_folder(tmp_path / "nowhere") is None


def reported_by(exc: pytest.ExceptionInfo[StartRefused]) -> str:
    return str(exc.value)


async def test_a_policy_that_would_drop_locks_later_is_said(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    store = await open_store(server("--maxmemory-policy", "allkeys-lru").url, LIMITS)
    assert "maxmemory-policy allkeys-lru): set noeviction" in caplog.text
    await store.close()


async def test_a_redis_that_begins_to_drop_keys_is_noticed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it might, it is said; once locks may be gone nobody is served as unknown."""
    monkeypatch.setattr("gateway.store.redis.store._RENEW_SECONDS", 0.05)
    redis_ = server()
    store = await open_store(redis_.url, LIMITS)
    await say(store, "start_realty_2", ALI)
    with redis_.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        await wait_until(lambda: store.health().at_risk)
        assert "allkeys-lru" in str(store.health().at_risk)
        assert store.health().refusing is None
        await say(store, "still taken in", ALI)
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", str(used + 2_000_000))
        for number in range(400):
            client.set(f"filler:{number}", b"x" * 20_000)
        await wait_until(lambda: store.health().refusing)
        assert "locks may be among them" in str(store.health().refusing)
        with pytest.raises(StoreUnavailable, match="locks may be among them"):
            await say(store, "hello", ALI)
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "noeviction")
    await wait_until(lambda: not store.health().at_risk)
    assert "locks may be among them" in str(store.health().refusing), "they do not come back"
    await store.close()


@pytest.mark.parametrize("how", ["flushed", "flushed and used", "replaced"])
async def test_a_redis_that_came_back_empty_serves_nobody_as_unknown(
    server: Server, how: str
) -> None:
    redis_ = server()
    store = await open_store(redis_.url, LIMITS)
    await say(store, "start_realty_2", ALI)
    with redis_.client() as client:
        client.flushall()
    if how == "flushed and used":
        await (await open_store(redis_.url, LIMITS)).close()
    elif how == "replaced":
        other = await open_store(redis_.url, LIMITS)
        await say(other, "start_realty_9", ALI)
        await other.close()
    for who, session in ((ALI, "default"), (SARA, "default"), (SARA, "new")):
        with pytest.raises(StoreUnavailable, match="came back empty"):
            await say(store, "hello", who, session=session)
    assert "came back empty" in str(store.health().refusing)
    await store.close()
    with redis_.client() as client:
        assert how != "flushed" or client.keys("gw:*") == [], "nothing is written to it"


async def test_a_restart_does_not_take_an_empty_redis_for_the_one_before(
    server: Server, tmp_path: Path
) -> None:
    redis_, folder = server(), tmp_path / "data"
    folder.mkdir()
    for _ in range(2):
        store = await open_store(redis_.url, LIMITS, beside=folder)
        await say(store, "start_realty_2", ALI)
        await store.close()
    with redis_.client() as client:
        client.flushall()
        with pytest.raises(StartRefused, match=r"came back empty.*delete .*router\.redis"):
            await open_store(redis_.url, LIMITS, beside=folder)
        assert client.keys("gw:*") == []
    (folder / "router.redis").unlink()
    await (await open_store(redis_.url, LIMITS, beside=folder)).close()


async def test_a_node_of_a_cluster_that_came_back_empty_is_named(server: Server) -> None:
    """Sessions lie on nodes of their own, and so does the list of them."""
    redis_ = server()
    store = await open_store(redis_.url, LIMITS)
    await say(store, "start_realty_2", ALI)
    await store.close()
    with redis_.client() as client:
        client.hset("gw:sessions", "#", "another")
    with pytest.raises(StartRefused, match="a node came back empty"):
        await open_store(redis_.url, LIMITS)


async def test_a_store_from_before_there_were_ids_gets_one(server: Server) -> None:
    redis_ = server()
    store = await open_store(redis_.url, LIMITS)
    await say(store, "start_realty_2", ALI)
    await say(store, "start_realty_3", SARA, session="sales")
    await store.close()
    with redis_.client() as client:
        client.hdel("gw:sessions", "#")
        client.delete("gw:{~}:store", "gw:{sales}:store")
    store = await open_store(redis_.url, LIMITS)
    assert (await say(store, "hello", ALI)).decision == Forward(tenant(2))
    assert (await say(store, "hello", SARA, session="sales")).decision == Forward(tenant(3))
    await store.close()


@pytest.mark.parametrize("state", ["locks", "messages", "moved", "nothing"])
async def test_an_empty_redis_beside_a_full_folder_is_refused(
    server: Server, tmp_path: Path, state: str
) -> None:
    folder, redis_ = tmp_path / "data", server()
    files = await open_store(f"file:{folder}", LIMITS)
    if state != "nothing":
        await say(files, "start_realty_2" if state != "messages" else "hello", ALI)
    await files.close()
    if state == "moved":
        await migrate.migrate(f"file:{folder}", redis_.url)
    if state in ("moved", "nothing"):
        store = await open_store(redis_.url, LIMITS, beside=folder)
        await store.close()
        return
    for _ in range(2):  # and nothing was noted there that would let the second start pass
        with pytest.raises(StartRefused) as refused:
            await open_store(redis_.url, LIMITS, beside=folder)
        assert f"migrate --from file:{folder}" in reported_by(refused)
    with redis_.client() as client:
        client.hset("gw:sessions", mapping={"#": "x", "~": "0"})
        client.hset("gw:{~}:lock", ALI, "2")
    await (await open_store(redis_.url, LIMITS, beside=folder)).close()


# rights: docs/scaling.md, "Rights"


def least_rights() -> list[str]:
    (rights,) = re.findall(
        r"^ACL SETUSER router on >PASSWORD (.+)$", SCALING.read_text("utf-8"), re.MULTILINE
    )
    return str(rights).split()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("router:wrong@", "does not take the user and password"),
        ("nobody:secret@", "does not take the user and password"),
        ("", "asks for a password, and it holds none"),
        ("narrow:secret@", "lacks a right"),
    ],
)
async def test_what_redis_refuses_is_said_with_its_cure(
    server: Server, url: str, said: str
) -> None:
    redis_ = server()
    with redis_.client() as client:
        client.execute_command("ACL", "SETUSER", "narrow", "on", ">secret", "~gw:*", "+@read")
        client.execute_command("ACL", "SETUSER", "default", "resetpass")
        client.execute_command("ACL", "SETUSER", "default", "off")
    with pytest.raises(StartRefused) as refused:
        await open_store(redis_.url.replace("unix:", f"unix://{url}"), LIMITS)
    assert said in reported_by(refused)
    assert "secret" not in reported_by(refused)


async def test_the_least_rights_suffice(server: Server, tmp_path: Path) -> None:
    redis_ = server()
    with redis_.client() as client:
        client.execute_command("ACL", "SETUSER", "router", "on", ">secret", *least_rights())
    url = redis_.url.replace("unix:", "unix://router:secret@")
    store = await open_store(url, LIMITS)
    now = time.time()
    await say(store, "start_realty_2", LID, other_id=ALI, sent=now, now=now)
    await say(store, "hello", SARA, sent=now, now=now)
    (delivery,) = await store.claim(1, wait=0)
    await store.settle(delivery, DeadLettered("refused", now))
    assert await store.replay(Selection()) == 1
    await store.lock(user(SARA), tenant(3))
    await store.move(tenant(3), tenant(4))
    await store.unlock(user(SARA), drop_waiting=True)
    await store.add_unreadable(message(), UnreadableReason.NO_CHAT)
    await store.export(user(ALI))
    await store.erase(user(ALI))
    await store.backlog()
    assert store.health() == Health(None, None, has_file=False)
    await asyncio.sleep(0)
    await store.close()
    await migrate.migrate(url, f"file:{tmp_path / 'data'}")
