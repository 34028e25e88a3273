"""A real process and a real backend: what survives a kill, how it ends, whom it serves."""

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import FakeBackend, wait_until
from tests.e2e.router import ROOT, Router, free_port, running
from tests.messages import ALI, SARA, webhook


@pytest.fixture
def router(tmp_path: Path, backend: FakeBackend) -> Iterator[Router]:
    """Started by the test."""
    made = Router(tmp_path, backend_api_url=backend.url)
    yield made
    made.stop()


async def post(router: Router, text: str, user: str = ALI, **headers: str) -> Any:
    """Posted in a thread: the backend lives in this one's event loop."""
    body = webhook(text, user, sent=time.time())
    return (await asyncio.to_thread(router.post, body, **headers)).json()


async def user_of(router: Router, user: str) -> Any:
    answer = await asyncio.to_thread(httpx.get, f"{router.url}/router/user/{user}")
    return answer.json()["locked_to_tenant"]


def texts(backend: FakeBackend, user: str = ALI) -> list[str]:
    return [json.loads(r.body)["payload"]["body"] for r in backend.received if r.user == user]


async def start(router: Router) -> None:
    await asyncio.to_thread(router.start)


async def test_killed_after_the_answer_it_delivers_and_the_lock_is_there(
    router: Router, backend: FakeBackend
) -> None:
    backend.may_answer.clear()  # the backend takes its time over every answer
    await start(router)
    assert (await post(router, "start_realty_2"))["action"] == "new_session_locked"
    assert (await post(router, "second"))["action"] == "existing_session"
    router.kill()
    before = len(backend.received)
    backend.may_answer.set()

    await start(router)
    await wait_until(lambda: "second" in texts(backend)[before:])
    assert texts(backend)[before:] == ["start_realty_2", "second"]
    assert await user_of(router, ALI) == 2
    keys = {one.key for one in backend.received if b"start_realty" in one.body}
    assert len(keys) == 1, "what was in flight at the kill comes again with its key"


async def arrived(backend: FakeBackend, user: str, wanted: list[str]) -> None:
    await wait_until(lambda: set(wanted) <= set(texts(backend, user)))


async def test_killed_again_and_again_nothing_acknowledged_is_lost(
    router: Router, backend: FakeBackend
) -> None:
    acked: dict[str, list[str]] = {ALI: [], SARA: []}
    for round_ in range(4):
        await start(router)
        for number in range(15):
            for user, link in ((ALI, 2), (SARA, 7)):
                text = f"start_realty_{link} {round_} {number}"
                await post(router, text, user)
                acked[user].append(text)
        router.kill()
    await start(router)
    for user, link in ((ALI, 2), (SARA, 7)):
        await arrived(backend, user, acked[user])
        first_arrivals = list(dict.fromkeys(texts(backend, user)))
        assert first_arrivals == acked[user]
        assert {one.tenant for one in backend.received if one.user == user} == {link}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_cleanly_after_what_is_in_flight(
    router: Router, backend: FakeBackend, number: int
) -> None:
    backend.may_answer.clear()
    await start(router)
    await post(router, "start_realty_2")
    await post(router, "second")
    await wait_until(lambda: len(backend.received) == 1)
    router.signal(number)
    await asyncio.sleep(0.3)  # it must still be there, waiting for the backend
    backend.may_answer.set()
    assert await asyncio.to_thread(router.wait) == 0
    log = router.log.read_text("utf-8")
    assert "✅ Forwarded to Tenant 2 backend" in log
    assert log.rstrip().endswith("Gateway stopped")
    assert "Traceback" not in log
    assert texts(backend) == ["start_realty_2"], "nothing new was begun"

    await start(router)
    await wait_until(lambda: texts(backend) == ["start_realty_2", "second"])


async def test_while_the_backend_is_away_messages_are_accepted_and_wait(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, backend_api_url=f"http://127.0.0.1:{port}") as router:
        for number in range(5):
            assert (await post(router, f"start_realty_2 {number}"))["status"] == "routed"
        log = router.log
        await wait_until(lambda: "The backend is away" in log.read_text("utf-8"))
        ready = (await asyncio.to_thread(httpx.get, f"{router.url}/ready")).json()
        assert ready["status"] == "degraded"
        assert ready["circuit_breakers"].startswith("degraded: open")
        assert (await asyncio.to_thread(httpx.get, f"{router.url}/health")).status_code == 200
        assert log.read_text("utf-8").count("The backend is away") == 1


