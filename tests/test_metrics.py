"""/metrics: what happened is counted, once, under the names that the README gives."""

import math
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from gateway import VERSION
from gateway.errors import StoreUnavailable
from gateway.store.files.store import FileStore
from tests.clients import HOOK, client_of
from tests.messages import ALI, NOW, OMAR, SARA, webhook


def scraped(client: TestClient) -> dict[tuple[str, ...], float]:
    """Each sample by its name and its labels' values, without a histogram's buckets."""
    text = client.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def said(client: TestClient, text: str, who: str = ALI, **how: Any) -> None:
    assert client.post(HOOK, content=webhook(text, who, **how)).status_code == 200


def nobody(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens", request=request)


def test_webhooks_links_and_locks_are_counted(tmp_path: Path) -> None:
    with client_of(tmp_path, handler=nobody) as client:
        said(client, "start_realty_2", bare_id="A1")
        said(client, "start_realty_2", bare_id="A1")
        said(client, "hello")
        said(client, "start_realty_3", sent=NOW + 5)
        said(client, "start_realty_2", sent=NOW + 1)
        said(client, "hello", SARA)
        said(client, "hello", OMAR)
        said(client, "hello", "120363040000000001@g.us")
        assert client.post(HOOK, content=b"{").status_code == 400
        assert scraped(client)["gateway_held_messages",] == 2
        assert client.post(f"/router/lock/{SARA}", json={"tenant_id": 9}).is_success
        assert client.post(f"/router/unlock/{SARA}").is_success
        assert client.post("/router/tenants/3/move", json={"to": 4}).is_success
        assert client.delete(f"/router/user/{ALI}").is_success
        said(client, "start_realty_7", OMAR)
        found = scraped(client)
    for outcome, count in {"locked": 2, "moved": 1, "routed": 2, "unknown_user": 2,
                           "duplicate": 1, "ignored": 1, "bad": 1}.items():  # fmt: skip
        assert found["gateway_webhooks_total", outcome] == count, outcome
    assert found["gateway_webhook_ack_seconds_count",] == 10
    for (kind, why), count in {("locked", "link"): 2, ("moved", "link"): 1,
                               ("locked", "operator"): 1, ("unlocked", "operator"): 1,
                               ("moved", "tenant_move"): 1, ("erased", "operator"): 1,
                               ("merged", "merged_from"): 0}.items():  # fmt: skip
        assert found["gateway_lock_changes_total", kind, why] == count, (kind, why)
    assert found["gateway_links_without_effect_total", "stale"] == 1
    assert (found["gateway_locked_users",], found["gateway_locked_tenants",]) == (1, 1)
    assert found["gateway_store_up",] == 1
    assert found["gateway_store_commit_seconds_count",] > 5
    assert found["gateway_store_batch_size_sum",] >= found["gateway_store_batch_size_count",]
    assert found["gateway_disk_free_bytes",] > 0
    assert found["process_resident_memory_bytes",] > 10_000_000
    (build,) = [labels for name, *labels in found if name == "gateway_build_info"]
    assert {VERSION, "file"} <= set(build)


def test_who_may_not_call_is_counted(tmp_path: Path) -> None:
    with client_of(tmp_path, webhook_hmac_key="h" * 32) as client:
        assert client.post(HOOK, content=webhook()).status_code == 401
        assert scraped(client)["gateway_webhooks_total", "unauthorized"] == 1


def test_deliveries_are_counted_and_timed(tmp_path: Path) -> None:
    answers = iter([500, 200, 422])
    with client_of(tmp_path, handler=lambda _: httpx.Response(next(answers))) as client:
        said(client, "start_realty_2", sent=time.time() - 10)
        said(client, "to be refused", sent=time.time())
        for _ in range(1000):
            found = scraped(client)
            if found["gateway_dead_letters",] == 1:
                break
            time.sleep(0.01)
    for outcome in ("retry", "delivered", "dead_letter"):
        assert found["gateway_deliveries_total", outcome] == 1, outcome
    assert found["gateway_delivery_seconds_count",] == 3
    assert found["gateway_end_to_end_seconds_count",] == 1
    assert 10 <= found["gateway_end_to_end_seconds_sum",] < 60
    assert found["gateway_waiting_messages",] == found["gateway_oldest_waiting_seconds",] == 0


def test_of_tenants_only_those_with_the_most_waiting_have_a_series(tmp_path: Path) -> None:
    with client_of(tmp_path, handler=nobody, metrics_tenants=2) as client:
        for number, tenant in enumerate([1, 2, 2, 3, 3, 3]):
            said(client, f"start_realty_{tenant}", f"97150000{number:04}")
        found = scraped(client)
    waiting = {key[1]: n for key, n in found.items() if key[0] == "gateway_tenant_waiting_messages"}
    assert found["gateway_waiting_messages",] == 6
    assert waiting == {"3": 3, "2": 2}


def test_a_store_that_cannot_be_asked_still_gives_a_scrape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(_: FileStore) -> None:
        raise StoreUnavailable("the disk is full")

    with client_of(tmp_path) as client:
        monkeypatch.setattr(FileStore, "backlog", unavailable)
        found = scraped(client)
    assert math.isnan(found["gateway_waiting_messages",])
    assert found["gateway_in_flight",] == 0
