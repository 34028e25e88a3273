"""Every public name, as docs/stability.md promises them: python -m tests.public writes the list."""

import re
import tempfile
from pathlib import Path
from unittest import mock

from fastapi import FastAPI
from fastapi.testclient import TestClient

from gateway import cli
from gateway.metrics import Metrics
from gateway.settings import Settings
from tests.clients import client_of

ROOT = Path(__file__).parent.parent
LIST = ROOT / "docs" / "public.txt"


def public_names() -> list[str]:
    """Return a line for each: its kind and its name."""
    found = {f"setting {name.upper()}" for name in Settings.model_fields}
    found |= {f"metric {name}{{{labels}}}" for name, labels in Metrics().series()}
    found |= {f"command {one}" for one in _commands()}
    source = "".join(path.read_text("utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    found |= {f"log event {name}" for name in _log_events()}
    found |= {f"backend header {name}" for name in _backend_headers(source)}
    with tempfile.TemporaryDirectory() as folder, client_of(Path(folder)) as client:
        found |= {f"route {one}" for one in _routes(client)}
    return sorted(found)


def _commands() -> list[str]:
    (commands,) = [one for one in cli.parser()._actions if one.dest == "command"]
    names = []
    for name, parser in (commands.choices or {}).items():  # type: ignore[attr-defined]
        names.append(name)
        for action in parser._actions:
            names += [f"{name} {option}" for option in action.option_strings if option != "-h"]
    return names


def _log_events() -> set[str]:
    text = (ROOT / "docs" / "reference.md").read_text("utf-8")
    rows = text.partition("## Log events")[2].partition("|---|")[2].partition("\n## ")[0]
    return set(re.findall(r"`([a-z]+(?:\.[a-z_]+)?)`", rows))


def _backend_headers(source: str) -> set[str]:
    text = (ROOT / "docs" / "backend.md").read_text("utf-8")
    shown = set(re.findall(r"`((?:X-|webhook-|Idempotency-)[A-Za-z-]+)[:`]", text))
    return {name for name in shown if name.lower() in source.lower()}


def _routes(client: TestClient) -> list[str]:
    app = client.app
    assert isinstance(app, FastAPI)
    found = [
        f"{method.upper()} {path}"
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    ]
    for route in app.routes:
        methods = getattr(route, "methods", None) or set()
        found += [f"{method} {getattr(route, 'path', '')}" for method in methods - {"HEAD"}]
    return found


if __name__ == "__main__":
    with mock.patch.dict("os.environ"):
        LIST.write_text("\n".join(public_names()) + "\n", "utf-8")