def test_a_second_router_on_the_same_folder_refuses_to_start(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        second = Router(tmp_path)
        done = second.run()
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("data: another router uses this folder")
        assert httpx.get(f"{first.url}/health").status_code == 200


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        router = Router(tmp_path)
        router.env["PORT"] = str(taken.getsockname()[1])
        done = router.run()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"PORT={router.env['PORT']}: cannot be had on 127.0.0.1")
    assert line.endswith("or set PORT")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"port": "abc"}, "PORT='abc': "),
        ({"max_in_flight": "0"}, "MAX_IN_FLIGHT='0': "),
        ({"store_url": "mysql://x"}, "STORE_URL=mysql:…: "),
    ],
)
def test_a_wrong_setting_ends_the_start_with_one_line(
    tmp_path: Path, setting: dict[str, str], line: str
) -> None:
    router = Router(tmp_path)
    router.env |= {name.upper(): value for name, value in setting.items()}
    done = router.run()
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "router.db").exists()


def test_a_damaged_file_ends_the_start_with_one_line_and_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "router_mappings.json").write_text('{"971501234567": 2')
    done = Router(tmp_path).run()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("data/router_mappings.json: not JSON, or cut off")
    assert (tmp_path / "data" / "router_mappings.json").read_text() == '{"971501234567": 2'


def test_a_database_damaged_while_it_runs_ends_the_router_with_a_clear_line(tmp_path: Path) -> None:
    database = tmp_path / "data" / "router.db"
    with running(tmp_path, backend_api_url=f"http://127.0.0.1:{free_port()}") as router:
        for number in range(25):  # more than SQLite keeps in memory
            text = f"start_realty_2 {'x' * 200_000}"
            assert router.post(webhook(text, f"9715012345{number:02}")).status_code == 200
        with database.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (database.stat().st_size - 4096))
        answer = httpx.get(f"{router.url}/router/dead-letters")
        assert answer.status_code == 503
        assert "malformed" in answer.json()["detail"]
        assert router.wait() == 1
        assert "What is kept cannot be trusted any longer" in router.log.read_text("utf-8")
        assert (tmp_path / "data" / "router.suspect").exists()
        done = router.run()
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "router.db: SQLite" in line
        assert "put the back-up in its place" in line


@pytest.mark.parametrize("paused", [True, False])
def test_a_database_removed_while_it_runs_ends_the_router_and_loses_nothing(
    tmp_path: Path, paused: bool
) -> None:
    """Paused, too: the first answer after that must not be a promise."""
    down = f"http://127.0.0.1:{free_port()}"
    with running(tmp_path, backend_api_url=down) as router:
        for number in range(1, 21):
            assert router.post(webhook("start_realty_2", f"97150123{number:04}")).status_code == 200
        if paused:
            router.signal(signal.SIGSTOP)
        (tmp_path / "data" / "router.db").unlink()
        if paused:
            router.signal(signal.SIGCONT)
        statuses = []
        with contextlib.suppress(httpx.TransportError):  # it has ended
            for number in range(100):
                statuses.append(router.post(webhook("hello", f"97150124{number:04}")).status_code)
        assert 200 not in statuses
        assert router.wait() == 1
        log = router.log.read_text("utf-8")
        assert "router.db was removed while the router ran" in log
        assert "router.db is put back" in log
        router.start()
        waiting = httpx.get(f"{router.url}/router/pending").json()
        assert waiting["waiting"] == 20


