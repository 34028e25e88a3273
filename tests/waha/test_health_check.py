"""Whether WAHA is there, and how its sessions stand, without an event that tells."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from examples.waha import StandIn
from gateway.errors import WahaSilent, WahaUnavailable
from gateway.metrics import Metrics
from gateway.waha.client import SessionInfo, Waha
from gateway.waha.health_check import HealthCheck, Keys
from gateway.waha.sessions import Sessions
from tests.conftest import wait_until
from tests.messages import parse, webhook

HOOK = {"url": "http://router:8001/webhook/waha", "events": ["message", "session.status"]}
HOOKED: dict[str, Any] = {"webhooks": [HOOK]}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@dataclass
class Reported:
    """Notes what the health_check says."""

    said: list[str] = field(default_factory=list)

    def waha_lost(self) -> None:
        self.said.append("lost")

    def waha_back(self) -> None:
        self.said.append("back")

    def session_gone(self, session: str) -> None:
        self.said.append(f"gone: {session}")

    def webhook_missing(self, session: str) -> None:
        self.said.append(f"no webhook: {session}")


@pytest.fixture
def reported() -> Reported:
    return Reported()


@pytest.fixture
def health_check(client: Waha, metrics: Metrics, reported: Reported) -> Iterator[HealthCheck]:
    made = HealthCheck(client, Sessions(metrics), metrics, reported, home_session="default")
    yield made
    made.stop()


def up(metrics: Metrics, session: str = "default") -> float | None:
    return metrics.value("gateway_waha_session_up", session=session)


async def test_a_session_that_waits_for_its_qr_code_is_known_without_an_event(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics
) -> None:
    waha.statuses["default"] = "SCAN_QR_CODE"
    await health_check.check()
    assert metrics.value("gateway_waha_up") == 1
    assert up(metrics) == 0
    waha.statuses["default"] = "WORKING"
    await health_check.check()
    assert up(metrics) == 1


async def test_a_waha_that_has_died_is_noticed(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    waha.configs["default"] = HOOKED
    await health_check.check()
    assert (health_check.silent_since, health_check.ever) == (None, True)
    there, health_check._waha = health_check._waha, Waha("http://127.0.0.1:9/api", "")
    await health_check.check()
    await health_check.check()
    assert health_check.silent_since is not None
    assert abs(health_check.silent_since - time.time()) < 60
    assert metrics.value("gateway_waha_up") == 0
    await health_check._waha.close()
    health_check._waha = there
    await health_check.check()
    assert health_check.silent_since is None
    reported = [
        one.message.partition(":")[0]
        for one in caplog.records
        if one.name == "gateway.waha.health_check"
    ]
    assert reported == ["📵 WAHA does not answer", "📱 WAHA answers again"]


async def test_one_session_that_fails_hides_no_other(
    client: Waha,
    waha: StandIn,
    metrics: Metrics,
    reported: Reported,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = Sessions(metrics)
    health_check = HealthCheck(client, sessions, metrics, reported, home_session="default")
    waha.configs = dict.fromkeys(("default", "a", "b", "c"), HOOKED)
    for name in "abc":
        sessions.asked(name, "WORKING", frozenset(), 1.0)
    waha.statuses["c"] = "FAILED"
    session_info = client.session_info

    async def fails(name: str) -> SessionInfo:
        if name == "a":
            raise WahaSilent("it hangs")
        if name == "b":
            raise WahaUnavailable("500", 500)
        return await session_info(name)

    monkeypatch.setattr(client, "session_info", fails)
    await health_check.check()
    assert (health_check.silent_since, up(metrics, "c"), reported.said) == (None, 0, [])
    monkeypatch.setattr(client, "session_info", session_info)
    waha.delay = 0.0
    silent = Waha("http://127.0.0.1:9/api", "")
    health_check._waha = silent
    await health_check.check()
    await health_check.check()
    health_check._waha = client
    await health_check.check()
    await silent.close()
    assert reported.said == ["lost", "back"]


async def test_it_looks_again_and_again_whatever_waha_answers(
    health_check: HealthCheck,
    waha: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("gateway.waha.health_check._EVERY_SECONDS", 0.01)
    waha.configs["default"] = HOOKED
    looked = 0
    look = health_check.check

    async def fails() -> None:
        nonlocal looked
        looked += 1
        if looked == 2:
            raise RuntimeError("unforeseen")
        await look()

    monkeypatch.setattr(health_check, "check", fails)
    health_check.start()
    await wait_until(lambda: looked >= 4)
    assert "the health check failed" in caplog.text


async def test_a_wrong_key_is_an_answer_and_reported(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics
) -> None:
    waha.odd_answer = lambda: web.Response(status=401)
    await health_check.check()
    assert metrics.value("gateway_waha_up") == 1
    assert "401" in str(health_check.refused)
    waha.odd_answer = None
    await health_check.check()
    assert health_check.refused is None


async def test_a_home_session_that_is_not_there_does_not_work(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics
) -> None:
    await health_check.check()
    assert up(metrics) == 1
    del waha.configs["default"]
    await health_check.check()
    assert up(metrics) == 0


async def test_a_status_that_is_none_is_not_believed(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics
) -> None:
    waha.statuses["default"] = "WOR\ud83dKING"
    await health_check.check()
    assert up(metrics) is None


async def test_a_session_that_waha_has_no_more_is_forgotten(
    client: Waha, waha: StandIn, metrics: Metrics, reported: Reported
) -> None:
    sessions = Sessions(metrics)
    health_check = HealthCheck(client, sessions, metrics, reported, home_session="default")
    sessions.asked("sales", "WORKING", frozenset(), 1.0)
    assert up(metrics, "sales") == 1
    del waha.configs["sales"]
    await health_check.check()
    assert up(metrics, "sales") is None
    assert "sales" not in sessions.all()


@pytest.mark.parametrize("status", [502, 503, 504, 520, 530])
async def test_a_proxy_that_answers_for_a_waha_that_is_away_is_no_waha(
    health_check: HealthCheck, waha: StandIn, metrics: Metrics, reported: Reported, status: int
) -> None:
    waha.odd_answer = lambda: web.Response(status=status, text="<html>Bad Gateway</html>")
    await health_check.check()
    assert metrics.value("gateway_waha_up") == 0
    assert health_check.silent_since is not None
    waha.odd_answer = None
    waha.configs["default"] = HOOKED
    await health_check.check()
    assert (metrics.value("gateway_waha_up"), reported.said) == (1, ["lost", "back"])


async def test_an_error_of_wahas_own_is_an_answer(health_check: HealthCheck, waha: StandIn) -> None:
    waha.odd_answer = lambda: web.json_response({"statusCode": 500}, status=500)
    await health_check.check()
    assert health_check.silent_since is None


# a session that does not send to us


class Sends:
    """A session whose events come, or do not, at times that the test chooses."""

    def __init__(self, client: Waha, metrics: Metrics, reported: Reported, **keys: Any) -> None:
        self.now = 1_000_000.0
        self.sessions = Sessions(metrics)
        self.health_check = HealthCheck(
            client,
            self.sessions,
            metrics,
            reported,
            home_session="default",
            keys=Keys(**keys),
            clock=lambda: self.now,
        )

    def event(self) -> None:
        self.sessions.hear(parse(webhook("hello"), now=self.now))

    async def check(self) -> str | None:
        await self.health_check.check()
        return self.health_check.unhooked().get("default")


@pytest.fixture
def sends(client: Waha, metrics: Metrics, reported: Reported) -> Sends:
    return Sends(client, metrics, reported)


async def test_a_webhook_that_vanishes_is_noticed_and_what_came_is_fetched(
    sends: Sends,
    waha: StandIn,
    metrics: Metrics,
    reported: Reported,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a dashboard's click, or because WAHA Core before 2026.6 forgot it."""
    waha.configs["default"], waha.server_status = HOOKED, 403
    sends.event()
    assert await sends.check() is None
    assert metrics.value("gateway_waha_session_webhook", session="default") == 1
    assert sends.health_check.was_hooked("default")
    waha.configs["default"] = None
    sends.now += 60
    assert await sends.check() == "its config has no webhook to us"
    assert metrics.value("gateway_waha_session_webhook", session="default") == 0
    sends.now += 60
    await sends.check()
    assert reported.said == ["no webhook: default"] * 2, "each look: what came meanwhile is fetched"
    waha.configs["default"] = HOOKED
    assert await sends.check() is None
    said = [one.message for one in caplog.records if "sends us nothing" in one.message]
    assert len(said) == 1


