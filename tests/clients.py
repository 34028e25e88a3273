"""The app in this process, called through its HTTP interface."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from gateway.app import create_app
from gateway.settings import Settings
from gateway.store import Limits
from tests.conftest import LIMITS

HOOK = "/webhook/waha"
NO_WAHA = "http://127.0.0.1:9/api"  # nobody listens there
Transport = Callable[[int], httpx.AsyncBaseTransport]


def accepting(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200)


def settings_of(tmp_path: Path, **settings: Any) -> Settings:
    """Settings untouched by the environment, with the data in tmp_path."""
    settings = {"data_dir": tmp_path / "data", "waha_api_url": NO_WAHA} | settings
    return Settings.model_validate(
        {name: field.default for name, field in Settings.model_fields.items()} | settings
    )


@contextlib.contextmanager
def client_of(
    tmp_path: Path,
    *,
    limits: Limits | None = LIMITS,
    handler: Callable[[httpx.Request], httpx.Response] = accepting,
    **settings: Any,
) -> Iterator[TestClient]:
    """A client of a running app. handler plays the backend."""
    app = create_app(
        settings_of(tmp_path, **settings),
        transport=lambda _: httpx.MockTransport(handler),
        limits=limits,
    )
    with TestClient(app, follow_redirects=False) as client:
        yield client
