"""What is public changes only with a word in the changelog."""

import re
from pathlib import Path

import pytest

from tests.public import LIST, public_names

ROOT = Path(__file__).parent.parent


def is_named_in(name: str, unreleased: str) -> bool:
    """Whether the changelog's part about what is not released yet has name in backticks: an option
    by itself, a path without its method, a metric without its labels."""
    word = name.split()[-1]
    if name.startswith("metric "):
        word = word.partition("{")[0]
    shown = re.findall(r"`([^`]+)`", unreleased)
    return any(re.search(rf"(?:^|\s){re.escape(word)}(?:$|[\s{{=])", one) for one in shown)


def unreleased_of(changelog: str) -> str:
    return changelog.partition("## [Unreleased]")[2].partition("\n## [")[0]


def test_what_is_public_changes_only_with_a_word_in_the_changelog() -> None:
    """If this fails and the change is meant: say it in CHANGELOG.md under Unreleased, in backticks.
    At a release run python -m tests.public."""
    promised = set(LIST.read_text("utf-8").splitlines())
    unreleased = unreleased_of((ROOT / "CHANGELOG.md").read_text("utf-8"))
    changed = promised ^ set(public_names())
    assert [name for name in sorted(changed) if not is_named_in(name, unreleased)] == []


def test_every_kind_is_listed() -> None:
    kinds = {name.partition(" ")[0] for name in public_names()}
    assert kinds == {"setting", "metric", "command", "log", "backend", "route"}


@pytest.mark.parametrize(
    ("name", "text", "is_named"),
    [
        ("setting NEW_ONE", "- `NEW_ONE` does something", True),
        ("metric gateway_new_total{kind}", "- `gateway_new_total{kind}`", True),
        ("setting NEW_ONE", "- something else", False),
        ("setting NEW_ONE", "- `NEW_ONE_MORE`, NEW_ONE", False),
        ("setting NEW_ONE", "- `NEW_ONE=5`", True),
        ("log event lock.changed", "- the log says `lock.changed`", True),
        ("log event lock.changed", "- `event`", False),
        ("backend header X-Lock-Age", "- `X-Lock-Age`", True),
        ("backend header X-Lock-Age", "- a `header`", False),
        (
            "route GET /router/tenants/{number}/users",
            "- `GET /router/tenants/{number}/users`",
            True,
        ),
        ("route GET /router/tenants/{number}/users", "- `GET /router/tenants`", False),
        ("command backup --keep", "- `backup DIR --keep 3`", True),
        ("command backup --keep", "- `backup`", False),
        ("setting NEW_ONE", "\n## [1.0.0]\n- `NEW_ONE`", False),
    ],
)
def test_a_change_counts_only_where_it_is_named(name: str, text: str, is_named: bool) -> None:
    assert is_named_in(name, unreleased_of(f"## [Unreleased]\n{text}")) is is_named
