"""Imports point one way: each folder imports only from rows above its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    {"gateway", "errors"},
    {"domain"},
    {"settings", "log", "metrics"},
    {"tenants"},
    {"store"},
    {"waha"},
    {"delivery", "inbound"},
    {"operations"},
    {"lifecycle", "api"},
    {"page"},
    {"app"},
    {"cli"},
]
# Besides the whole of domain/.
PURE = [
    "delivery/attempts",
    "delivery/circuit_breaker",
    "waha/content",
    "waha/events",
    "waha/signature",
    "waha/webhook_config",
]
# What a module of values has no business with: network, disk, clock.
IMPURE = {"asyncio", "httpx", "aiohttp", "os", "pathlib", "socket", "sqlite3", "time", "logging"}


def folder_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else pieces[0]


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that path imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gateway":
            names |= {f"gateway.{alias.name}" for alias in node.names if alias.name.islower()}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names.add(node.module or "")
    return names


def modules() -> list[Path]:
    return sorted((ROOT / "gateway").rglob("*.py"))


def row_of(name: str) -> int:
    (row,) = [number for number, names in enumerate(ROWS) if name in names]
    return row


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_module_imports_only_from_rows_above(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    mine = folder_of(".".join(relative.parts).removesuffix(".__init__"))
    for name in imported(path):
        if name.split(".")[0] != "gateway" or folder_of(name) == mine:
            continue
        assert row_of(folder_of(name)) < row_of(mine), f"{relative} imports {name}"


def pure_modules() -> list[Path]:
    return [
        *sorted((ROOT / "gateway/domain").glob("*.py")),
        *(ROOT / f"gateway/{name}.py" for name in PURE),
    ]


@pytest.mark.parametrize("path", pure_modules(), ids=str)
def test_pure_modules_touch_neither_network_nor_disk_nor_clock(path: Path) -> None:
    roots = {one.split(".")[0] for one in imported(path)}
    assert not roots & IMPURE


def test_only_the_settings_and_the_entry_touch_the_environment() -> None:
    for path in modules():
        if path.name != "settings.py":
            assert "os.environ" not in path.read_text("utf-8"), path