async def test_an_event_older_than_waha_itself_proves_nothing(sends: Sends, waha: StandIn) -> None:
    sends.event()
    sends.now += 600
    waha.started_at = time.time() - 1000
    assert await sends.check() is None, "WHATSAPP_HOOK_URL must have sent it"
    waha.started_at = time.time() - 300
    assert await sends.check() == "its config has no webhook to us"
    sends.event()
    assert await sends.check() is None


async def test_an_event_older_than_the_sessions_start_proves_nothing(
    sends: Sends, waha: StandIn
) -> None:
    waha.server_status = 403  # a narrowed key does not see since when WAHA runs
    sends.event()
    assert await sends.check() is None
    waha.statuses["default"] = "STOPPED"
    sends.now += 60
    assert await sends.check() is None, "that it is STOPPED is said already"
    waha.statuses.clear()
    sends.now += 60
    assert await sends.check() == "its config has no webhook to us"
    sends.event()
    assert await sends.check() is None


async def test_what_was_heard_before_our_start_counts(
    sends: Sends, waha: StandIn, metrics: Metrics
) -> None:
    waha.started_at = time.time() - 1000
    assert await sends.check() is not None
    assert not sends.health_check.was_hooked("default"), "its first event may still come"
    assert metrics.value("gateway_waha_session_webhook", session="default") is None
    sends.sessions.heard_before("default", sends.now - 100)
    assert await sends.check() is None


