"""The words of the code: names that only this project once used do not come back (ARCHITECTURE,
"Words", gives what is used instead)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("gateway", "tests", "bench", "examples")

# As a word of a name, whatever stands beside it.
RETIRED = {
    "among",
    "bury",
    "buried",
    "courier",
    "distrust",
    "distrusted",
    "fly",
    "flying",
    "gate",
    "gates",
    "kept",
    "landed",
    "landing",
    "melt",
    "melted",
    "mend",
    "mended",
    "outline",
    "patience",
    "pulse",
    "rehearsal",
    "rehearse",
    "shapes",
    "sight",
    "sighted",
    "sighting",
    "stumbles",
    "tell",
    "tells",
    "told",
    "visit",
    "visits",
}
# A letter is a dead letter, or one of the alphabet.
LETTER = re.compile(r"(?<!dead_)(?<!dead)\bletters?\b|(?<!Dead)Letters?\b")


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
