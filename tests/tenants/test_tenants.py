"""data/tenants.json: what may stand in it, what it changes, and how a change is taken up."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.domain.model import Address, Tenant
from gateway.errors import StartRefused
from gateway.tenants import registry as tenants_module
from gateway.tenants.registry import FILE_NAME, Tenants
from tests.clients import HOOK, client_of
from tests.conftest import wait_until
from tests.messages import ALI, SARA, tenant, webhook

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"
Write = Callable[[Any], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / FILE_NAME


def write(file: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.write_text(text, "utf-8")


def test_without_the_file_every_number_is_a_tenant(file: Path) -> None:
    assert Tenants(file).listed is None
    assert Tenants(file).may_lock(tenant(77))
    assert Tenants(None).may_lock(tenant(77))


def test_what_it_says(file: Path) -> None:
    full = {
        "name": "مارينا",
        "active": False,
        "backend_url": "https://office.example/hook",
        "signing_secret": SECRET,
        "gateway_phone": "971501112222",
        "note": "moved",
    }
    write(file, {"2": full, "3": {}})
    found = Tenants(file)
    address = Address("https://office.example/hook", (SECRET,))
    assert found.get(tenant(2)) == Tenant("مارينا", False, address, "971501112222", "moved")
    assert found.get(tenant(3)) == Tenant()
    assert found.get(tenant(4)) is None
    assert [found.may_lock(tenant(number)) for number in (2, 3, 4)] == [False, True, False]
    assert SECRET not in repr(found.get(tenant(2)))


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("{", "not JSON, or cut off"),
        ("", "not JSON, or cut off"),
        ("[]", "must hold an object"),
        ('{"2": {}, "2": {}}', "'2' is twice in one object"),
        ('{"2": {"name": "a", "name": "b"}}', "'name' is twice in one object"),
        ({"0": {}}, "'0' is no tenant"),
        ({"02": {}}, "'02' is no tenant"),
        ({"2147483648": {}}, "'2147483648' is no tenant"),
        ({"start_realty_2": {}}, "'start_realty_2' is no tenant"),
        ({"2": []}, "tenant 2: its entry: "),
        ({"2": {"nmae": "x"}}, "tenant 2: nmae: "),
        ({"2": {"active": "no"}}, "tenant 2: active: "),
        ({"2": {"name": 7}}, "tenant 2: name: "),
        ({"2": {"name": "a\nb"}}, "tenant 2: name: must be of one line"),
        ({"2": {"name": "x" * 201}}, "tenant 2: name: "),
        ({"2": {"backend_url": "office.example"}}, "tenant 2: backend_url: must be http"),
        ({"2": {"backend_url": "http://a:b@c"}}, "tenant 2: backend_url: must hold no user"),
        ({"2": {"gateway_phone": "+971 50"}}, "tenant 2: gateway_phone: "),
        ({"2": {"backend_url": "http://a", "signing_secret": "x"}}, "tenant 2: signing_secret: "),
        ({"2": {"signing_secret": SECRET}}, "tenant 2: signing_secret: signs what goes to"),
    ],
)
def test_what_is_wrong_stops_the_start_and_is_named(
    file: Path, content: Any, reported: str
) -> None:
    write(file, content)
    with pytest.raises(StartRefused) as refused:
        Tenants(file)
    assert reported in str(refused.value)
    assert str(file) in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.fixture
async def watched(file: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tenants]:
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    write(file, {"2": {"name": "two"}})
    tenants = Tenants(file)
    tenants.start()
    yield tenants
    tenants.stop()


def name_of(tenants: Tenants, number: int) -> str | None:
    found = tenants.get(tenant(number))
    return found.name if found else None


async def test_a_change_is_taken_up(watched: Tenants, file: Path) -> None:
    changes: list[int] = []
    watched.on_change(lambda: changes.append(1))
    write(file, {"2": {"name": "other"}, "3": {}})
    await wait_until(lambda: name_of(watched, 2) == "other")
    assert watched.may_lock(tenant(3))
    assert len(changes) == 1
    assert watched.trouble is None


@pytest.mark.parametrize("damage", ["{", '{"2": {"active": 1}}', None])
async def test_a_broken_or_missing_file_changes_nothing_and_is_reported_of(
    watched: Tenants, file: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if damage is None:
        file.unlink()
    else:
        write(file, damage)
    await wait_until(lambda: watched.trouble)
    assert name_of(watched, 2) == "two"
    await asyncio.sleep(0.1)  # several looks
    reported = [one for one in caplog.records if "still holds" in one.getMessage()]
    assert len(reported) == 1, "told once, not at every look"
    assert str(file) in reported[0].getMessage()
    with caplog.at_level(logging.WARNING):
        write(file, {"2": {"name": "mended"}})
        await wait_until(lambda: name_of(watched, 2) == "mended")
        assert watched.trouble is None


async def test_a_broken_file_that_goes_again_leaves_no_trouble(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    tenants = Tenants(file)
    tenants.start()
    write(file, "{")
    await wait_until(lambda: tenants.trouble)
    file.unlink()
    await wait_until(lambda: not tenants.trouble)
    assert tenants.listed is None
    tenants.stop()


async def test_a_file_that_comes_later_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    tenants = Tenants(file)
    tenants.start()
    assert tenants.may_lock(tenant(9))
    write(file, {"2": {}})
    await wait_until(lambda: not tenants.may_lock(tenant(9)))
    tenants.stop()


# what it changes


def say(client: TestClient, text: str, who: str = ALI) -> dict[str, Any]:
    answer: dict[str, Any] = client.post(HOOK, content=webhook(text, who, sent=time.time())).json()
    return answer


def test_a_link_to_an_unknown_or_inactive_tenant_locks_nobody(tmp_path: Path, file: Path) -> None:
    write(file, {"2": {}, "3": {"active": False}})
    with client_of(tmp_path) as client:
        for number in (3, 4):
            assert say(client, f"start_realty_{number}") == {
                "status": "unknown_user",
                "action": "unknown_tenant",
                "user": ALI,
            }
        assert say(client, "start_realty_2")["tenant_id"] == 2
        for number in (3, 4):
            assert say(client, f"start_realty_{number}")["tenant_id"] == 2
        reported = client.get(f"/router/user/{ALI}/history").json()["history"]
        assert [(one["what"], one["from_tenant"], one["to_tenant"]) for one in reported] == [
            ("refused", 2, 4),
            ("refused", 2, 3),
            ("locked", None, 2),
            ("refused", None, 4),
            ("refused", None, 3),
        ]
        explained = client.post("/router/explain", content=webhook("start_realty_4", SARA)).json()
        assert explained["answer"]["action"] == "unknown_tenant"
        assert "tenants.json does not know it" in explained["rules"]["link"]


def test_who_sent_a_refused_link_can_be_locked_by_hand_and_nothing_is_lost(
    tmp_path: Path, file: Path
) -> None:
    write(file, {"2": {}})
    with client_of(tmp_path) as client:
        say(client, "start_realty_12 I want the flat")
        locked = client.post(f"/router/lock/{ALI}", json={"tenant_id": 2}).json()
        assert locked["released"] == 1


def test_what_waits_for_a_tenant_that_the_file_lacks_goes_nowhere(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip in a number sent a tenant's messages to the common backend."""
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    got: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        got.append(request.headers["X-Tenant-ID"])
        return httpx.Response(200)

    write(file, {"22": {"backend_url": "http://own"}, "3": {}})
    with client_of(tmp_path) as client:
        client.post(f"/router/lock/{SARA}", json={"tenant_id": 3})
    write(file, {"2": {}, "3": {}})
    with client_of(tmp_path, handler=note) as client:
        client.post(f"/router/lock/{ALI}", json={"tenant_id": 2})
        write(file, {"22": {}, "3": {}})
        for _ in range(500):
            if client.get("/router/link/2").status_code == 404:
                break
            time.sleep(0.01)
        say(client, "hello")
        say(client, "hello", SARA)
        for _ in range(500):
            if got:
                break
            time.sleep(0.01)
        assert got == ["3"]
        reported = client.get("/ready").json()["backlog"]
        assert reported == "degraded: messages wait of tenants that tenants.json lacks: 2"
        write(file, {"2": {}, "3": {}})
        for _ in range(500):
            if len(got) > 1:
                break
            time.sleep(0.01)
        assert got == ["3", "2"]


