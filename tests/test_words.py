"""The words of the code: names that only this project once used do not come back (ARCHITECTURE,
"Words", gives what is used instead)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.metrics import Metrics

ROOT = Path(__file__).parent.parent
FOLDERS = ("gateway", "tests", "bench", "examples")

# As a word of a name, whatever is beside it.
RETIRED = {
    "among",
    "bury",
    "buried",
    "courier",
    "distrust",
    "distrusted",
    "door",
    "doors",
    "fly",
    "flying",
    "gate",
    "gates",
    "kept",
    "landed",
    "landing",
    "learn",
    "learnt",
    "leave",
    "melt",
    "melted",
    "mend",
    "mended",
    "outline",
    "parts",
    "patience",
    "pulse",
    "rehearsal",
    "rehearse",
    "shapes",
    "shares",
    "sight",
    "sighted",
    "sighting",
    "stumbles",
    "tell",
    "tells",
    "told",
    "visit",
    "visits",
    "watch",
}
# A letter is a dead letter, or one of the alphabet; a line is one of a file or of the log.
LETTER = re.compile(r"(?<!dead_)(?<!dead)letters?(?![a-z])|(?<!Dead)Letters?(?![a-z])")


def words_of(name: str) -> set[str]:
    return {one.lower() for one in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that the file gives: modules, classes, functions, arguments, variables."""
    yield 0, path.stem
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_bears_a_retired_word(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, name in names_of(path)
        if words_of(name) & RETIRED
    ]
    assert found == []


IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """Every name in a script or a schema; comments are prose."""
    yield 0, path.stem
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        for name in IDENTIFIER.findall(line.split("--")[0]):
            yield number, name


SCRIPTS = sorted((ROOT / "gateway").rglob("*.lua")) + sorted((ROOT / "gateway").rglob("schema.sql"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_name_of_a_script_or_a_table_bears_a_retired_word(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {name}"
        for number, name in identifiers(path)
        if words_of(name) & (RETIRED | {"line", "lines"}) or LETTER.search(name)
    ]
    assert found == []


def test_no_metric_and_no_event_bears_a_retired_word() -> None:
    metrics = {name for name, _ in Metrics().series()}
    source = "".join(path.read_text("utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    events = set(re.findall(r'(?:"event": |\bevent=)f?"([a-z_.]+)', source))
    assert len(metrics) > 30
    assert len(events) > 40
    assert [name for name in sorted(metrics | events) if words_of(name) & RETIRED] == []


# Prose: phrases of which each is better said plainly (ARCHITECTURE, "Words").
PROSE = re.compile(
    r"\b(?:whoever|whatever it be|courier|stumbled|stands (?:in|for|behind|beside))\b", re.I
)
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "path",
    [*PAGES, *sorted((ROOT / "gateway").rglob("*.py")), *SCRIPTS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_prose_is_plain(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if PROSE.search(line)
    ]
    assert found == []
