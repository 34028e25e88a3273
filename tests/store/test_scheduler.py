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
    scheduler = FairScheduler(1000, 1000)
    for number in range(WINDOW + 10):
        scheduler.offer(head(number), 0.0)
    assert scheduler.stale(0.0) == []
    assert len(scheduler.pick(1000)) == WINDOW
    assert scheduler.stale(0.0) == [tenant(1)]


def test_more_heads_than_the_window_holds_are_not_forgotten() -> None:
    """Two queues in flight that became one make room for a head beyond the window."""
    scheduler = FairScheduler(1000, 1000)
    scheduler.forget([tenant(1)])
    heads = [head(number) for number in range(WINDOW + 1)]
    scheduler.fetched(tenant(1), heads, more=False, next_due=float("inf"), now=0.0)
    assert len(scheduler.pick(1000)) == WINDOW
    assert scheduler.stale(0.0) == [tenant(1)]


def test_what_is_due_later_is_asked_for_then() -> None:
    scheduler = FairScheduler(10, 10)
    scheduler.offer(head(1, due=5.0), 0.0)
    scheduler.offer(head(2, due=7.0), 0.0)
    assert scheduler.pick(10) == []
    assert (scheduler.stale(4.9), scheduler.next_due()) == ([], 5.0)
    assert scheduler.stale(5.0) == [tenant(1)]
    scheduler.fetched(tenant(1), [head(1, due=5.0)], more=False, next_due=7.0, now=5.0)
    assert [one.id for one in scheduler.pick(10)] == [1]
    assert (scheduler.stale(6.9), scheduler.stale(7.0)) == ([], [tenant(1)])


def test_long_bodies_are_not_all_stored() -> None:
    scheduler = FairScheduler(1000, 1000)
    body = b"x" * (8 * 1024 * 1024)
    for number in range(10):
        scheduler.offer(head(number, body=body), 0.0)
    stored = [one for one in scheduler.pick(10) if one.delivery]
    assert len(stored) == 4, "32 MB"
    scheduler.offer(head(99, body=body), 0.0)
    assert scheduler.pick(1)[0].delivery, "what went has made room"


def test_a_queue_in_flight_is_not_picked_twice() -> None:
    scheduler = FairScheduler(10, 10)
    scheduler.offer(head(1), 0.0)
    (first,) = scheduler.pick(10)
    scheduler.offer(Head(2, tenant(1), first.user, 0.0), 0.0)
    assert scheduler.pick(10) == []
    scheduler.release(1)
    scheduler.offer(Head(2, tenant(1), first.user, 0.0), 0.0)
    assert [one.id for one in scheduler.pick(10)] == [2]


def test_the_heap_does_not_grow_with_the_messages() -> None:
    scheduler = FairScheduler(10, 10)
    for number in range(10_000):
        scheduler.offer(head(number, owner=number % 3 + 1), 0.0)
        for one in scheduler.pick(1):
            scheduler.release(one.id)
    assert len(scheduler._heap) < 200
