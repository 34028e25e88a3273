"""Lines for people, lines for machines, and nobody's number where that is asked for."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import log
from gateway.domain.model import UserId
from gateway.log import Throttle
from tests.clients import HOOK, client_of
from tests.messages import ALI, webhook


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    log.set_up("INFO", "text", mask_users=False, stream=io.StringIO())
    root.handlers[:] = handlers


def route(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        client.post(HOOK, content=webhook("start_realty_2"))
        client.post(HOOK, content=webhook("my passport number"))


def test_the_three_sentences_that_operators_grep_for(lines: io.StringIO, tmp_path: Path) -> None:
    log.set_up("INFO", "text", mask_users=False, stream=lines)
    route(tmp_path)
    text = lines.getvalue()
    assert "INFO 🔒 LOCKED: User 971501234567 → Tenant 2\n" in text
    assert "INFO 🔀 Routing 971501234567 → Tenant 2 (existing session)\n" in text
    assert "INFO ✅ Forwarded to Tenant 2 backend\n" in text
    assert "passport" not in text


def test_json_has_the_same_facts_as_fields(lines: io.StringIO, tmp_path: Path) -> None:
    log.set_up("INFO", "json", mask_users=False, stream=lines)
    route(tmp_path)
    rows = [json.loads(line) for line in lines.getvalue().splitlines()]
    locked = next(row for row in rows if row["event"] == "lock.changed")
    assert (locked["user"], locked["tenant"], locked["level"]) == (ALI, 2, "INFO")
    assert {"message.routed", "delivery.done"} <= {row["event"] for row in rows}


@pytest.mark.parametrize("form", ["text", "json"])
def test_users_are_masked_when_asked_for(lines: io.StringIO, tmp_path: Path, form: str) -> None:
    log.set_up("DEBUG", form, mask_users=True, stream=lines)
    route(tmp_path)
    assert ALI not in lines.getvalue()
    assert "…4567" in lines.getvalue()


def test_a_throttle_lets_each_key_through_once_in_its_time() -> None:
    now = 0.0
    throttle = Throttle(60, most=2, clock=lambda: now)
    assert [throttle.passes(key) for key in ("a", "a", "b", "c")] == [True, False, True, False]
    now = 59.9
    assert [throttle.passes(key) for key in ("a", "c")] == [False, False]
    now = 60.0
    assert [throttle.passes(key) for key in ("c", "a", "b")] == [True, True, False]


def test_a_masked_lid_still_looks_like_one(lines: io.StringIO) -> None:
    log.set_up("INFO", "text", mask_users=True, stream=lines)
    assert log.shown(UserId("158764321000005@lid")) == "…0005@lid"
    assert log.shown(UserId("sales/971501234567")) == "…4567"
