"""Whose delivery is next. The contract suite shows the rules; here are the corners of memory."""

from gateway.domain.model import Delivery
from gateway.store.files.scheduler import WINDOW, FairScheduler, Head
from tests.messages import tenant, user


def head(number: int, *, owner: int = 1, due: float = 0.0, body: bytes | None = None) -> Head:
    who = user(f"97150{number:07}")
    delivery = None
    if body is not None:
        delivery = Delivery(number, tenant(owner), who, None, "k", (), body, 1, 0, None, 0.0)
    return Head(number, tenant(owner), who, due, delivery)


def test_a_window_is_stored_and_the_rest_is_asked_for() -> None:
    shares = FairScheduler(1000, 1000)
    for number in range(WINDOW + 10):
        shares.offer(head(number), 0.0)
    assert shares.stale(0.0) == []
    assert len(shares.pick(1000)) == WINDOW
    assert shares.stale(0.0) == [tenant(1)]


def test_more_heads_than_the_window_holds_are_not_forgotten() -> None:
    """Two lines in flight that became one make room for a head beyond the window."""
    shares = FairScheduler(1000, 1000)
    shares.forget([tenant(1)])
    heads = [head(number) for number in range(WINDOW + 1)]
    shares.fetched(tenant(1), heads, more=False, next_due=float("inf"), now=0.0)
    assert len(shares.pick(1000)) == WINDOW
    assert shares.stale(0.0) == [tenant(1)]


def test_what_is_due_later_is_asked_for_then() -> None:
    shares = FairScheduler(10, 10)
    shares.offer(head(1, due=5.0), 0.0)
    shares.offer(head(2, due=7.0), 0.0)
    assert shares.pick(10) == []
    assert (shares.stale(4.9), shares.next_due()) == ([], 5.0)
    assert shares.stale(5.0) == [tenant(1)]
    shares.fetched(tenant(1), [head(1, due=5.0)], more=False, next_due=7.0, now=5.0)
    assert [one.id for one in shares.pick(10)] == [1]
    assert (shares.stale(6.9), shares.stale(7.0)) == ([], [tenant(1)])


def test_long_bodies_are_not_all_stored() -> None:
    shares = FairScheduler(1000, 1000)
    body = b"x" * (8 * 1024 * 1024)
    for number in range(10):
        shares.offer(head(number, body=body), 0.0)
    stored = [one for one in shares.pick(10) if one.delivery]
    assert len(stored) == 4, "32 MB"
    shares.offer(head(99, body=body), 0.0)
    assert shares.pick(1)[0].delivery, "what went has made room"


def test_a_line_in_flight_is_not_picked_twice() -> None:
    shares = FairScheduler(10, 10)
    shares.offer(head(1), 0.0)
    (first,) = shares.pick(10)
    shares.offer(Head(2, tenant(1), first.user, 0.0), 0.0)
    assert shares.pick(10) == []
    shares.release(1)
    shares.offer(Head(2, tenant(1), first.user, 0.0), 0.0)
    assert [one.id for one in shares.pick(10)] == [2]


def test_the_heap_does_not_grow_with_the_messages() -> None:
    shares = FairScheduler(10, 10)
    for number in range(10_000):
        shares.offer(head(number, owner=number % 3 + 1), 0.0)
        for one in shares.pick(1):
            shares.release(one.id)
    assert len(shares._heap) < 200
