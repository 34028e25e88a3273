"""Two WAHA sessions on a real Redis Cluster of three nodes."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway.domain.model import Delivered
from gateway.store import open_store
from gateway.store.migration import migrate
from tests.conftest import LIMITS
from tests.e2e.redis import RedisServer
from tests.e2e.router import free_port
from tests.messages import ALI, SARA, by_the_rules, message


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[int]:
    """The port of one of its nodes."""
    ports: list[int] = []
    while len(ports) < 3:
        if (port := free_port()) < 55_000:  # the nodes talk on that and 10,000 more
            ports.append(port)
    nodes = [
        RedisServer(
            tmp_path / str(port), "--port", str(port), "--cluster-enabled", "yes",
            "--bind", "127.0.0.1",
        ).start()
        for port in ports
    ]  # fmt: skip
    third = 16384 // 3 + 1
    for place, node in enumerate(nodes):
        with node.client() as client:
            slots = range(place * third, min((place + 1) * third, 16384))
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0])
    for _ in range(500):
        states = []
        for node in nodes:
            with node.client() as client:
                states.append(client.execute_command("CLUSTER", "INFO"))
        if all(b"cluster_state:ok" in one and b"known_nodes:3" in one for one in states):
            break
        time.sleep(0.05)
    yield ports[0]
    for node in nodes:
        node.stop()


async def test_sessions_spread_over_the_nodes_and_each_script_touches_one(cluster: int) -> None:
    store = await open_store(f"redis+cluster://127.0.0.1:{cluster}", LIMITS)
    for session, who in (("default", ALI), ("sales", SARA), ("rent", ALI)):
        inbound = message("start_realty_2", who, session=session)
        await store.accept(inbound, by_the_rules(inbound))
    assert store.totals()[0] == 3
    claimed = await store.claim(10, wait=0)
    assert sorted(one.user for one in claimed) == [ALI, f"rent/{ALI}", f"sales/{SARA}"]
    for one in claimed:
        await store.settle(one, Delivered())
    assert (await store.backlog()).waiting == 0
    await store.close()
    used = set()
    with redis.RedisCluster(host="127.0.0.1", port=cluster) as client:
        for tag in ("~", "sales", "rent"):
            used.add(client.get_node_from_key(f"gw:{{{tag}}}:lock").port)
    assert len(used) > 1


async def test_a_cluster_is_moved_into_and_out_of(cluster: int, tmp_path: Path) -> None:
    url, folders = f"redis+cluster://127.0.0.1:{cluster}", [tmp_path / "a", tmp_path / "b"]
    store = await open_store(f"file:{folders[0]}", LIMITS)
    for session in ("default", "sales", "rent"):
        for who in (ALI, SARA):
            inbound = message("start_realty_2", who, session=session)
            await store.accept(inbound, by_the_rules(inbound))
            held = message("hello", f"{who}0", session=session, now=time.time())
            await store.accept(held, by_the_rules(held))
    await store.close()
    there = await migrate.migrate(f"file:{folders[0]}", url)
    assert (there["lock"], there["delivery"], there["held"]) == (6, 6, 6)
    assert await migrate.migrate(url, f"file:{folders[1]}") == there
