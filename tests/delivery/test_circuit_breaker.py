"""When the gate closes, probes and opens. Times are handed in."""

import pytest

from gateway.delivery.circuit_breaker import Gate, Sign
from tests.messages import tenant, user


class Told:
    def __init__(self) -> None:
        self.changes: list[bool] = []
        self.gate = Gate(self.changes.append)

    def tell(self, *signs: Sign, now: float = 0.0) -> None:
        """Each sign comes from another user and another tenant."""
        for number, sign in enumerate(signs):
            self.gate.tell(sign, user(f"97150{number:07}"), tenant(number % 5 + 1), now)


@pytest.mark.parametrize(
    ("signs", "closes"),
    [
        ([Sign.NO_CONNECTION] * 3, True),
        ([Sign.NO_CONNECTION] * 2, False),
        ([Sign.NO_CONNECTION] * 2 + [Sign.SUCCESS] + [Sign.NO_CONNECTION] * 2, False),
        ([Sign.NO_CONNECTION] * 2 + [Sign.FAILURE] + [Sign.NO_CONNECTION] * 2, False),
        ([Sign.NO_CONNECTION] * 2 + [Sign.ANSWER] + [Sign.NO_CONNECTION] * 2, False),
        ([Sign.FAILURE] * 10, True),
        ([Sign.FAILURE] * 9 + [Sign.ANSWER] + [Sign.FAILURE], True),
        ([Sign.FAILURE] * 9, False),
        ([Sign.FAILURE] * 9 + [Sign.SUCCESS] + [Sign.FAILURE] * 9, False),
        ([Sign.ANSWER] * 50, False),
    ],
)
def test_what_closes_it(signs: list[Sign], closes: bool) -> None:
    told = Told()
    told.tell(*signs)
    assert told.gate.closed is closes
    assert told.changes == ([True] if closes else [])


@pytest.mark.parametrize(
    ("users", "tenants", "closes"), [(3, 2, True), (2, 2, False), (9, 1, False)]
)
def test_one_tenants_failures_close_nobody_elses_way(
    users: int, tenants: int, closes: bool
) -> None:
    told = Told()
    for number in range(40):
        told.gate.tell(
            Sign.FAILURE, user(f"97150{number % users:07}"), tenant(number % tenants + 1), 0.0
        )
    assert told.gate.closed is closes


@pytest.mark.parametrize(
    ("sign", "opens"),
    [
        (Sign.SUCCESS, True),
        (Sign.ANSWER, True),
        (Sign.FAILURE, False),
        (Sign.NO_CONNECTION, False),
    ],
)
def test_what_opens_it(sign: Sign, opens: bool) -> None:
    told = Told()
    told.tell(*[Sign.NO_CONNECTION] * 3)
    told.tell(sign, now=5.0)
    assert told.gate.closed is not opens
    assert told.changes == ([True, False] if opens else [True])


def test_probes_come_after_1_2_4_up_to_30_seconds() -> None:
    told = Told()
    told.tell(*[Sign.NO_CONNECTION] * 3, now=100.0)
    now, waits = 100.0, []
    for _ in range(7):
        waits.append(told.gate.probe_in(now))
        now += waits[-1]
        told.gate.probing(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_after_an_opening_it_starts_from_nothing() -> None:
    told = Told()
    told.tell(*[Sign.NO_CONNECTION] * 3)
    told.gate.probing(1.0)
    told.tell(Sign.SUCCESS, now=2.0)
    told.tell(*[Sign.NO_CONNECTION] * 2, now=3.0)
    assert not told.gate.closed
    told.tell(Sign.NO_CONNECTION, now=4.0)
    assert told.gate.closed
    assert told.gate.probe_in(4.0) == 1.0


def test_it_knows_how_long_it_was_closed() -> None:
    told = Told()
    told.tell(*[Sign.NO_CONNECTION] * 3, now=10.0)
    told.tell(Sign.SUCCESS, now=20.0)
    told.tell(*[Sign.NO_CONNECTION] * 3, now=30.0)
    assert told.gate.seconds_closed(0.0, 35.0) == 15.0
    assert told.gate.seconds_closed(15.0, 35.0) == 10.0
    assert told.gate.seconds_closed(33.0, 35.0) == 2.0
    told.tell(Sign.SUCCESS, now=40.0)
    assert told.gate.seconds_closed(0.0, 100.0) == 20.0
