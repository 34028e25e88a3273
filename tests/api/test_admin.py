"""/router/*, /health and /ready: answers to the letter."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.clients import HOOK, client_of
from tests.messages import ALI, LID, SARA, example, webhook


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as opened:
        yield opened


def lock(client: TestClient, user: str = ALI, tenant: int = 2, **how: Any) -> None:
    body = webhook(f"start_realty_{tenant}", user, sent=time.time(), **how)
    assert client.post(HOOK, content=body).json()["status"] == "routed"


def test_health(client: TestClient) -> None:
    text = (
        '{"status":"healthy","service":"whatsapp-gateway-router",'
        '"total_locked_users":%d,"unique_tenants":%d}'
    )
    assert client.get("/health").text == text % (0, 0)
    lock(client)
    lock(client, SARA)
    assert client.get("/health").text == text % (2, 1)


def test_a_user(client: TestClient) -> None:
    assert client.get(f"/router/user/{ALI}").text == (
        '{"phone":"971501234567","locked_to_tenant":null,"status":"no_session"}'
    )
    lock(client)
    assert client.get(f"/router/user/{ALI}").text == (
        '{"phone":"971501234567","locked_to_tenant":2,"status":"active_session"}'
    )


@pytest.mark.parametrize(
    "spelling",
    [
        "971501234567",
        "+971501234567",
        "+971 50 123 4567",
        "+971-50-123.4567",
        "(971) 501234567",
        "971501234567@c.us",
        "971501234567@s.whatsapp.net",
        " 971501234567 ",
    ],
)
def test_a_phone_in_any_usual_spelling(client: TestClient, spelling: str) -> None:
    lock(client)
    answer = client.get(f"/router/user/{quote(spelling)}").json()
    assert answer == {"phone": ALI, "locked_to_tenant": 2, "status": "active_session"}


def test_a_lid_finds_the_person(client: TestClient) -> None:
    lock(client, LID, other_id=ALI)
    for spelling in (LID, ALI):
        assert client.get(f"/router/user/{spelling}").json()["phone"] == ALI
    assert client.get("/router/user/158764321000099@lid").json()["phone"] == "158764321000099@lid"


@pytest.mark.parametrize(
    "spelling",
    ["1234", "9" * 21, "abc", "97150x1234567", "971501234567@g.us", "+", "@lid", "12@lid", "%00"],
)
def test_what_is_no_user_is_named(client: TestClient, spelling: str) -> None:
    for answer in (
        client.get(f"/router/user/{quote(spelling)}"),
        client.post(f"/router/unlock/{quote(spelling)}"),
    ):
        assert answer.status_code == 422
        assert "is no user" in answer.json()["detail"]


def test_stats(client: TestClient) -> None:
    assert client.get("/router/stats").text == (
        '{"total_locked_users":0,"unique_tenants":0,"mappings":{}}'
    )
    lock(client, SARA, 3)
    lock(client, ALI, 2)
    assert client.get("/router/stats").text == (
        '{"total_locked_users":2,"unique_tenants":2,"mappings":{"971501234567":2,"971501234568":3}}'
    )
    first = client.get("/router/stats?limit=1")
    assert first.text == (
        '{"total_locked_users":2,"unique_tenants":2,"mappings":{"971501234567":2},'
        '"next":"971501234567"}'
    )
    second = client.get("/router/stats", params={"limit": 1, "after": first.json()["next"]})
    assert second.json() == {"total_locked_users": 2, "unique_tenants": 2, "mappings": {SARA: 3}}


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=1000000", "after=" + "9" * 200])
def test_stats_refuses_what_it_cannot_count(client: TestClient, query: str) -> None:
    assert client.get(f"/router/stats?{query}").status_code == 422


def test_unlock(client: TestClient) -> None:
    lock(client)
    assert client.post(f"/router/unlock/{ALI}").text == (
        '{"status":"unlocked","phone":"971501234567","was_locked_to":2}'
    )
    again = client.post(f"/router/unlock/{ALI}")
    assert (again.status_code, again.text) == (404, '{"status":"not_found","phone":"971501234567"}')


def test_another_session(client: TestClient) -> None:
    lock(client)
    lock(client, tenant=7, session="sales")
    assert client.get(f"/router/user/{ALI}?session=sales").json()["locked_to_tenant"] == 7
    assert client.get(f"/router/user/{ALI}?session=default").json()["locked_to_tenant"] == 2
    assert client.get(f"/router/user/{ALI}?session=a/b").status_code == 422
    mappings = client.get("/router/stats").json()["mappings"]
    assert mappings == {ALI: 2, f"sales/{ALI}": 7}
    unlocked = client.post(f"/router/unlock/{ALI}?session=sales").json()
    assert unlocked == {"status": "unlocked", "phone": ALI, "was_locked_to": 7}


def test_ready_has_a_line_for_each_part(client: TestClient) -> None:
    client.post(HOOK, content=example(30))
    answer = client.get("/ready")
    assert answer.status_code == 200
    assert list(answer.json()) == [
        "status",
        "store",
        "mappings_file",
        "backlog",
        "dead_letters",
        "unreadable",
        "circuit_breakers",
        "tenants_file",
        "waha",
        "waha_session default",
        "clock",
        "recovery",
        "webhook_bodies",
    ]
    # The tests' WAHA is a port at which nobody listens.
    others = [line for name, line in answer.json().items() if name not in ("status", "waha")]
    assert all(line.startswith("ok: ") for line in others)
    assert answer.json()["waha_session default"].startswith("ok: WORKING, last event ")
    assert len(answer.text.splitlines()) == 15


def test_ready_says_that_a_session_is_down(client: TestClient) -> None:
    client.post(
        HOOK,
        content=example(30).replace(
            b'"status":"WORKING","statuses"', b'"status":"FAILED","statuses"'
        ),
    )
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["waha_session default"].startswith("degraded: FAILED, last event ")


def test_ready_does_not_say_that_nothing_is_missing_where_nobody_asks(tmp_path: Path) -> None:
    with client_of(tmp_path, recover_hours=0) as client:
        assert client.get("/ready").json()["recovery"] == "ok: off: RECOVER_HOURS=0"


def test_ready_says_that_a_backend_answers_and_takes_nothing(tmp_path: Path) -> None:
    """A wrong BACKEND_SIGNING_SECRET opens no breaker: it is an answer."""
    status = 401
    with client_of(tmp_path, handler=lambda _: httpx.Response(status)) as client:
        for number in range(6):
            client.post(HOOK, content=webhook("start_realty_2", f"9715000000{number:02}"))
        for _ in range(400):
            said = client.get("/ready").json()["circuit_breakers"]
            if "times in a row" in said:
                break
            time.sleep(0.01)
        assert re.search(r"tenant 2 failed \d+ times: ", said)
        assert said.endswith(": 401")
        status = 200
        client.post(HOOK, content=webhook("start_realty_2", "971500000099"))
        for _ in range(400):
            said = client.get("/ready").json()["circuit_breakers"]
            if said.startswith("ok: closed"):
                break
            time.sleep(0.01)
        assert said.startswith("ok: closed")


def test_the_documents_are_served(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/health",
        "/ready",
        "/router/status",
        "/router/user/{phone}",
        "/router/stats",
        "/router/user/{phone}/history",
        "/router/user/{phone}/export",
        "/router/lock/{phone}",
        "/router/unlock/{phone}",
        "/router/tenants",
        "/router/tenants/{number}/users",
        "/router/tenants/{number}/move",
        "/router/link/{number}",
        "/router/link/{number}/qr.{kind}",
        "/router/pending",
        "/router/unreadable",
        "/router/backup",
        "/router/recover",
        "/router/explain",
        "/router/dead-letters",
        "/router/dead-letters/replay",
        "/router/dead-letters/{number}",
        "/router/dead-letters/{number}/replay",
    }
    assert "GET /router/user/{phone}" in client.get("/docs").text


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[tuple[TestClient, list[int]]]:
    """A client, and the backend's answers to come: the last one stays."""
    answers = [422]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(answers[0], text="no such flat")

    with client_of(tmp_path, handler=answer) as opened:
        yield opened, answers


