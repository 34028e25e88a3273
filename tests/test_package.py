"""The package: built, installed where nothing else is, and used as its README says."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from gateway import VERSION
from tests.e2e.router import Router, environment
from tests.messages import webhook

ROOT = Path(__file__).parent.parent


def build(into: Path, source: Path = ROOT) -> dict[str, Path]:
    """Build wheel and sdist of source; return each by its suffix."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), str(source)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return {path.suffix: path for path in into.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("dist"))


def test_all_that_is_no_python_is_in_the_wheel(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        packed = set(wheel.namelist())
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gateway").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(one).suffix for one in source} >= {".css", ".html", ".json", ".lua", ".sql"}
    assert source <= packed
    top = {one.split("/")[0] for one in packed}
    assert top == {"gateway", "whatsapp_router.py", f"whatsapp_router-{VERSION}.dist-info"}
    assert f"whatsapp_router-{VERSION}.dist-info/licenses/LICENSE" in packed


def test_the_same_source_is_the_same_file(built: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "mutants", ".*_cache", ".hypothesis", "node_modules"
    )
    shutil.copytree(ROOT, copy, ignore=skipped)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    again = build(tmp_path / "dist", copy)
    for suffix in (".whl", ".gz"):
        sums = [hashlib.sha256(one[suffix].read_bytes()).hexdigest() for one in (built, again)]
        assert sums[0] == sums[1], suffix


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with the wheel and what it needs alone."""
    folder = tmp_path_factory.mktemp("installed")
    uv = [sys.executable, "-m", "uv"]
    for command in (
        [*uv, "venv", "--python", sys.executable, str(folder)],
        [*uv, "pip", "install", "--python", str(folder), str(built[".whl"])],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder / "bin"


def test_an_installed_router_routes_a_message(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "whatsapp-router")]
    router = Router(tmp_path, command).start()
    try:
        answer = router.post(webhook("start_realty_2"))
        assert answer.json()["status"] == "routed"
        page = httpx.get(f"{router.url}/router/")
        assert page.status_code == 200
        assert "<html" in page.text
        said = router.run("say", "971501234567", "Hello")
        assert '"tenant_id":2' in said.stdout
    finally:
        router.stop()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["say", "--help"]])
def test_help_needs_no_settings(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    shown = subprocess.run(
        [str(installed / "whatsapp-router"), *arguments],
        cwd=tmp_path,
        env=environment() | {"PORT": "none"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0
    assert shown.stdout.startswith(("usage: whatsapp-router", f"whatsapp-router {VERSION}"))
