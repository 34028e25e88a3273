"""What the doctor makes of single things; tests/e2e/test_commands.py runs it whole."""

import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.commands import doctor
from gateway.commands.doctor import Verdict
from gateway.waha.webhooks import Wanted, repaired
from tests.clients import settings_of

URL = "http://router:8001/webhook/waha"


@pytest.mark.parametrize(
    ("date", "verdict"),
    [
        (lambda: formatdate(time.time(), usegmt=True), Verdict.WELL),
        (lambda: formatdate(time.time() - 60, usegmt=True), Verdict.WRONG),
        (lambda: formatdate(time.time() + 60, usegmt=True), Verdict.WRONG),
        (lambda: "yesterday", Verdict.MIND),
    ],
)
def test_clocks(date: Callable[[], str], verdict: Verdict) -> None:
    answer = httpx.Response(200, headers={"date": date()})
    assert doctor._clock("clock", answer).verdict is verdict
    assert doctor._clock("clock", httpx.Response(200)).verdict is Verdict.MIND


@pytest.mark.parametrize(
    ("age", "verdict"), [(None, Verdict.MIND), (60, Verdict.WELL), (30_000, Verdict.MIND)]
)
def test_silence(age: float | None, verdict: Verdict) -> None:
    last = None if age is None else time.time() - age
    assert doctor._silence("default", last).verdict is verdict


@pytest.mark.parametrize(
    ("config", "last_event", "verdicts"),
    [
        ({}, None, [Verdict.WRONG]),
        ({}, 1.0, [Verdict.MIND]),  # a webhook for all sessions, as in docker-compose.yml
        ({"webhooks": [{"url": URL, "events": ["message"]}]}, 1.0, [Verdict.WRONG] * 2),
        (repaired({}, Wanted(URL, ("message", "session.status"))), None, [Verdict.WELL]),
    ],
)
def test_webhooks(
    tmp_path: Path, config: Any, last_event: float | None, verdicts: list[Verdict]
) -> None:
    found = doctor._webhook({"config": config}, settings_of(tmp_path), URL, last_event)
    assert [one.verdict for one in found] == verdicts


def test_a_cure_stands_in_the_line() -> None:
    told = str(doctor.wrong("disk", "full", "make room"))
    assert told == "WRONG disk: full -> make room"