def until(client: TestClient, path: str, count: int) -> Any:
    """The list at path once it has count entries: delivering is not waited for by the webhook."""
    for _ in range(400):
        found = client.get(path).json()["dead_letters"]
        if len(found) == count:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{path}: {found}")


def test_dead_letters_are_seen_replayed_and_deleted(
    refused: tuple[TestClient, list[int]],
) -> None:
    client, answers = refused
    lock(client)
    lock(client, SARA, 3)
    listed = until(client, "/router/dead-letters", 2)
    newest = listed[0]
    assert list(newest) == [
        "id",
        "tenant_id",
        "user",
        "reason",
        "last_status",
        "answer",
        "attempts",
        "arrived",
        "died",
        "message_id",
        "idempotency_key",
    ]
    assert (newest["last_status"], newest["answer"]) == (422, "no such flat")
    by_user = client.get("/router/dead-letters?user=%2B971 50 123 4567").json()["dead_letters"]
    assert [one["tenant_id"] for one in by_user] == [2]
    assert len(client.get("/router/dead-letters?tenant=3").json()["dead_letters"]) == 1
    page = client.get("/router/dead-letters?limit=1").json()
    assert page["next"] == newest["id"]
    rest = client.get(f"/router/dead-letters?limit=1&before={page['next']}").json()
    assert [one["id"] for one in rest["dead_letters"]] == [listed[1]["id"]]
    assert "next" not in rest

    one = client.get(f"/router/dead-letters/{newest['id']}").json()
    assert "start_realty" in one["body"]
    answers[0] = 200
    again = client.post(f"/router/dead-letters/{newest['id']}/replay")
    assert again.json() == {"status": "replayed", "id": newest["id"]}
    until(client, "/router/dead-letters", 1)
    gone = client.delete(f"/router/dead-letters/{listed[1]['id']}")
    assert gone.json() == {"status": "deleted", "id": listed[1]["id"]}
    assert client.post("/router/dead-letters/replay?all=true").json() == {
        "status": "replayed",
        "count": 0,
    }


