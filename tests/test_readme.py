"""What the README and .env.example claim is what the code does."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dotenv import dotenv_values
from pydantic import SecretStr

from gateway.metrics import Metrics
from gateway.settings import HELP_MESSAGE, Settings
from tests.e2e.redis import RedisServer
from tests.e2e.router import ROOT, Router, environment, free_port, running

README = (ROOT / "README.md").read_text("utf-8")


def default_of(name: str) -> str:
    value = Settings.model_fields[name].default
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))


def test_the_settings_table_is_the_settings_class() -> None:
    table = README.split("## Settings")[1].split("Who may call, and with which key")[0]
    rows = r"^\| `([A-Z_]+)` \| (?:`([^`]*)`|empty|\[.*\]\(#help\)) \| (.*) \|$"
    shown_elsewhere = {"help_message"}
    assert re.findall(rows, table, re.MULTILINE) == [
        (name.upper(), "" if name in shown_elsewhere else default_of(name), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert f"```\n{HELP_MESSAGE}\n```" in README


def test_the_example_environment_is_the_settings_class() -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    text = "\n".join(re.sub("^#(?=[A-Z])", "", line) for line in lines)
    named = dotenv_values(stream=io.StringIO(text), interpolate=False)
    only_compose = {"WAHA_DASHBOARD_PASSWORD"}
    assert named.keys() - only_compose == {name.upper() for name in Settings.model_fields}
    for name in Settings.model_fields:
        assert named[name.upper()] == default_of(name), name


def walk_through(begin: str) -> list[tuple[str, str]]:
    """The commands of a walk-through of the README, each with the answer it shows."""
    part = README.split(f"<!-- {begin}: run by")[1].split("<!-- end of the walk-through -->")[0]
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
    assert len(steps) == 3
    port = free_port()
    steps = [(command, shown.replace(":3000", f":{port}")) for command, shown in steps]
    waha = subprocess.Popen(
        [sys.executable, "examples/waha.py", "--port", str(port)], cwd=ROOT, env=environment()
    )
    try:
        url = f"http://localhost:{port}/api"
        with running(tmp_path, waha_api_url=url) as router:
            follow(steps, router)
    finally:
        waha.terminate()
        waha.wait(10)


def test_the_walk_through_of_several_routers_gives_the_answers_it_shows(tmp_path: Path) -> None:
    move, both = walk_through("walk-through of a move"), walk_through("walk-through of two routers")
    assert (len(move), len(both)) == (1, 3)
    server = RedisServer(tmp_path / "redis").start()
    with running(tmp_path, backend_api_url="http://127.0.0.1:9") as router:
        assert router.run("say", "971501234567", "start_realty_2").returncode == 0
        assert router.run("say", "971501234567", "Is the flat free?").returncode == 0
    url = "redis://localhost:6390/0"
    follow([(command.replace(url, server.url), told) for command, told in move], router)
    (tmp_path / "second").mkdir()
    with (
        running(tmp_path, store_url=server.url) as one,
        running(tmp_path / "second", store_url=server.url) as two,
    ):
        follow([(command.replace("8002", str(two.port)), told) for command, told in both], one)
    server.stop()


def test_the_walk_through_with_a_waha_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through("walk-through with a WAHA")
    assert len(steps) == 13
    (stand_in,) = re.findall(r"^\.venv/bin/python (examples/waha\.py .*)$", README, re.MULTILINE)
    port, told = free_port(), tmp_path / "waha.log"
    with told.open("wb") as log:
        waha = subprocess.Popen(
            [sys.executable, *stand_in.split(), "--port", str(port)],
            cwd=ROOT,
            stdout=log,
            env=environment(),
        )
    try:
        wait_for(told, "a stand-in for WAHA")
        url = f"http://127.0.0.1:{port}/api"
        with running(tmp_path, forward_events="*", waha_api_url=url) as router:
            follow(steps, router)
            wait_for(told, f"to 971501234570@c.us by session default:\n{HELP_MESSAGE}\n")
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


def test_the_metrics_table_is_the_registry() -> None:
    table = README.split("### Metrics")[1].split("```")[0]
    first = "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    shown = re.findall(r"`([a-z_]+)(?:\{([a-z,]+)\})?`", first)
    assert sorted(shown) == sorted(Metrics().series())


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_nothing_is_left_to_be_filled_in(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    assert not re.search(r"\b(?:TODO|TBD|FIXME|XXX|[A-Z]+_(?:TIMES|RESULT))\b", text)


def test_the_table_of_log_events_is_what_the_code_says() -> None:
    table = README.split("### Logs")[1].split("### Explain")[0].partition("|---|")[2]
    source = "".join(path.read_text("utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    said = set(re.findall(r'"event": "([a-z_]+(?:\.[a-z_]+)*)"', source)) - {"message"}
    shown = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)?)`", table))
    composed = set(re.findall(r'"event": f"([a-z_]+\.)\{', source))  # with an outcome behind it
    assert composed <= {"lid.", "help.", "refused."}
    by_outcome = {name for name in shown - said if name.startswith(tuple(composed))}
    assert shown - by_outcome == said
    outcomes = Metrics().text().decode()
    for name in by_outcome - {"refused.connection"}:
        kind, _, outcome = name.partition(".")
        series = {"lid": "gateway_lid_lookups_total", "help": "gateway_help_messages_total"}
        assert kind == "refused" or f'{series[kind]}{{outcome="{outcome}"}}' in outcomes, name


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    names = set(re.findall(r"`((?:tests|examples|store|api|waha|bench)/[a-z_/.]+)`", text))
    names |= {target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target}
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for name in names:
        if name.startswith("#"):
            assert name[1:] in headings, name
            continue
        places = [ROOT / name, ROOT / "gateway" / name]
        assert any(place.exists() for place in places), name


def test_the_check_that_a_backend_copies_is_the_examples() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown.startswith("def check_signature")
    assert shown in (ROOT / "examples" / "backend.py").read_text("utf-8")


def test_the_rooms_of_the_architecture_are_the_rooms_there_are() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    rooms = text.split("## The rooms")[1].split("Imports point one way")[0]
    for path in (ROOT / "gateway").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in rooms, f"{path.name} is not in ARCHITECTURE.md"
