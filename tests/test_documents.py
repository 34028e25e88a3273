"""What the documents name is there: links, settings, endpoints, metrics, commands, tests (make
docs-check). That their commands do what they show is for test_readme.py."""

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values
from pydantic import SecretStr
from starlette.routing import Route

from gateway import cli
from gateway.metrics import Metrics
from gateway.settings import HELP_MESSAGE, Settings
from tests import test_layers
from tests.clients import client_of
from tests.e2e.router import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "bench/README.md")
]
PAGES += DOCS
FOR_USERS = [ROOT / "README.md", *DOCS]
TEXTS = {path: path.read_text("utf-8") for path in PAGES}
REFERENCE = TEXTS[ROOT / "docs" / "reference.md"]
TRAPS = TEXTS[ROOT / "ARCHITECTURE.md"].split("## Eighteen traps")[1]
ROWS = re.findall(r"^\| (\d+)\. (.*?) \| (.*) \|$", TRAPS.split("\n## ")[0], re.MULTILINE)
# Settings that are not the router's.
OTHERS = {
    "NOTHING_SKIPPED", "REDIS_URL", "NODE_FUNCTION_ALLOW_BUILTIN", "WAHA_BASE_URL",
    "WAHA_DASHBOARD_PASSWORD", "WAHA_HOOK_HMAC_KEY", "WHATSAPP_FILES_LIFETIME", "WHATSAPP_HOOK_URL",
    "WHATSAPP_START_SESSION",
    "SCAN_QR_CODE", "LOCK_CHANGED",
}  # fmt: skip

# Commands whose answer is not shown, and what runs them.
_SIGNED = "BACKEND_SIGNING_SECRET=whsec_…"
_EXPRESS = "test_express_takes_what_is_signed_once_and_nothing_else"
RUN_OTHERWISE = {
    "make run": "test_make_run_serves",
    "make demo": "test_make_demo_shows_what_the_backend_got",
    ".venv/bin/python -m uvicorn examples.backend:app --port 8000": "stand_ins",
    f"{_SIGNED} .venv/bin/python -m uvicorn examples.backend:app --port 8000": "router_with",
    ".venv/bin/python examples/waha.py": "stand_ins",
    ".venv/bin/python examples/waha.py --lid 158764321000007=971501234507": "walk_through",
    f"cd examples/express && npm install && {_SIGNED} npm start": _EXPRESS,
}

pages = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    rank = heading.partition(" ")[0]
    return text.split(f"\n{heading}\n")[1].split(f"\n{rank} ")[0]


def table(text: str) -> list[str]:
    """The first column of its tables."""
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [row for row in rows if row.startswith("`")]


def default_of(name: str) -> str:
    value = Settings.model_fields[name].default
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))


# links


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_that_commands_are_run_by_the_tests_is_said_once() -> None:
    text = re.sub(r"<!--.*?-->", "", TEXTS[ROOT / "README.md"], flags=re.DOTALL)
    assert len(re.findall(r"run by the\s+tests", text)) == 1


@pages
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


