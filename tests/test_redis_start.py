"""What a Redis must be, or the router does not start."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis.asyncio

from gateway.errors import StartRefused
from gateway.store import open_store
from gateway.store.opening import share_folder, take_folder
from gateway.store.scripts import _client
from tests.conftest import LIMITS
from tests.e2e.redis import RedisServer

Server = Callable[..., RedisServer]


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
async def test_a_password_is_not_told_when_a_url_is_none(url: str) -> None:
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
