"""The short form of tests/fuzz.py, with Hypothesis's dice: a failing body is made small."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.clients import HOOK, client_of
from tests.fuzz import Locks, body
from tests.messages import PAYLOADS

MANY = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as opened:
        yield opened


def check(client: TestClient, locks: Locks, data: bytes) -> None:
    answer = client.post(HOOK, content=data)
    locks.check(data, answer.status_code, answer.content)
    locks.check_stored(client.get("/router/stats?limit=100000").json()["mappings"])


@given(draw=st.randoms(use_true_random=False))
@MANY
def test_events_with_odd_values(client: TestClient, draw: Random) -> None:
    locks = client.app.state.__dict__.setdefault("locks", Locks())  # type: ignore[attr-defined]
    check(client, locks, body(draw))


@given(data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
@example((PAYLOADS / "04-message-deeplink-webjs.json").read_bytes())
@MANY
def test_raw_bytes(client: TestClient, data: bytes) -> None:
    locks = client.app.state.__dict__.setdefault("locks", Locks())  # type: ignore[attr-defined]
    check(client, locks, data)
