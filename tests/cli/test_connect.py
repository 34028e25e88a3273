"""connect-waha: what it makes of a session's config, and what it asks and says on the way."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.cli.connect import connect
from gateway.settings import Settings
from gateway.waha import webhook_config
from gateway.waha.webhook_config import Wanted, events_for, faults, repaired, retry_seconds
from tests.clients import settings_of

URL = "http://router:8001/webhook/waha"
WANTED = Wanted(URL, ("message", "session.status"), hmac_key="a key of thirty-two characters..")
HOUR = {"policy": "constant", "delaySeconds": 5, "attempts": 720}
IGNORED = {"status": True, "groups": True, "channels": True, "broadcast": True}
OK = {
    "url": URL,
    "events": ["message", "session.status"],
    "hmac": {"key": WANTED.hmac_key},
    "retries": HOUR,
}


@pytest.mark.parametrize(
    ("forwarded", "events"),
    [
        ({"message"}, ("message", "session.status")),
        ({"message", "message.any"}, ("message.any", "session.status")),
        ({"message.any"}, ("message.any", "session.status")),
        ({"message", "message.ack"}, ("message", "message.ack", "session.status")),
        ({"message", "session.status"}, ("message", "session.status")),
        ({"*"}, ("*",)),
    ],
)
def test_what_is_subscribed(forwarded: set[str], events: tuple[str, ...]) -> None:
    assert events_for(forwarded) == events


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"webhooks": []},
        {"webhooks": None, "ignore": None},
        {"webhooks": [{"url": URL, "events": ["*"]}]},
        {"webhooks": [OK, OK], "ignore": {"status": False}},
        {"webhooks": [{"url": f"{URL}/", "events": ["message"], "retries": {"attempts": 1}}]},
    ],
)
def test_the_webhook_is_added_or_repaired_once(before: dict[str, Any]) -> None:
    untouched = copy.deepcopy(before)
    after = repaired(before, WANTED)
    assert after == {"webhooks": [OK], "ignore": IGNORED}
    assert repaired(after, WANTED) == after
    assert before == untouched
    assert faults(after, WANTED) == []


def test_all_else_in_the_config_stays() -> None:
    other = {"url": "http://crm/hook", "events": ["message"]}
    before = {
        "metadata": {"a": "b"},
        "noweb": {"store": {"enabled": True}},
        "webhooks": [other, {"url": URL, "customHeaders": [{"name": "X-My", "value": "1"}]}],
    }
    after = repaired(before, WANTED)
    assert (after["metadata"], after["noweb"]) == (before["metadata"], before["noweb"])
    assert after["webhooks"] == [other, OK | {"customHeaders": [{"name": "X-My", "value": "1"}]}]


def test_without_a_signing_key_wahas_own_key_is_sent() -> None:
    (webhook,) = repaired({}, Wanted(URL, ("message",), api_key="k"))["webhooks"]
    assert webhook["customHeaders"] == [{"name": "X-Api-Key", "value": "k"}]
    assert "hmac" not in webhook


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"events": ["session.status"]}, "lacks the event message"),
        ({"events": ["message"]}, "lacks the events session.status"),
        ({"events": ["message", "message.any", "session.status"]}, "each message comes twice"),
        ({"hmac": None}, "it is not signed"),
        ({"hmac": {"key": "other"}}, "is not WEBHOOK_HMAC_KEY"),
        ({"hmac": "x"}, "it is not signed"),
        ({"retries": None}, "gives an event up after 30 s"),
        ({"retries": {"policy": "constant", "delaySeconds": 2, "attempts": 0}}, "after 0 s"),
    ],
)
def test_what_is_wrong_with_it_is_named(change: dict[str, Any], reported: str) -> None:
    assert any(reported in fault for fault in faults({"webhooks": [OK | change]}, WANTED))


@pytest.mark.parametrize("events", [["*"], ["message.any", "session.status"]])
def test_more_than_is_needed_is_no_fault(events: list[str]) -> None:
    assert faults({"webhooks": [OK | {"events": events}]}, WANTED) == []


@pytest.mark.parametrize(
    ("retries", "seconds"),
    [
        (None, 30),
        (HOUR, 3600),
        ({"policy": "linear", "delaySeconds": 1, "attempts": 3}, 6),
        ({"policy": "exponential", "delaySeconds": 1, "attempts": 3}, 14),
        ({"policy": "exponential", "delaySeconds": 2, "attempts": 10_000}, 2.0**62 - 4),
        ({"attempts": "x"}, 0),
    ],
)
def test_how_long_waha_repeats(retries: Any, seconds: float) -> None:
    assert retry_seconds({"retries": retries}) == seconds


# with a WAHA


def settings(tmp_path: Path, waha: StandIn, **how: Any) -> Settings:
    keys = {"webhook_hmac_key": WANTED.hmac_key, "waha_api_key": "k" * 32}
    return settings_of(tmp_path, **{"waha_api_url": waha.url} | keys | how)


def never(question: str) -> str:
    raise AssertionError(f"asked: {question}")


async def test_it_shows_the_difference_asks_and_puts_it(
    tmp_path: Path, waha: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    waha.key = "k" * 32
    asked = []

    def yes(question: str) -> str:
        asked.append(question)
        return "y"

    mine = settings(tmp_path, waha)
    assert await connect(mine, URL, session="default", yes=False, ask=yes) == 0
    assert "stops and starts session default" in asked[0]
    assert waha.configs["default"] == {"webhooks": [OK], "ignore": IGNORED}
    assert waha.restarts == ["default"]
    shown = capsys.readouterr().out
    assert f'"url": "{URL}"' in shown
    assert WANTED.hmac_key not in shown
    assert await connect(mine, URL, session="default", yes=False, ask=never) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert waha.restarts == ["default"]


def _hangs_up(_: str) -> str:
    raise EOFError


@pytest.mark.parametrize("ask", [lambda _: "", lambda _: "no", _hangs_up])
async def test_whoever_says_no_changes_nothing(
    tmp_path: Path, waha: StandIn, ask: Callable[[str], str]
) -> None:
    mine = settings(tmp_path, waha)
    assert await connect(mine, URL, session="default", yes=False, ask=ask) == 1
    assert waha.configs["default"] is None


@pytest.mark.parametrize(
    "config",
    [
        {"webhooks": [OK | {"customHeaders": None}], "ignore": IGNORED},
        {"webhooks": [OK, {"url": "http://crm/hook"}], "ignore": IGNORED},
        {"webhooks": [OK | {"retries": HOUR | {"attempts": 5000}}], "ignore": IGNORED},
        {"webhooks": [OK | {"events": ["*"]}], "ignore": IGNORED},
    ],
)
async def test_a_session_that_works_is_not_restarted(
    tmp_path: Path, waha: StandIn, config: dict[str, Any]
) -> None:
    waha.configs["default"] = config
    mine = settings(tmp_path, waha)
    assert await connect(mine, URL, session="default", yes=False, ask=never) == 0
    assert waha.restarts == []


async def test_no_secret_of_the_session_is_shown(
    tmp_path: Path, waha: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    waha.configs["default"] = {
        "proxy": {"server": "x", "password": "s3cr3t-proxy"},
        "metadata": {"token": "s3cr3t-meta"},
        "webhooks": [
            {
                "url": "http://crm/hook?token=s3cr3t-query",
                "events": ["message"],
                "hmac": {"key": "s3cr3t-hmac"},
                "customHeaders": [{"name": "Authorization", "value": "s3cr3t-header"}],
            }
        ],
    }
    before = copy.deepcopy(waha.configs["default"])
    await connect(settings(tmp_path, waha), URL, session="default", yes=True)
    shown = capsys.readouterr()
    assert "s3cr3t" not in shown.out + shown.err
    after = waha.configs["default"]
    assert after
    assert before
    assert (after["proxy"], after["webhooks"][0]) == (before["proxy"], before["webhooks"][0])


@pytest.mark.parametrize(
    "config",
    [
        {"webhooks": "x"},
        {"webhooks": [{"url": "http://a", "events": [], "hmac": "x", "customHeaders": "x"}]},
        {"webhooks": [{"url": URL, "events": "message", "hmac": [], "customHeaders": ["x"]}]},
        {"webhooks": [{"url": URL, "retries": "often", "customHeaders": {"a": 1}}]},
        {"ignore": "x", "webhooks": {}},
        None,
    ],
)
async def test_whatever_waha_shows_is_repaired(tmp_path: Path, waha: StandIn, config: Any) -> None:
    waha.configs["default"] = config
    mine = settings(tmp_path, waha)
    assert await connect(mine, URL, session="default", yes=True) == 0
    assert faults(waha.configs["default"] or {}, WANTED) == []


async def test_what_waha_finds_wrong_with_another_webhook_is_shown(
    tmp_path: Path, waha: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its deprecated start call takes whatever it is given, its present one does not."""
    waha.configs["default"] = {"webhooks": [{"url": "http://a", "events": ["message.*"]}]}
    assert await connect(settings(tmp_path, waha), URL, session="default", yes=True) == 1
    assert "message.*" in capsys.readouterr().err
    assert waha.restarts == []


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.json_response({"name": "default", "config": "x"}),
        lambda: web.json_response({"name": "default", "config": [1]}),
        lambda: web.json_response([1]),
        lambda: web.json_response({"config": {"a": "x" * 1_100_000}}),  # more than is read
        lambda: web.Response(text="<html>", content_type="text/html"),
        lambda: web.Response(),
    ],
)
async def test_what_is_no_session_is_not_written_over(
    tmp_path: Path, waha: StandIn, answer: Callable[[], web.Response]
) -> None:
    """With an empty config in its place the session lost its proxy."""
    waha.odd_answer = answer
    assert await connect(settings(tmp_path, waha), URL, session="default", yes=True) == 1
    assert waha.restarts == []