@pages
def test_files_that_a_document_names_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:tests|examples|store|api|waha|bench|deploy|page)/[a-z_/.]+)`", TEXTS[path]
    ):
        written_by_the_operator = name == "deploy/admin_api_key"
        places = (ROOT, ROOT / "gateway")
        assert written_by_the_operator or any((one / name).exists() for one in places), name


def test_every_picture_is_shown_somewhere() -> None:
    shown = "".join(TEXTS.values())
    for picture in (ROOT / "docs" / "screens").glob("*.png"):
        assert f"screens/{picture.name}" in shown, picture.name


# settings


def test_the_settings_table_is_the_settings_class() -> None:
    rows = r"^\| `([A-Z_]+)` \| (?:`([^`]*)`|empty|\[.*\]\(waha.md#help\)) \| (.*) \|$"
    shown_elsewhere = {"help_message"}
    assert re.findall(rows, section(REFERENCE, "## Settings"), re.MULTILINE) == [
        (name.upper(), "" if name in shown_elsewhere else default_of(name), field.description)
        for name, field in Settings.model_fields.items()
    ]
    assert f"```text\n{HELP_MESSAGE}\n```" in TEXTS[ROOT / "docs" / "waha.md"]


def test_the_example_environment_is_the_settings_class() -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    text = "\n".join(re.sub("^#(?=[A-Z])", "", line) for line in lines)
    named = dotenv_values(stream=io.StringIO(text), interpolate=False)
    only_compose = {"WAHA_DASHBOARD_PASSWORD"}
    assert named.keys() - only_compose == {name.upper() for name in Settings.model_fields}
    for name in Settings.model_fields:
        assert named[name.upper()] == default_of(name), name


@pages
def test_no_setting_is_named_that_there_is_not(path: Path) -> None:
    known = {name.upper() for name in Settings.model_fields} | OTHERS
    assert set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=[^`]*)?`", TEXTS[path])) <= known


# endpoints


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, re.Pattern[str]]]:
    """Method and form of the path of everything that is served."""
    with client_of(tmp_path_factory.mktemp("app")) as client:
        served = [one for one in client.app.routes if isinstance(one, Route)]  # type: ignore[attr-defined]
        served += [
            route
            for one in client.app.routes  # type: ignore[attr-defined]
            for route in getattr(getattr(one, "original_router", None), "routes", [])
        ]
        return [(method, one.path_regex) for one in served for method in one.methods or ()]


def asked_in(text: str) -> Iterator[tuple[str, str]]:
    """Every `GET /x` and `/router/x` of a text, and what its commands call."""
    text = text.replace("…", "1")  # a number or a phone that follows
    methods = r"((?:GET|POST|DELETE)(?:`?, `?(?:GET|POST|DELETE))*)"
    for found, path in re.findall(rf"{methods} (/[\w/{{}}.-]*)", text):
        for method in re.findall("[A-Z]+", found):
            yield method, path
    for path in re.findall(
        r"(?:localhost:800[12]|`)(/(?:router|health|ready|metrics|webhook)[\w/{}.-]*)", text
    ):
        yield "", path


@pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: path.name)
def test_no_endpoint_is_named_that_there_is_not(
    path: Path, routes: list[tuple[str, re.Pattern[str]]]
) -> None:
    foreign = re.compile(r"/api/|/webhook/waha$|/x$")  # WAHA's and a backend's
    for method, named in asked_in(TEXTS[path]):
        if foreign.match(named):
            continue
        filled = re.sub(r"\{\w+\}", "1", named).rstrip(".")
        filled += "1" * filled.endswith("unlock/")  # a phone in another spelling follows
        assert any(pattern.match(filled) and method in ("", how) for how, pattern in routes), (
            f"{method} {named}"
        )


def test_every_endpoint_is_in_the_reference(routes: list[tuple[str, re.Pattern[str]]]) -> None:
    reported = section(REFERENCE, "## HTTP")
    named = {(method, path) for method, path in asked_in(reported) if method}
    page = re.compile(r"\^/router/?(?:page/.*)?\$")
    for method, pattern in routes:
        if (
            page.fullmatch(pattern.pattern)
            or pattern.pattern.endswith("waha/$")
            or method == "HEAD"
        ):
            continue
        fits = [
            path
            for how, path in named
            | {("GET", one) for one in re.findall(r"`(/[\w/{}.]+)`", reported)}
            if how == method and pattern.match(re.sub(r"\{\w+\}", "1", path))
        ]
        assert fits or "qr" in pattern.pattern, f"{method} {pattern.pattern}"


# metrics, events, commands


def test_the_metrics_table_is_the_registry() -> None:
    first = "\n".join(table(section(REFERENCE, "## Metrics")))
    shown = re.findall(r"`([a-z_]+)(?:\{([a-z,]+)\})?`", first)
    assert sorted(shown) == sorted(Metrics().series())


@pages
def test_no_metric_is_named_that_there_is_not(path: Path) -> None:
    names = {name for name, _ in Metrics().series()}
    others = {"gateway_phone", "gateway_language", "gateway_page", "gateway_"}
    for name in re.findall(r"\bgateway_[a-z_]*", TEXTS[path]):
        assert re.sub("_(bucket|sum|count)$", "", name) in names | others, name


def test_the_table_of_log_events_is_what_the_code_says() -> None:
    rows = section(REFERENCE, "## Log events").partition("|---|")[2]
    source = "".join(path.read_text("utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    said = set(re.findall(r'(?:"event": |\bevent=)"([a-z_]+(?:\.[a-z_]+)*)"', source)) - {"message"}
    shown = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)?)`", rows))
    composed = set(
        re.findall(r'(?:"event": |\bevent=)f"([a-z_]+\.)\{', source)
    )  # with an outcome behind it
    assert composed == {"lid.", "help.", "refused."}
    by_outcome = {name for name in shown - said if name.startswith(tuple(composed))}
    assert shown - by_outcome == said
    outcomes = Metrics().text().decode()
    series = {"lid": "gateway_lid_lookups_total", "help": "gateway_help_messages_total"}
    for name in by_outcome:
        kind, _, outcome = name.partition(".")
        assert kind == "refused" or f'{series[kind]}{{outcome="{outcome}"}}' in outcomes, name


def test_the_table_of_commands_is_what_there_is() -> None:
    shown = re.findall(
        r"`([a-z-]+)(?: [A-Z]+)*`", " ".join(table(section(REFERENCE, "## Commands")))
    )
    (made,) = [
        action.choices
        for action in cli.parser()._actions
        if action.dest == "command" and action.choices is not None
    ]
    assert sorted(shown) == sorted(made)
    for text in TEXTS.values():
        for named in re.findall(r"whatsapp_router\.py ([a-z][a-z-]+)", text):
            assert named in made, named


# what is run


def fences(text: str) -> list[tuple[str, str, str]]:
    """Of each block its language, the line before it, and its text."""
    found = re.findall(r"([^\n]*)\n+ *```(\w*)\n(.*?)```", text, re.DOTALL)
    return [(language, before, block) for before, language, block in found]


@pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: path.name)
def test_every_command_is_run_by_a_test_or_marked_as_not_run(path: Path) -> None:
    text = TEXTS[path]
    followed = (ROOT / "tests" / "test_readme.py").read_text("utf-8")
    tests = followed + (ROOT / "tests" / "test_example.py").read_text("utf-8")
    pieces = re.findall(
        r"<!-- (walk-through[^:]*): run by tests/test_readme.py -->(.*?)<!-- end of",
        text,
        re.DOTALL,
    )
    for name, _ in pieces:
        assert f'walk_through("{name}")' in followed, name
    run = "".join(part for _, part in pieces)
    for language, _, block in fences(text):
        assert language in ("console", "sh", "text", "yaml", "python"), block
        if language == "console":
            assert block in run, block
        if language == "sh":
            # The paragraph says so, which may be of several lines.
            paragraph = " ".join(text[: text.index(block)].rsplit("\n\n", 2)[-2:])
            if not re.search(r"[Nn]o[tr] (?:are )?run(?: by)?|not run", paragraph):
                for line in block.splitlines():
                    assert f"def {RUN_OTHERWISE[line.partition(' #')[0].strip()]}(" in tests, line


@pages
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    assert not re.search(
        r"\b(?:TODO|TBD|FIXME|XXX|[A-Z]+_(?:TIMES|RESULT))\b|@[A-Z0-9]+@", TEXTS[path]
    )


# what is said of the code


def test_the_check_that_a_backend_copies_is_the_examples() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", TEXTS[ROOT / "docs" / "security.md"], re.DOTALL)
    assert shown.startswith("def check_signature")
    assert shown in (ROOT / "examples" / "backend.py").read_text("utf-8")


def test_the_layout_in_the_architecture_is_the_layout_there_is() -> None:
    text = TEXTS[ROOT / "ARCHITECTURE.md"]
    layout, imports = text.split("## The layout")[1].split("## The way of a message")[0].split(
        "Imports point one way"
    )  # fmt: skip
    there = {path.name for path in (ROOT / "gateway").rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"\b(\w+\.py)\b", layout)) - {"__init__.py", "whatsapp_router.py"}
    assert named == there
    for row in test_layers.ROWS:
        for folder in row - {"gateway"}:
            assert re.search(rf"\b{folder}\b", imports), folder


def test_all_eighteen_traps_are_there() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 19))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_trap_has_its_test_or_the_reason_why_it_cannot_bite(row: tuple[str, str, str]) -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[2])
    assert tests or row[2].startswith("cannot bite here: ")
    for path, name in tests:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        functions = {getattr(node, "name", None) for node in tree.body}
        assert name in functions, f"{path} has no {name}"