@pytest.mark.parametrize(
    ("hook", "keys", "why"),
    [
        ({}, {}, None),
        ({"url": "https://gw.example/webhook/waha/?token=x"}, {}, None),
        ({"events": ["*"]}, {}, None),
        ({"events": ["message.any"]}, {}, None),
        ({"url": "http://crm/hook"}, {}, "no webhook to us"),
        ({"url": ["http"]}, {}, "no webhook to us"),
        ({"events": []}, {}, "without the event message"),
        ({"events": ["session.status"]}, {}, "without the event message"),
        ({"events": "message"}, {}, "without the event message"),
        ({}, {"hmac": ("k1",)}, "not signed"),
        ({"hmac": {"key": "k2"}}, {"hmac": ("k1",)}, "not signed"),
        ({"hmac": {"key": "k2"}}, {"hmac": ("k1", "k2")}, None),
        ({}, {"api": "a"}, "X-Api-Key"),
        ({"customHeaders": [{"name": "x-api-key", "value": "a"}]}, {"api": "a"}, None),
        ({"hmac": {"key": "k1"}}, {"hmac": ("k1",), "api": "a"}, None),
    ],
)
async def test_what_makes_that_nothing_comes(
    client: Waha, waha: StandIn, metrics: Metrics, reported: Reported,
    hook: dict[str, Any], keys: dict[str, Any], why: str | None,
) -> None:  # fmt: skip
    sends = Sends(client, metrics, reported, **keys)
    waha.configs["default"] = {"webhooks": ["odd", HOOK | hook]}
    found = await sends.check()
    assert found is None if why is None else why in str(found)
