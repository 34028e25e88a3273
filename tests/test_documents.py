"""What the documents say of the tests is so."""

import ast
import re

import pytest

from tests.e2e.router import ROOT

TRAPS = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("## Eighteen traps")[1]
ROWS = re.findall(r"^\| (\d+)\. (.*?) \| (.*) \|$", TRAPS.split("\n## ")[0], re.MULTILINE)


def test_all_eighteen_are_there() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 19))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_trap_has_its_test_or_the_reason_why_it_cannot_bite(row: tuple[str, str, str]) -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[2])
    assert tests or row[2].startswith("cannot bite here: ")
    for path, name in tests:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        functions = {getattr(node, "name", None) for node in tree.body}
        assert name in functions, f"{path} has no {name}"
