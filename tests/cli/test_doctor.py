"""What the doctor makes of single things; tests/e2e/test_commands.py runs it whole."""

import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.waha import StandIn
from gateway.cli import doctor
from gateway.cli.doctor import Verdict
from gateway.waha.webhook_config import Wanted, repaired
from tests.clients import settings_of

URL = "http://router:8001/webhook/waha"
KEYS = {
    "webhook_hmac_key": "k" * 32,
    "admin_api_key": "k" * 32,
    "backend_signing_secret": "whsec_" + "c2VjcmV0" * 5,
}


@pytest.mark.parametrize(
    ("date", "verdict"),
    [
        (lambda: formatdate(time.time(), usegmt=True), Verdict.OK),
        (lambda: formatdate(time.time() - 60, usegmt=True), Verdict.WRONG),
        (lambda: formatdate(time.time() + 60, usegmt=True), Verdict.WRONG),
        (lambda: "yesterday", Verdict.MIND),
    ],
)
def test_clocks(date: Callable[[], str], verdict: Verdict) -> None:
    answer = httpx.Response(200, headers={"date": date()})
    assert doctor._clock("clock", answer).verdict is verdict
    assert doctor._clock("clock", httpx.Response(200)).verdict is Verdict.MIND


@pytest.mark.parametrize(
    ("age", "verdict"), [(None, Verdict.MIND), (60, Verdict.OK), (30_000, Verdict.MIND)]
)
def test_silence(age: float | None, verdict: Verdict) -> None:
    last = None if age is None else time.time() - age
    assert doctor._silence("default", last).verdict is verdict


