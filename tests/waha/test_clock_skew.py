"""Our clock beside WhatsApp's: what is noticed, and what an operator's decision makes of it."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gateway.waha.clock_skew import ClockSkew
from tests.clients import client_of
from tests.messages import ALI, NOW, OMAR, SARA, message, user, webhook

HOOK = "/webhook/waha"


class Clock:
    def __init__(self) -> None:
        self.now, self.monotonic = NOW, 5.0

    def skew(self) -> ClockSkew:
        return ClockSkew(lambda: self.now, lambda: self.monotonic)


@pytest.mark.parametrize(
    ("late", "ahead"),
    [
        ([], None),
        ([600, 600], None),  # too few to tell
        ([1, 2, 0], 0.0),
        ([600, 601, 602], 600.0),
        ([600, 601, 2], 0.0),  # one in time: the others were late
        ([59, 59, 59], 0.0),
        ([-600, -599, -598], -599.0),
        ([-600, 1, 2], 0.0),  # one odd time is nobody's clock
        ([-600, -600, 300], -600.0),  # one that was late
        ([600] * 9 + [1], 0.0),
        ([1] * 9 + [-600] * 5, -600.0),
        ([-600] * 9 + [1] * 5, 0.0),
    ],
)
def test_how_far_our_clock_is_off(late: Sequence[float], ahead: float | None) -> None:
    skew = Clock().skew()
    for seconds in late:
        skew.note(message(sent=NOW - seconds))
    assert skew.seconds_ahead() == ahead


def test_only_what_people_sent_is_compared() -> None:
    skew = Clock().skew()
    for _ in range(5):
        skew.note(message(sent=NOW - 900, own=True, event="message.any"))
        skew.note(message(sent=NOW - 900, event="message.ack"))
        skew.note(message(timestamp="soon"))
    assert skew.seconds_ahead() is None


def test_what_was_noted_before_our_clock_jumped_counts_no_more() -> None:
    clock = Clock()
    skew = clock.skew()
    for _ in range(3):
        skew.note(message(sent=NOW - 900))
    clock.now, clock.monotonic = NOW + 60, 65.0
    assert skew.seconds_ahead() == 900
    clock.now -= 900  # it was set right
    assert skew.seconds_ahead() is None
    assert skew.decided_at() == clock.now


def test_a_decision_is_taken_by_whatsapps_clock_and_after_what_the_user_wrote() -> None:
    skew = Clock().skew()
    assert skew.decided_at(user(ALI)) == NOW
    skew.note(message(user=ALI, sent=NOW + 7000))  # nobody's clock
    assert skew.decided_at(user(ALI)) == NOW
    for ahead in (0, 1, 1, 30):
        skew.note(message(user=SARA, sent=NOW + 600 + ahead, latest=skew.latest()))
    assert skew.decided_at() == NOW + 601
    assert skew.decided_at(user(SARA)) == NOW + 630
    assert skew.latest() > NOW + 630


@pytest.mark.parametrize("ahead", [2, 20, 50, 600])
def test_a_decision_is_never_later_than_the_links_that_come_after_it(ahead: float) -> None:
    """However far WhatsApp's times are ahead of our clock, and whether that is known already."""
    clock = Clock()
    skew = clock.skew()
    for _ in range(6):
        skew.note(message(user=ALI, sent=clock.now + ahead, now=clock.now, latest=skew.latest()))
        decided_at = skew.decided_at(user(ALI))
        clock.now += 1
        clock.monotonic += 1
        link = message(user=ALI, sent=clock.now + ahead, now=clock.now, latest=skew.latest())
        assert link.sent.second >= int(decided_at)


def test_what_was_known_holds_over_a_quiet_night() -> None:
    clock = Clock()
    skew = clock.skew()
    for _ in range(3):
        skew.note(message(sent=NOW + 3600))
    clock.now, clock.monotonic = NOW + 40_000, 40_005.0
    assert skew.seconds_ahead() == -3600
    for _ in range(3):
        skew.note(message(sent=NOW + 40_000, now=clock.now))
    assert skew.seconds_ahead() == 0


def said(client: TestClient, text: str, who: str, late: float) -> dict[str, object]:
    body = webhook(text, who, sent=time.time() - late, raised=time.time() - late)
    answer: dict[str, object] = client.post(HOOK, content=body).json()
    return answer


@pytest.mark.parametrize("late", [3600.0, -3600.0])
def test_a_link_after_an_operators_decision_moves_though_our_clock_is_off(
    tmp_path: Path, late: float
) -> None:
    with client_of(tmp_path) as client:
        assert client.get("/ready").json()["clock"] == "ok: not compared with WhatsApp's yet"
        said(client, "start_realty_2", ALI, late)
        for who in (SARA, OMAR, OMAR):
            said(client, "hello", who, late)
        word = "ahead of" if late > 0 else "behind"
        clock = client.get("/ready").json()["clock"]
        assert re.match(f"degraded: (3599|360[0-2]) s {word}", clock), clock
        assert client.post(f"/router/lock/{ALI}", json={"tenant_id": 5}).status_code == 200
        time.sleep(1.1)  # WhatsApp's times are whole seconds
        old = said(client, "start_realty_7", ALI, late + 60)
        assert (old["action"], old["tenant_id"]) == ("existing_session", 5)
        new = said(client, "start_realty_9", ALI, late)
        assert (new["action"], new["tenant_id"]) == ("new_session_locked", 9)
        client.post(f"/router/unlock/{ALI}")
        assert said(client, "start_realty_7", ALI, late + 60)["status"] == "unknown_user"
