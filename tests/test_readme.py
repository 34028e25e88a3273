"""Whoever follows the README and the documents sees what they show: each command is run."""

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from gateway.settings import HELP_MESSAGE
from tests.e2e.redis import RedisServer
from tests.e2e.router import ROOT, Router, environment, free_port, running

DOCUMENTS = "".join(
    path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)


def walk_through(begin: str) -> list[tuple[str, str]]:
    """The commands of a walk-through of the documents, each with the answer it shows."""
    part = DOCUMENTS.split(f"<!-- {begin}: run by")[1].split("<!-- end of the walk-through -->")[0]
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", part, re.DOTALL):
        for step in block.removeprefix("$ ").split("\n$ "):
            command, _, answer = step.partition("\n")
            steps.append((command, answer.strip()))
    return steps


def follow(steps: list[tuple[str, str]], router: Router) -> None:
    python = f"{sys.executable} {ROOT / 'whatsapp_router.py'}"
    for command, shown in steps:
        here = command.replace("localhost:8001", f"localhost:{router.port}")
        here = here.replace(".venv/bin/python whatsapp_router.py", python)
        answer = shown.replace("127.0.0.1:8001", f"127.0.0.1:{router.port}")
        # The file follows the answer within 50 ms, or as soon as a slow disk lets it.
        tries = 100 if command.startswith(("cat ", "sleep ")) else 1
        for _ in range(tries):
            if (printed := output_of(here, router)) == answer:
                break
            time.sleep(0.05)
        assert printed == answer, command


def output_of(command: str, router: Router) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=router.folder,
        env=router.env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def test_the_walk_through_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through")
    assert len(steps) == 9
    with running(tmp_path) as router:
        follow(steps, router)
        log = router.log.read_text("utf-8")
    assert "🔒 LOCKED: User 971501234567 → Tenant 2" in log
    assert "🔀 Routing 971501234567 → Tenant 2 (existing session)" in log


def test_the_walk_through_of_offices_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through of offices")
    assert len(steps) == 17
    with running(tmp_path) as router:
        follow(steps, router)
    assert (tmp_path / "card.svg").read_text("utf-8").startswith("<?xml")


def test_the_walk_through_of_commands_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through of commands")
    assert len(steps) == 4
    with stand_ins(tmp_path) as (waha, backend):
        how = {"waha_api_url": f"http://localhost:{waha}/api"}
        with running(tmp_path, backend_api_url=f"http://localhost:{backend}", **how) as router:
            steps = [(command, shown.replace(":3000", f":{waha}")) for command, shown in steps]
            follow(steps, router)
            card = httpx.get(f"{router.url}/router/page/card?tenant=2")
            assert "<svg" in card.text


def test_the_checklist_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through of the checklist")
    assert len(steps) == 12
    secret = "whsec_" + base64.b64encode(b"s" * 32).decode()
    keys = {
        "admin_api_key": "a" * 32,
        "webhook_hmac_key": "h" * 32,
        "backend_signing_secret": secret,
    }
    with stand_ins(tmp_path, backend_signing_secret=secret) as (waha, backend):
        how = {"waha_api_url": f"http://localhost:{waha}/api", **keys}
        with running(tmp_path, backend_api_url=f"http://localhost:{backend}", **how) as router:
            follow(steps, router)
    assert "🔀 Routed message for Tenant 2" in (tmp_path / "backend.log").read_text("utf-8")


def test_the_examples_start_as_described() -> None:
    """The ports are the tests' own."""
    for command in ("-m uvicorn examples.backend:app --port 8000", "examples/waha.py"):
        assert f"\n.venv/bin/python {command}\n" in DOCUMENTS


def test_make_run_serves(tmp_path: Path) -> None:
    port = free_port()
    env = environment(port=str(port), data_dir=str(tmp_path / "data"))
    make = subprocess.Popen(["make", "run"], cwd=ROOT, env=env, start_new_session=True)
    try:
        for _ in range(1200):  # it may have to install first
            with contextlib.suppress(httpx.TransportError):
                assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
                break
            assert make.poll() is None
            time.sleep(0.05)
        else:
            raise AssertionError("make run does not serve")
    finally:
        os.killpg(make.pid, signal.SIGTERM)
        make.wait(40)


def test_make_demo_shows_what_the_backend_got() -> None:
    done = subprocess.run(
        ["make", "demo"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tenant 2" in done.stdout


@contextlib.contextmanager
def stand_ins(folder: Path, **settings: str) -> Iterator[tuple[int, int]]:
    """Ports of a stand-in for WAHA and of the example backend, as the README starts them."""
    waha, backend = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        for name, port, command in (
            ("waha", waha, ["examples/waha.py"]),
            ("backend", backend, ["-m", "uvicorn", "examples.backend:app"]),
        ):
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, *command, "--port", str(port)],
                cwd=ROOT,
                env=environment(**settings),
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
        for port in (waha, backend):
            for _ in range(400):
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"http://localhost:{port}/ping")
                    break
                time.sleep(0.025)
        yield waha, backend


def test_the_walk_through_of_several_routers_gives_the_answers_it_shows(tmp_path: Path) -> None:
    migration, both = (
        walk_through("walk-through of a migration"),
        walk_through("walk-through of two routers"),
    )
    assert (len(migration), len(both)) == (1, 3)
    server = RedisServer(tmp_path / "redis").start()
    with running(tmp_path, backend_api_url="http://127.0.0.1:9") as router:
        assert router.run("say", "971501234567", "start_realty_2").returncode == 0
        assert router.run("say", "971501234567", "Is the flat free?").returncode == 0
    url = "redis://localhost:6390/0"
    follow(
        [(command.replace(url, server.url), reported) for command, reported in migration], router
    )
    (tmp_path / "second").mkdir()
    with (
        running(tmp_path, store_url=server.url) as one,
        running(tmp_path / "second", store_url=server.url) as two,
    ):
        follow(
            [(command.replace("8002", str(two.port)), reported) for command, reported in both], one
        )
    server.stop()


def test_the_walk_through_with_a_waha_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through with a WAHA")
    assert len(steps) == 13
    (stand_in,) = re.findall(r"^\.venv/bin/python (examples/waha\.py .+)$", DOCUMENTS, re.MULTILINE)
    port, reported = free_port(), tmp_path / "waha.log"
    with reported.open("wb") as log:
        waha = subprocess.Popen(
            [sys.executable, *stand_in.split(), "--port", str(port)],
            cwd=ROOT,
            stdout=log,
            env=environment(),
        )
    try:
        wait_for(reported, "a stand-in for WAHA")
        url = f"http://127.0.0.1:{port}/api"
        with running(tmp_path, forward_events="*", waha_api_url=url) as router:
            follow(steps, router)
            wait_for(reported, f"to 971501234570@c.us by session default:\n{HELP_MESSAGE}\n")
            log_text = router.log.read_text("utf-8")
    finally:
        waha.terminate()
        waha.wait(10)
    assert "Not forwarded, whatever FORWARD_EVENTS says" in log_text
    assert "📱 WAHA session sales is SCAN_QR_CODE" in log_text


def wait_for(file: Path, text: str) -> None:
    for _ in range(1000):
        if text in file.read_text("utf-8"):
            return
        time.sleep(0.02)
    raise AssertionError(file.read_text("utf-8"))