def test_the_key_in_place_of_a_signature_is_looked_at() -> None:
    by_key = Wanted(URL, WANTED.events, api_key="k")
    assert faults(repaired({}, by_key), by_key) == []
    reported = faults({"webhooks": [OK]}, by_key)
    assert reported == ["it does not send WAHA_API_KEY as X-Api-Key"]


async def test_a_script_must_say_yes(
    tmp_path: Path, waha: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = settings(tmp_path, waha)
    assert await connect(mine, URL, session="default", yes=False) == 1
    assert "--yes" in capsys.readouterr().err
    assert await connect(mine, URL, session="default", yes=True) == 0
    assert waha.restarts == ["default"]


@pytest.mark.parametrize(
    ("how", "config", "reported"),
    [
        ({"webhook_hmac_key": ""}, {}, "WEBHOOK_HMAC_KEY is empty"),
        ({"webhook_hmac_key": "", "waha_api_key": "", "host": "10.0.0.1"}, {}, "no webhook in"),
        ({"webhook_hmac_key": "short"}, {}, "WEBHOOK_HMAC_KEY is weak"),
        ({}, {"webhooks": [{"url": "http://other/webhook/waha"}]}, "http://other/webhook/waha"),
        ({}, {"webhooks": [OK, OK]}, "is in it twice"),
        ({}, {"webhooks": [OK | {"events": ["message", "message.any"]}]}, "comes twice"),
        ({}, {}, "WHATSAPP_HOOK_URL"),
    ],
)
async def test_what_it_warns_of(
    tmp_path: Path,
    waha: StandIn,
    capsys: pytest.CaptureFixture[str],
    how: dict[str, Any],
    config: dict[str, Any],
    reported: str,
) -> None:
    waha.configs["default"] = config
    await connect(settings(tmp_path, waha, **how), URL, session="default", yes=True)
    assert [line for line in capsys.readouterr().out.splitlines()
            if line.startswith("Mind: ") and reported in line]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "url", "reported"),
    [
        ({}, "http://gateway_router:8001/webhook/waha", "underscore"),
        ({}, "router:8001", "is no http://"),
        ({"host": "0.0.0.0"}, None, "--url"),
    ],
)
async def test_an_address_that_cannot_work_is_refused_before_waha_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any], url: str, reported: str
) -> None:
    assert await connect(settings_of(tmp_path, **how), url, session="default", yes=True) == 2
    assert reported in capsys.readouterr().err


async def test_what_waha_refuses_is_reported_with_the_cure(
    tmp_path: Path, waha: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for how, session, reported in (
        ({"waha_api_key": "wrong"}, "default", "set WAHA_API_KEY"),
        ({}, "support", "create the session"),
        ({"waha_api_url": "http://127.0.0.1:9/api"}, "default", "is WAHA running"),
    ):
        waha.key = "k" * 32
        status = await connect(settings(tmp_path, waha, **how), URL, session=session, yes=True)
        assert status == 1
        assert reported in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://router/x", "https://a-b.example:8001/webhook/waha"])
def test_usual_addresses_pass(url: str) -> None:
    assert webhook_config.why_not(url) is None
