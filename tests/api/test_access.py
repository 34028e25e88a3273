"""Who may call. Each clause of "this machine" has its row."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.requests import HTTPConnection

from gateway.api.access import Access
from gateway.errors import BadSignature, NotAllowed
from tests.clients import HOOK, client_of, settings_of
from tests.messages import webhook


def connection(
    *,
    peer: str | None = "127.0.0.1",
    local: str = "127.0.0.1",
    version: str = "1.1",
    **headers: str,
) -> HTTPConnection:
    named = {"host": "localhost:8001"} | {n.replace("_", "-"): v for n, v in headers.items()}
    return HTTPConnection(
        {
            "type": "http",
            "http_version": version,
            "client": None if peer is None else (peer, 50_000),
            "server": (local, 8001),
            "headers": [(n.encode(), v.encode("latin-1")) for n, v in named.items() if v],
        }
    )


def twice(name: str, first: str, second: str) -> HTTPConnection:
    call = connection(host="" if name == "host" else "localhost")
    call.scope["headers"] += [(name.encode(), value.encode()) for value in (first, second)]
    return call


@pytest.mark.parametrize(
    "call",
    [
        connection(),
        connection(peer="127.8.9.1"),
        connection(peer="::1", local="::1", host="[::1]:8001"),
        connection(peer="::ffff:127.0.0.1", local="::ffff:127.0.0.1"),
        connection(host="127.0.0.1"),
        connection(host="LOCALHOST:8001"),
        connection(sec_fetch_site="none"),
        connection(sec_fetch_site="same-origin"),
    ],
)
def test_this_machine_is_served_without_keys(tmp_path: Path, call: HTTPConnection) -> None:
    access = Access(settings_of(tmp_path))
    access.check_webhook(call)
    access.check_admin(call)


@pytest.mark.parametrize(
    ("origin", "may"),
    [
        ("http://localhost:8001", True),
        ("http://localhost:9999", False),
        ("http://evil.example", False),
        ("https://localhost:8001", False),
        ("null", False),
        ("", True),
    ],
)
def test_only_the_pages_own_forms_may_say_where_they_come_from(
    tmp_path: Path, origin: str, may: bool
) -> None:
    access, call = Access(settings_of(tmp_path)), connection(origin=origin)
    if may:
        access.check_page(call)
    else:
        with pytest.raises(NotAllowed, match="a web page sent it"):
            access.check_page(call)
    if origin:
        with pytest.raises(NotAllowed):
            access.check_admin(call)


@pytest.mark.parametrize(
    ("call", "host"),
    [
        (connection(), "0.0.0.0"),
        (connection(), "192.168.1.5"),
        (connection(peer="192.168.1.9"), "127.0.0.1"),
        (connection(peer="::ffff:192.168.1.9"), "127.0.0.1"),
        (connection(peer=None), "127.0.0.1"),
        (connection(local="192.168.1.5"), "127.0.0.1"),
        (connection(forwarded="for=1.2.3.4"), "127.0.0.1"),
        (connection(x_forwarded_for="1.2.3.4"), "127.0.0.1"),
        (connection(x_forwarded_proto="https"), "127.0.0.1"),
        (connection(x_real_ip="1.2.3.4"), "127.0.0.1"),
        (connection(via="1.1 proxy"), "127.0.0.1"),
        (connection(host="evil.example"), "127.0.0.1"),
        (connection(host="localhost.evil.example:8001"), "127.0.0.1"),
        (connection(host=""), "127.0.0.1"),
        (twice("host", "localhost", "evil.example"), "127.0.0.1"),
        (twice("sec-fetch-site", "none", "cross-site"), "127.0.0.1"),
        (connection(origin="http://localhost:8001"), "127.0.0.1"),
        (connection(origin="null"), "127.0.0.1"),
        (connection(sec_fetch_site="cross-site"), "127.0.0.1"),
        (connection(sec_fetch_site="same-site"), "127.0.0.1"),
        (connection(version="1.0"), "127.0.0.1"),
    ],
)
def test_anything_else_is_refused_and_names_what_to_set(
    tmp_path: Path, call: HTTPConnection, host: str
) -> None:
    access = Access(settings_of(tmp_path, host=host))
    with pytest.raises(NotAllowed, match="WEBHOOK_HMAC_KEY"):
        access.check_webhook(call)
    with pytest.raises(NotAllowed, match="ADMIN_API_KEY"):
        access.check_admin(call)


def test_wahas_key_opens_the_webhook_and_this_machine_needs_none(tmp_path: Path) -> None:
    access = Access(settings_of(tmp_path, waha_api_key="secret"))
    access.check_webhook(connection(peer="10.0.0.5", x_api_key="secret"))
    access.check_webhook(connection())
    for call in (
        connection(peer="10.0.0.5"),
        connection(peer="10.0.0.5", x_api_key="secreT"),
        connection(peer="10.0.0.5", x_api_key="\xe9"),
    ):
        with pytest.raises(BadSignature, match="WAHA_API_KEY"):
            access.check_webhook(call)


def test_the_admin_key_is_asked_of_this_machine_too(tmp_path: Path) -> None:
    access = Access(settings_of(tmp_path, admin_api_key="new,old"))
    access.check_admin(connection(peer="10.0.0.5", x_api_key="new"))
    access.check_admin(connection(x_api_key="old"))
    for call in (connection(), connection(x_api_key="new,old"), connection(x_api_key="")):
        with pytest.raises(BadSignature, match="ADMIN_API_KEY"):
            access.check_admin(call)


@pytest.mark.parametrize("keys", ["new,old"])
def test_a_key_may_come_as_a_bearer_and_more_than_once(tmp_path: Path, keys: str) -> None:
    """Prometheus 3.5 repeats a header at each scrape, and older ones know `authorization` only."""
    access = Access(settings_of(tmp_path, admin_api_key=keys, waha_api_key="w", host="0.0.0.0"))
    for call in (
        connection(authorization="Bearer new"),
        connection(authorization="bearer  old"),
        twice("x-api-key", "new", "new"),
        twice("authorization", "Bearer new", "Bearer new"),
        connection(x_api_key="new", authorization="Basic eA=="),
    ):
        access.check_admin(call)
    for call in (
        twice("x-api-key", "new", "old"),
        twice("authorization", "Bearer new", "Bearer old"),
        connection(authorization="Basic new"),
        connection(authorization="Bearer"),
        connection(authorization="new"),
    ):
        with pytest.raises(BadSignature):
            access.check_admin(call)
    access.check_webhook(connection(peer="10.0.0.5", authorization="Bearer w"))


GUARDED = [
    "/ready",
    "/metrics",
    "/router/stats",
    "/router/user/971501234567",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", GUARDED)
def test_what_the_admin_key_guards(tmp_path: Path, path: str) -> None:
    with client_of(tmp_path, admin_api_key="secret") as client:
        refused = client.get(path)
        assert (refused.status_code, list(refused.json())) == (401, ["detail"])
        assert client.get(path, headers={"X-Api-Key": "secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_from_elsewhere_without_keys_only_health_answers(tmp_path: Path) -> None:
    with client_of(tmp_path, host="0.0.0.0") as local:
        far = TestClient(local.app, client=("10.0.0.5", 50_000))
        for path in GUARDED:
            refused = far.get(path)
            assert (refused.status_code, list(refused.json())) == (403, ["detail"])
            assert "ADMIN_API_KEY" in refused.text
        refused = far.post(HOOK, content=webhook("start_realty_2"))
        assert (refused.status_code, list(refused.json())) == (403, ["detail"])
        assert far.post("/router/unlock/971501234567").status_code == 403
        assert far.get("/health").json()["total_locked_users"] == 0
