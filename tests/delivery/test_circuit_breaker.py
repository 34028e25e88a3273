"""When the circuit breaker opens, probes and closes. Times are handed in."""

import pytest

from gateway.delivery.circuit_breaker import CircuitBreaker, Signal
from tests.messages import tenant, user


class Recorded:
    def __init__(self) -> None:
        self.changes: list[bool] = []
        self.breaker = CircuitBreaker(self.changes.append)

    def record(self, *signals: Signal, now: float = 0.0) -> None:
        """Each signal comes from another user and another tenant."""
        for number, signal in enumerate(signals):
            self.breaker.record(signal, user(f"97150{number:07}"), tenant(number % 5 + 1), now)


@pytest.mark.parametrize(
    ("signals", "opens"),
    [
        ([Signal.NO_CONNECTION] * 3, True),
        ([Signal.NO_CONNECTION] * 2, False),
        ([Signal.NO_CONNECTION] * 2 + [Signal.SUCCESS] + [Signal.NO_CONNECTION] * 2, False),
        ([Signal.NO_CONNECTION] * 2 + [Signal.FAILURE] + [Signal.NO_CONNECTION] * 2, False),
        ([Signal.NO_CONNECTION] * 2 + [Signal.ANSWER] + [Signal.NO_CONNECTION] * 2, False),
        ([Signal.FAILURE] * 10, True),
        ([Signal.FAILURE] * 9 + [Signal.ANSWER] + [Signal.FAILURE], True),
        ([Signal.FAILURE] * 9, False),
        ([Signal.FAILURE] * 9 + [Signal.SUCCESS] + [Signal.FAILURE] * 9, False),
        ([Signal.ANSWER] * 50, False),
    ],
)
def test_what_opens_it(signals: list[Signal], opens: bool) -> None:
    recorded = Recorded()
    recorded.record(*signals)
    assert recorded.breaker.is_open is opens
    assert recorded.changes == ([True] if opens else [])


@pytest.mark.parametrize(
    ("users", "tenants", "opens"), [(3, 2, True), (2, 2, False), (9, 1, False)]
)
def test_one_tenants_failures_stop_nobody_else(users: int, tenants: int, opens: bool) -> None:
    recorded = Recorded()
    for number in range(40):
        recorded.breaker.record(
            Signal.FAILURE, user(f"97150{number % users:07}"), tenant(number % tenants + 1), 0.0
        )
    assert recorded.breaker.is_open is opens


@pytest.mark.parametrize(
    ("signal", "closes"),
    [
        (Signal.SUCCESS, True),
        (Signal.ANSWER, True),
        (Signal.FAILURE, False),
        (Signal.NO_CONNECTION, False),
    ],
)
def test_what_opensit(signal: Signal, closes: bool) -> None:
    recorded = Recorded()
    recorded.record(*[Signal.NO_CONNECTION] * 3)
    recorded.record(signal, now=5.0)
    assert recorded.breaker.is_open is not closes
    assert recorded.changes == ([True, False] if closes else [True])


def test_probes_come_after_1_2_4_up_to_30_seconds() -> None:
    recorded = Recorded()
    recorded.record(*[Signal.NO_CONNECTION] * 3, now=100.0)
    now, waits = 100.0, []
    for _ in range(7):
        waits.append(recorded.breaker.seconds_to_probe(now))
        now += waits[-1]
        recorded.breaker.start_probe(now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_after_closing_it_starts_from_nothing() -> None:
    recorded = Recorded()
    recorded.record(*[Signal.NO_CONNECTION] * 3)
    recorded.breaker.start_probe(1.0)
    recorded.record(Signal.SUCCESS, now=2.0)
    recorded.record(*[Signal.NO_CONNECTION] * 2, now=3.0)
    assert not recorded.breaker.is_open
    recorded.record(Signal.NO_CONNECTION, now=4.0)
    assert recorded.breaker.is_open
    assert recorded.breaker.seconds_to_probe(4.0) == 1.0


def test_it_knows_how_long_it_was_open() -> None:
    recorded = Recorded()
    recorded.record(*[Signal.NO_CONNECTION] * 3, now=10.0)
    recorded.record(Signal.SUCCESS, now=20.0)
    recorded.record(*[Signal.NO_CONNECTION] * 3, now=30.0)
    assert recorded.breaker.seconds_open(0.0, 35.0) == 15.0
    assert recorded.breaker.seconds_open(15.0, 35.0) == 10.0
    assert recorded.breaker.seconds_open(33.0, 35.0) == 2.0
    recorded.record(Signal.SUCCESS, now=40.0)
    assert recorded.breaker.seconds_open(0.0, 100.0) == 20.0
