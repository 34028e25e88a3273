"""Stores of each kind."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis

from gateway.store import STORES, Hooks, Limits, Store, open_store
from tests.conftest import LIMITS
from tests.contract.memory_store import MemoryStore

Reopen = Callable[..., Awaitable[Store]]


async def _open_memory(url: str, limits: Limits, hooks: Hooks, _: Path | None) -> Store:
    return MemoryStore(url, limits, hooks[-1])


STORES["memory"] = _open_memory


@pytest.fixture(params=["file", "redis", "memory"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of each kind lives; the same url opened again is the same store."""
    if request.param == "file":
        return f"file:{tmp_path / 'data'}"
    if request.param == "memory":
        return f"memory:{tmp_path}"
    # With REDIS_URL that server is used, and its database emptied.
    url = os.environ.get("REDIS_URL") or f"unix://{request.getfixturevalue('redis_socket')}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
async def reopen(store_url: str) -> AsyncIterator[Reopen]:
    """Opens the store again, and what was opened before is gone."""
    opened: list[Store] = []

    async def open_(limits: Limits = LIMITS) -> Store:
        if opened:
            await opened.pop().close()
        opened.append(await open_store(store_url, limits))
        return opened[-1]

    yield open_
    await opened.pop().close()
