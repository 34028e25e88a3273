"""A start that fails half-way, and an end."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.waha import StandIn
from gateway import lifecycle
from gateway.errors import StartRefused, StoreUnavailable, WahaSilent
from gateway.inbound.recovery import Recovery
from gateway.lifecycle import running
from gateway.store import Limits
from tests.clients import client_of, settings_of
from tests.conftest import LIMITS, wait_until
from tests.messages import webhook


def unavailable(_: httpx.Request) -> httpx.Response:
    return httpx.Response(503)


def test_a_start_that_fails_half_way_lets_go_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: Recovery) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "start", fails)
        with (
            pytest.raises(StartRefused, match="went away while we started: gone"),
            client_of(tmp_path),
        ):
            pass
    with client_of(tmp_path) as client:
        assert client.get("/health").status_code == 200


def test_each_limit_that_is_a_setting_reaches_the_store(tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "max_in_flight": 7,
        "max_in_flight_per_tenant": 3,
        "max_backlog": 77,
        "max_backlog_per_tenant": 33,
        "hold_seconds": 5.5,
        "help_cooldown": 8.5,
    }
    limits = lifecycle._limits(settings_of(tmp_path, **odd))
    assert {name: getattr(limits, name) for name in odd} == odd
    assert limits.min_free_disk_bytes == Limits().min_free_disk_bytes


async def test_what_may_be_missing_is_noted_when_waha_falls_silent_or_a_message_is_refused(
    tmp_path: Path, waha: StandIn
) -> None:
    settings = settings_of(tmp_path, waha_api_url=waha.url)
    how: dict[str, Any] = {"limits": replace(LIMITS, max_backlog_per_tenant=1), "shut_down": print}
    way = httpx.MockTransport(unavailable)
    async with running(settings, transport=lambda _: way, **how) as pieces:
        await pieces.ingest.receive(webhook("start_realty_2", sent=time.time()), {})
        await wait_until(lambda: pieces.health_check.ever)
        assert pieces.recovery.gaps_since() == {}
        with pytest.raises(StoreUnavailable):
            await pieces.ingest.receive(webhook("hello", sent=time.time()), {})
        assert list(pieces.recovery._gaps) == ["default"], "noted, and not asked for yet"
        pieces.recovery._gaps.clear()
        pieces.health_check._silent(WahaSilent("gone"))
        assert list(pieces.recovery.gaps_since()) == ["default"]
        pieces.health_check._there()
        await wait_until(lambda: not pieces.recovery.gaps_since())


def test_the_gateways_own_numbers_are_locked_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tenants.json").write_text('{"2": {"gateway_phone": "971500000001"}}')
    with client_of(tmp_path) as client:
        for own in ("971557357753", "971500000001"):
            refused = client.post(f"/router/lock/{own}", json={"tenant_id": 2})
            assert (refused.status_code, refused.json()["detail"]) == (
                422, f"{own} is the gateway's own number: no user",
            )  # fmt: skip
