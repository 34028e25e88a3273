"""/router/lock, /router/tenants and a person's own: answers to the letter."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.tenants.registry import FILE_NAME
from tests.clients import HOOK, client_of
from tests.messages import ALI, LID, OMAR, SARA, webhook


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """The backend is away, so that messages wait."""
    with client_of(tmp_path, handler=away) as opened:
        yield opened


def away(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody listens")


def say(client: TestClient, text: str, who: str = ALI, **how: Any) -> None:
    body = webhook(text, who, sent=time.time(), **how)
    assert client.post(HOOK, content=body).status_code == 200


def test_lock_and_move(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    text = (
        '{"status":"locked","phone":"971501234567","locked_to_tenant":%s,'
        '"was_locked_to":%s,"released":%s}'
    )
    say(client, "hello")
    for tenant, before, released in ((5, "null", 1), (7, 5, 0)):
        answer = client.post("/router/lock/+971 50 123 4567", json={"tenant_id": tenant})
        assert answer.text == text % (tenant, before, released)
    assert client.get(f"/router/user/{ALI}").json()["locked_to_tenant"] == 7
    assert f"An operator locked {ALI} to Tenant 7 (before: 5)" in caplog.text
    other = client.post(f"/router/lock/{ALI}?session=sales", json={"tenant_id": 9}).json()
    assert other["was_locked_to"] is None
    assert client.get("/router/stats").json()["mappings"] == {ALI: 7, f"sales/{ALI}": 9}


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ({}, "tenant_id"),
        ({"tenant_id": 0}, "0"),
        ({"tenant_id": 2147483648}, "2147483648"),
        ({"tenant_id": "5"}, "tenant_id"),
        ({"tenant_id": True}, "tenant_id"),
        ({"tenant_id": 4}, "tenant 4 is not in tenants.json"),
        ({"tenant_id": 3}, "tenant 3 is not active"),
        ([], "tenant_id"),
    ],
)
def test_what_nobody_can_be_locked_to_is_named(tmp_path: Path, body: Any, reported: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE_NAME).write_text(json.dumps({"2": {}, "3": {"active": False}}))
    with client_of(tmp_path) as client:
        refused = client.post(f"/router/lock/{ALI}", json=body)
        assert refused.status_code == 422
        assert reported in refused.text
        assert client.get("/health").json()["total_locked_users"] == 0


@pytest.mark.parametrize(
    ("path", "body", "reported"),
    [
        ("lock/971501234567", '{"tenant_id": NaN}', "nan"),
        ("lock/971501234567", '{"tenant_id": 1e999}', "inf"),
        ("lock/971501234567", '{"tenant_id": "\\ud800"}', "ud800"),
        ("tenants/2/move", '{"to": 5, "waiting": "\\udfff"}', "udfff"),
        ("tenants/2/move", '{"to": NaN}', "nan"),
    ],
)
def test_what_json_cannot_say_back_is_named_all_the_same(
    client: TestClient, path: str, body: str, reported: str
) -> None:
    headers = {"Content-Type": "application/json"}
    refused = client.post(f"/router/{path}", content=body, headers=headers)
    assert refused.status_code == 422
    assert reported in refused.json()["detail"]


def test_the_gateways_own_number_is_nobodys(client: TestClient) -> None:
    refused = client.post("/router/lock/971557357753", json={"tenant_id": 2})
    assert refused.status_code == 422
    assert "the gateway's own number" in refused.text


def test_the_number_of_a_tenants_links_is_no_user_either(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    listed = {"2": {}, "3": {"gateway_phone": "971500000001"}}
    (tmp_path / "data" / FILE_NAME).write_text(json.dumps(listed))
    with client_of(tmp_path) as client:
        refused = client.post("/router/lock/971500000001", json={"tenant_id": 2})
        assert refused.status_code == 422
        body = webhook("start_realty_2", "971500000001", sent=time.time())
        answer = client.post(HOOK, content=body).json()
        assert (answer["status"], answer["reason"]) == ("ignored", "own_number")


def test_who_is_no_user_is_named(client: TestClient) -> None:
    for method, path in (
        ("POST", "lock/x"),
        ("GET", "user/x/history"),
        ("GET", "user/x/export"),
        ("DELETE", "user/x"),
    ):
        refused = client.request(method, f"/router/{path}", json={"tenant_id": 2})
        assert refused.status_code == 422
        assert "'x' is no user" in refused.text


def test_a_tenant_moves(client: TestClient) -> None:
    say(client, "start_realty_2")
    say(client, "start_realty_2", SARA)
    assert client.post("/router/tenants/2/move", json={"to": 7}).json()["users"] == 2
    assert client.get("/router/tenants/7/users").text == (
        '{"tenant_id":7,"users":["971501234567","971501234568"]}'
    )
    assert client.get("/router/stats").json()["unique_tenants"] == 1
    answer = client.post("/router/tenants/7/move", json={"to": 8, "waiting": "keep"})
    assert answer.text == '{"status":"moved","from":7,"to":8,"users":2,"waiting":0}'
    gone = client.post("/router/tenants/9/move", json={"to": 8})
    assert (gone.status_code, gone.text) == (404, '{"status":"not_found","tenant_id":9}')


@pytest.mark.parametrize(
    ("number", "body", "reported"),
    [
        (2, {}, "to"),
        (2, {"to": 2}, "`to` is 2"),
        (2, {"to": 0}, "0"),
        (2, {"to": 5, "waiting": "drop"}, "drop"),
        (0, {"to": 5}, "0"),
    ],
)
def test_a_move_that_cannot_be_changes_nothing(
    client: TestClient, number: int, body: dict[str, Any], reported: str
) -> None:
    say(client, "start_realty_2")
    refused = client.post(f"/router/tenants/{number}/move", json=body)
    assert refused.status_code == 422
    assert reported in refused.text
    assert client.get("/router/stats").json()["mappings"] == {ALI: 2}


def test_tenants_and_their_figures(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / FILE_NAME).write_text(json.dumps({"2": {"name": "مارينا"}, "9": {}}))
    with client_of(tmp_path) as client:
        say(client, "start_realty_2")
        say(client, "hello")
        for _ in range(500):
            page = client.get("/router/tenants").json()
            if page["tenants"][0]["delivered"] == 2:
                break
            time.sleep(0.01)
        two, nine = page["tenants"]
        assert two.pop("first_seen") <= two.pop("last_seen")
        assert two == {
            "tenant_id": 2,
            "name": "مارينا",
            "active": True,
            "note": "",
            "users": 1,
            "delivered": 2,
            "waiting": 0,
            "dead": 0,
        }
        assert (nine["users"], nine["last_seen"]) == (0, None)
        first = client.get("/router/tenants?limit=1").json()
        assert ([one["tenant_id"] for one in first["tenants"]], first["next"]) == ([2], 2)
        rest = client.get("/router/tenants?limit=1&after=2").json()
        assert [one["tenant_id"] for one in rest["tenants"]] == [9]
        assert "next" not in rest


def test_the_users_of_a_tenant_come_in_pages(client: TestClient) -> None:
    for who in (ALI, SARA, OMAR):
        say(client, "start_realty_2", who)
    first = client.get("/router/tenants/2/users?limit=2").json()
    assert (first["users"], first["next"]) == ([ALI, SARA], SARA)
    rest = client.get("/router/tenants/2/users", params={"limit": 2, "after": SARA}).json()
    assert rest == {"tenant_id": 2, "users": [OMAR]}
    assert client.get("/router/tenants/77/users").json() == {"tenant_id": 77, "users": []}


def test_the_history_of_a_user(client: TestClient) -> None:
    say(client, "start_realty_2", bare_id="3EB0A1")
    client.post(f"/router/unlock/{ALI}")
    page = client.get(f"/router/user/{ALI}/history?limit=1").json()
    (line,) = page["history"]
    assert line.pop("at")[:2] == "20"
    assert line == {
        "id": page["next"],
        "user": ALI,
        "what": "unlocked",
        "from_tenant": 2,
        "to_tenant": None,
        "message_id": None,
        "why": "operator",
        "other": None,
    }
    older = client.get(f"/router/user/{ALI}/history?before={page['next']}").json()
    assert [(one["what"], one["message_id"]) for one in older["history"]] == [("locked", "3EB0A1")]
    assert "next" not in older
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert client.request(method, f"/router/user/{ALI}/history").status_code == 405


def test_a_person_is_exported_and_erased(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    say(client, "start_realty_2 🏠", LID, other_id=ALI)
    say(client, "start_realty_3", SARA)
    export = client.get(f"/router/user/{ALI}/export").json()
    assert (export["ids"], export["locked_to_tenant"]) == ([ALI, LID], 2)
    (stored,) = export["messages"]
    assert (stored["where"], stored["tenant_id"]) == ("waiting", 2)
    assert "start_realty_2 🏠" in stored["body"]
    assert [one["what"] for one in export["history"]] == ["locked"]
    caplog.set_level(logging.INFO)
    caplog.clear()
    erased = client.delete(f"/router/user/{LID}").json()
    assert "An operator erased a person" in caplog.text
    assert ALI not in caplog.text
    assert erased == {
        "status": "erased",
        "phone": ALI,
        "locks": 1,
        "waiting": 1,
        "held": 0,
        "dead_letters": 0,
        "aliases": 1,
        "help": 0,
        "unreadable": 0,
        "history": 1,
    }
    again = client.delete(f"/router/user/{ALI}")
    assert (again.status_code, again.json()) == (404, {"status": "not_found", "phone": ALI})
    assert client.get(f"/router/user/{ALI}/history").json() == {"history": []}
    assert client.get("/router/stats").json()["mappings"] == {SARA: 3}


def test_the_number_of_who_was_erased_is_in_no_file(tmp_path: Path) -> None:
    with client_of(tmp_path, handler=away) as client:
        say(client, "start_realty_2", LID, other_id=ALI)
        client.delete(f"/router/user/{ALI}")
    for file in (tmp_path / "data").iterdir():
        content = file.read_bytes()
        assert ALI.encode() not in content, file
        assert LID.encode() not in content, file