@pytest.mark.parametrize(
    ("me", "verdicts"),
    [
        ({"id": "971557357753@c.us"}, [Verdict.OK]),
        ({"id": "15550001111@c.us"}, [Verdict.WRONG]),
        ({"id": None}, []),
        (None, []),
    ],
)
def test_the_number_that_links_name(tmp_path: Path, me: object, verdicts: list[Verdict]) -> None:
    found = list(doctor._number({"me": me}, settings_of(tmp_path)))
    assert [one.verdict for one in found] == verdicts
    if Verdict.WRONG in verdicts:
        assert "GATEWAY_PHONE=15550001111" in found[0].cure


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, Verdict.OK),
        (405, Verdict.OK),
        (404, Verdict.OK),
        (502, Verdict.WRONG),
        (301, Verdict.WRONG),
        (308, Verdict.WRONG),
    ],
)
async def test_backends(status: int, verdict: Verdict) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        date = formatdate(time.time(), usegmt=True)
        return httpx.Response(status, headers={"date": date, "location": "https://elsewhere/"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        found = await doctor._backend(client, "http://backend")
    assert found.verdict is verdict
    assert ("elsewhere" in found.detail) == (300 <= status < 400)


@pytest.mark.parametrize(
    ("how", "verdicts"),
    [
        ({}, "mind mind mind"),
        (KEYS, "ok ok ok"),
        ({"waha_api_key": "k" * 32, "host": "0.0.0.0"}, "mind WRONG mind"),
        ({"host": "0.0.0.0"}, "WRONG WRONG mind"),
    ],
)
def test_access(tmp_path: Path, how: dict[str, Any], verdicts: str) -> None:
    found = list(doctor._access(settings_of(tmp_path, **how)))[1:]
    assert " ".join(one.verdict.value.strip() for one in found) == verdicts


@pytest.mark.parametrize(("status", "found"), [(401, 0), (200, 2), (400, 1)])
async def test_a_router_that_is_older_than_its_keys(
    tmp_path: Path, status: int, found: int
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        settings = settings_of(tmp_path, **KEYS)
        reported = [one async for one in doctor._asked_for_keys(client, settings)]
    assert [one.verdict for one in reported] == [Verdict.WRONG] * found


def test_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)
    (found,) = doctor._folder(settings)
    assert (found.verdict, "not there yet" in found.detail) == (Verdict.MIND, True)
    settings.data_dir.mkdir(mode=0o700)
    file = settings.data_dir / "tenants.json"
    file.write_text('{"2": {"backend_url": "http://a", "signing_secret": "whsec_x"}}')
    file.chmod(0o666)
    reported = [str(one) for one in doctor._folder(settings) if one.what == "rights"]
    assert [("read the secrets" in one, "may change" in one) for one in reported] == [
        (True, False),
        (False, True),
    ]
    for kind, in_container, verdict in (
        ("nfs4", False, Verdict.WRONG),
        ("tmpfs", False, Verdict.WRONG),
        ("tmpfs", True, Verdict.WRONG),
        ("overlay", True, Verdict.WRONG),
        ("overlay", False, Verdict.OK),
        ("ext4", True, Verdict.OK),
    ):
        monkeypatch.setattr(doctor, "_file_system", lambda _, kind=kind: kind)
        monkeypatch.setattr(doctor, "_in_container", lambda is_in=in_container: is_in)
        disk = {one.what: one.verdict for one in doctor._folder(settings)}["disk"]
        assert disk is verdict, (kind, in_container)


@pytest.mark.parametrize(
    ("config", "sends", "verdicts"),
    [
        ({}, False, [Verdict.WRONG]),
        ({}, True, [Verdict.MIND]),  # a webhook for all sessions, as in docker-compose.yml
        ({"webhooks": [{"url": URL, "events": ["message"]}]}, True, [Verdict.WRONG] * 2),
        (repaired({}, Wanted(URL, ("message", "session.status"))), False, [Verdict.OK]),
    ],
)
def test_webhooks(tmp_path: Path, config: Any, sends: bool, verdicts: list[Verdict]) -> None:
    found = doctor._webhook({"config": config}, settings_of(tmp_path), URL, sends=sends)
    assert [one.verdict for one in found] == verdicts


def test_a_cure_is_in_the_line() -> None:
    reported = str(doctor.fail("disk", "full", "make room"))
    assert reported == "WRONG disk: full -> make room"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "does not let us in (403, no ADMIN_API_KEY is configured)"),
        ({"admin_api_key": "k" * 32}, "runs with another ADMIN_API_KEY"),
    ],
)
async def test_a_router_that_does_not_let_us_in(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            body = {"service": "whatsapp-gateway-router", "status": "healthy"}
            return httpx.Response(200, json=body | {"total_locked_users": 0})
        return httpx.Response(403, json={"detail": "no ADMIN_API_KEY is configured"})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        settings = settings_of(tmp_path, **keys)
        found = [one async for one in doctor._router(client, settings, doctor._RouterReport())]
    assert [one.verdict for one in found if one.what == "router"] == [Verdict.WRONG]
    assert said in str(found[-1])


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("STARTING", "mind"),
        ("STOPPED", "start it"),
        ("FAILED", "restart it"),
        ("SCAN_QR_CODE", "scan the QR code"),
        ("PASSKEY_REQUIRED", "passkey"),
        ("PASSKEY_CONFIRMATION_REQUIRED", "passkey"),
    ],
)
async def test_what_to_do_about_a_session_that_does_not_work(
    tmp_path: Path, waha: StandIn, status: str, says: str
) -> None:
    waha.statuses["default"] = status
    settings = settings_of(tmp_path, waha_api_url=waha.url)
    async with httpx.AsyncClient() as client:
        reported = doctor._RouterReport()
        found = [str(one) async for one in doctor._waha(client, settings, URL, reported)]
    (line,) = [one for one in found if "session default" in one]
    assert says in line


async def test_redis_clock_is_compared_with_ours(
    redis_socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    for ahead, verdict in ((0, Verdict.OK), (60, Verdict.WRONG), (-60, Verdict.WRONG)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        found = {one.what: one async for one in doctor._redis(f"unix:{redis_socket}")}
        assert found["Redis"].verdict is Verdict.OK
        assert found["clock, Redis'"].verdict is verdict
    monkeypatch.undo()
    (one,) = [one async for one in doctor._redis("redis://127.0.0.1:9/0")]
    assert (one.what, one.verdict) == ("Redis", Verdict.WRONG)


def test_what_others_may_read_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "router.db").write_bytes(b"")
    (folder / "router.db").chmod(0o644)
    settings = settings_of(tmp_path)
    reported = [str(one) for one in doctor._folder(settings) if one.what == "rights"]
    assert "data, router.db" in reported[0]
    folder.chmod(0o700)
    (folder / "router.db").chmod(0o600)
    assert [one for one in doctor._folder(settings) if one.what == "rights"] == []