def test_what_is_no_dead_letter_is_named(client: TestClient) -> None:
    for answer in (
        client.get("/router/dead-letters/7"),
        client.post("/router/dead-letters/7/replay"),
        client.delete("/router/dead-letters/7"),
    ):
        assert (answer.status_code, answer.json()) == (404, {"status": "not_found", "id": 7})
    for path in ("?tenant=0", "?tenant=x", "?user=abc", "?limit=0", "?before=-1", "/x", "/0"):
        assert client.get(f"/router/dead-letters{path}").status_code == 422, path
    assert client.post("/router/dead-letters/replay?user=").status_code == 422
    refused = client.post("/router/dead-letters/replay")
    assert (refused.status_code, "all=true" in refused.json()["detail"]) == (422, True)


def test_pending(tmp_path: Path) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client_of(tmp_path, handler=away) as client:
        assert client.get("/router/pending").text == '{"waiting":0,"oldest":null,"tenants":[]}'
        lock(client)
        pending = client.get("/router/pending").json()
        assert pending["waiting"] == 1
        assert pending["oldest"].endswith("Z")
        assert pending["tenants"] == [{"tenant_id": 2, "waiting": 1}]


def test_unlock_can_drop_what_waits(tmp_path: Path) -> None:
    def away(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client_of(tmp_path, handler=away) as client:
        for text in ("start_realty_2", "one", "two"):
            client.post(HOOK, content=webhook(text, sent=time.time()))
        assert client.post(f"/router/unlock/{ALI}?waiting=perhaps").status_code == 422
        answer = client.post(f"/router/unlock/{ALI}?waiting=drop").json()
        assert list(answer) == ["status", "phone", "was_locked_to", "dropped"]
        assert answer["dropped"] in (2, 3), "what is in flight at that moment is not called back"


def test_status_says_what_ready_says_for_programs(client: TestClient) -> None:
    client.post(HOOK, content=webhook("hello", sent=time.time()))
    lines = client.get("/ready").json()
    components = client.get("/router/status").json()["components"]
    assert {one["component"] for one in components} >= {"store", "backlog", "waha", "clock"}
    for one in components:
        name = f"{one['component']} {one['session'] or ''}".strip()
        good = "ok" if one["status"] == "OK" else "degraded"
        if "second" not in one["text"] and " s" not in one["text"]:  # time goes on
            assert lines[name] == f"{good}: {one['text']}"
        assert one["code"].startswith(f"{one['component']}.")
        assert one["status"] in ("OK", "WARN", "DOWN")
