"""What the README and .env.example claim is what the code does."""

import re
import subprocess
import time
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.settings import Settings
from tests.e2e.router import ROOT, running

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
    table = README.split("## Settings")[1].split("**Who is served.**")[0]
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`|empty) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [
        (name.upper(), default_of(name), field.description)
        for name, field in Settings.model_fields.items()
    ]


def test_the_example_environment_is_the_settings_class() -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    named = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", "\n".join(lines), re.MULTILINE))
    only_compose = {"WAHA_DASHBOARD_PASSWORD"}
    assert named.keys() - only_compose == {name.upper() for name in Settings.model_fields}
    for name in Settings.model_fields:
        assert named[name.upper()] == default_of(name), name


def walk_through() -> list[tuple[str, str]]:
    """The commands of the README's walk-through, each with the answer it shows."""
    part = README.split("<!-- walk-through")[1].split("<!-- end of the walk-through -->")[0]
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", part, re.DOTALL):
        for step in block.removeprefix("$ ").split("\n$ "):
            command, _, answer = step.partition("\n")
            steps.append((command, answer.strip()))
    return steps


def output_of(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


def test_the_walk_through_gives_the_answers_it_shows(tmp_path: Path) -> None:
    steps = walk_through()
    assert len(steps) == 9
    with running(tmp_path) as router:
        for command, answer in steps:
            here = command.replace("localhost:8001", f"localhost:{router.port}")
            # The file follows the answer within 50 ms, or as soon as a slow disk lets it.
            tries = 100 if command.startswith("cat ") else 1
            for _ in range(tries):
                if (printed := output_of(here, tmp_path)) == answer:
                    break
                time.sleep(0.05)
            assert printed == answer, command
        log = router.log.read_text("utf-8")
    assert "🔒 LOCKED: User 971501234567 → Tenant 2" in log
    assert "🔀 Routing 971501234567 → Tenant 2 (existing session)" in log


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    names = set(re.findall(r"`((?:tests|examples|store|api|waha|bench)/[a-z_/.]+)`", text))
    names |= {target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target}
    headings = {line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#")}
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