def test_users_of_a_tenant_that_became_inactive_go_on(tmp_path: Path, file: Path) -> None:
    with client_of(tmp_path) as client:
        say(client, "start_realty_2")
    write(file, {"2": {"active": False}})
    with client_of(tmp_path) as client:
        assert say(client, "hello")["tenant_id"] == 2
        assert say(client, "start_realty_2")["tenant_id"] == 2
        assert say(client, "start_realty_2", SARA)["action"] == "unknown_tenant"


def test_ready_shows_of_the_file(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_module, "_CHECK_SECONDS", 0.01)
    with client_of(tmp_path) as client:
        assert client.get("/ready").json()["tenants_file"] == "ok: none, every number is a tenant"
    write(file, {"2": {}})
    with client_of(tmp_path) as client:
        assert client.get("/ready").json()["tenants_file"] == "ok: 1 tenants"
        write(file, "{")
        for _ in range(500):
            ready = client.get("/ready").json()
            if ready["tenants_file"].startswith("degraded"):
                break
            time.sleep(0.01)
        assert ready["tenants_file"].startswith(f"degraded: {file}: not JSON")


def test_a_broken_file_stops_the_start(tmp_path: Path, file: Path) -> None:
    write(file, "{")
    with pytest.raises(StartRefused, match="not JSON"), client_of(tmp_path):
        pass
