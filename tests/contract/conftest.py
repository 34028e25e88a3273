"""Stores of each kind."""

from pathlib import Path

import pytest
import redis


@pytest.fixture(params=["file", "redis"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of each kind lives; the same url opened again is the same store."""
    if request.param == "file":
        return f"file:{tmp_path / 'data'}"
    socket = request.getfixturevalue("redis_socket")
    with redis.Redis(unix_socket_path=socket) as client:
        client.flushall()
    return f"unix:{socket}"
