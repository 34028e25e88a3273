"""A start that fails half-way, and an end."""

from pathlib import Path

import pytest

from gateway.errors import StartRefused, StoreUnavailable
from gateway.recovery import Recovery
from tests.clients import client_of


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


def test_the_gateways_own_numbers_are_locked_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tenants.json").write_text('{"2": {"gateway_phone": "971500000001"}}')
    with client_of(tmp_path) as client:
        for own in ("971557357753", "971500000001"):
            refused = client.post(f"/router/lock/{own}", json={"tenant_id": 2})
            assert (refused.status_code, refused.json()["detail"]) == (
                422, f"{own} is the gateway's own number: no user",
            )  # fmt: skip