def test_a_removed_folder_ends_the_router_at_once_though_deliveries_fail(tmp_path: Path) -> None:
    """What is in flight could not be settled any more, and is not waited for."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # answers nothing
        running(tmp_path, backend_api_url=f"http://127.0.0.1:{silent.getsockname()[1]}") as router,
    ):
        for number in range(1, 21):
            router.post(webhook("start_realty_2", f"97150123{number:04}"))
        (tmp_path / "data").rename(tmp_path / "gone")  # at once: it goes on writing
        shutil.rmtree(tmp_path / "gone")
        began = time.monotonic()
        assert router.wait() == 1
        assert time.monotonic() - began < 10
        router.start()
        assert httpx.get(f"{router.url}/router/pending").json()["waiting"] == 20


def test_a_second_router_is_refused_though_the_lock_file_is_removed(tmp_path: Path) -> None:
    with running(tmp_path) as router:
        (tmp_path / "data" / "router.lock").unlink()
        second = Router(tmp_path)
        second.env["DATA_DIR"] = router.env.get("DATA_DIR", "data")
        done = second.run()
        assert done.returncode == 1
        assert "another router uses this folder" in done.stderr


def test_say_composes_signs_and_posts(tmp_path: Path) -> None:
    with running(tmp_path, webhook_hmac_key="new-key,old-key", host="0.0.0.0") as router:
        assert "is no user" in router.run("say", "abc", "hello").stderr
        said = router.run("say", "+971 50 123 4567", "start_realty_2")
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["action"] == "new_session_locked"
        said = router.run("say", "158764321000005@lid", "hello", "there", "--session", "sales")
        assert json.loads(said.stdout)["user"] == "158764321000005@lid"
        assert router.post(webhook("hello")).status_code == 401


def test_say_uses_wahas_key_and_says_when_nobody_listens(tmp_path: Path) -> None:
    router = Router(tmp_path, waha_api_key="wahas-key", host="0.0.0.0")
    said = router.run("say", "971501234567", "start_realty_2")
    assert said.returncode == 1
    assert "is the router running?" in said.stderr
    router.start()
    try:
        assert router.run("say", "971501234567", "start_realty_2").returncode == 0
        assert router.post(webhook("hello"), x_api_key="wrong").status_code == 401
    finally:
        router.stop()


def test_rebuild_at_the_shell(tmp_path: Path) -> None:
    with running(tmp_path) as router:
        router.post(webhook("start_realty_2"))
        assert "another router uses this folder" in router.run("rebuild").stderr
    (tmp_path / "data" / "router_mappings.json").unlink()
    assert "rebuild" in router.run().stderr
    rebuilt = router.run("rebuild")
    assert rebuilt.stdout == "data/router_mappings.json: 1 locks written from the history\n"
    assert json.loads((tmp_path / "data" / "router_mappings.json").read_text()) == {ALI: 2}


def raw(router: Router, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", router.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
            if b"\r\n\r\n" in answer:
                break
        return answer


def test_on_the_wire_only_this_machine_is_served_without_keys(tmp_path: Path) -> None:
    with running(tmp_path) as router:
        head = "GET /ready HTTP/{}\r\nHost: {}\r\n{}\r\n"
        for version, host, more, status in [
            ("1.1", "localhost", "", b"200"),
            ("1.0", "localhost", "", b"403"),
            ("1.1", "evil.example", "", b"403"),
            ("1.1", "localhost", "Origin: http://evil.example\r\n", b"403"),
            ("1.1", "localhost", "X-Forwarded-For: 127.0.0.1\r\n", b"403"),
        ]:
            request = head.format(version, host, more).encode()
            assert raw(router, request).split()[1] == status, request


def test_a_body_over_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    with running(tmp_path, max_body_bytes="2000") as router:
        head = (
            b"POST /webhook/waha HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n{"
        )
        answer = raw(router, head)
        assert answer.split()[1] == b"413"
        assert b"connection: close" in answer.lower()


def test_the_app_is_served_by_uvicorns_own_command_too(tmp_path: Path) -> None:
    router = Router(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "whatsapp_router:app", "--port", str(router.port)],
        cwd=tmp_path,
        env=router.env | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(400):
            try:
                assert httpx.get(f"{router.url}/health").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.025)
        assert router.post(webhook("start_realty_2")).json()["status"] == "routed"
    finally:
        process.terminate()
        process.wait(30)


async def test_a_request_can_be_followed_through_the_log_to_the_backend(
    tmp_path: Path, backend: FakeBackend
) -> None:
    how = {"log_format": "json", "backend_api_url": backend.url}
    with running(tmp_path, **how) as router:
        body = webhook("start_realty_2", sent=time.time())
        answer = await asyncio.to_thread(router.post, body, X_Webhook_Request_Id="3b2ozlbl")
        assert answer.status_code == 200
        await wait_until(lambda: backend.received)
        await wait_until(lambda: "delivery.done" in router.log.read_text("utf-8"))
    assert backend.received[0].headers["X-Webhook-Request-Id"] == "3b2ozlbl"
    lines = [json.loads(line) for line in router.log.read_text("utf-8").splitlines()]
    of_it = [line["event"] for line in lines if line.get("request_id") == "3b2ozlbl"]
    assert sorted(of_it) == ["delivery.done", "lock.changed"]
