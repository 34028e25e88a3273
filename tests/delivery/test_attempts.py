"""Whose fault a failure is, and when a backoff ends early: by tenant."""

from gateway.delivery import attempts as attempts_module
from gateway.delivery.attempts import Attempts
from gateway.domain.model import ALL_TENANTS, TenantFilter
from tests.messages import tenant

TWO, THREE = tenant(2), tenant(3)


def fail(attempts: Attempts, at: float, *, retry_after: float | None = None) -> None:
    attempts.failed(TWO, at, "http://backend: 500", retry_after=retry_after)


def test_only_what_the_same_tenant_got_through_makes_a_failure_ones_own() -> None:
    attempts = Attempts()
    assert not attempts.any_got_through(TWO, 0.0)
    attempts.succeeded(THREE, 10.0)
    assert not attempts.any_got_through(TWO, 5.0)
    attempts.succeeded(TWO, 10.0)
    assert attempts.any_got_through(TWO, 5.0)
    assert not attempts.any_got_through(TWO, 10.0)


def test_backoffs_end_when_a_tenant_that_failed_works_again() -> None:
    attempts = Attempts()
    assert not attempts.succeeded(TWO, 1.0), "nothing had failed"
    fail(attempts, 2.0)
    assert not attempts.succeeded(THREE, 3.0), "another tenant says nothing"
    assert attempts.succeeded(TWO, 3.0)
    assert not attempts.succeeded(TWO, 5.0), "they have ended"
    fail(attempts, 6.0)
    assert attempts.succeeded(TWO, 7.0)
    fail(attempts, 7.1)
    assert not attempts.succeeded(TWO, 7.2), "no more than once a second"
    assert attempts.succeeded(TWO, 8.2), "but then"


def test_a_retry_after_holds_whatever_gets_through() -> None:
    attempts = Attempts()
    fail(attempts, 2.0, retry_after=600.0)
    fail(attempts, 3.0)
    assert not attempts.succeeded(TWO, 601.0)
    assert attempts.succeeded(TWO, 602.5)


def test_many_failures_in_a_row_are_reported_the_worst_first() -> None:
    attempts = Attempts()
    for number in range(5):
        fail(attempts, number)
        for _ in range(2):
            attempts.failed(THREE, number, "why", retry_after=None)
    assert [(one.tenant, one.failures) for one in attempts.failing()] == [(3, 10), (2, 5)]
    attempts.succeeded(THREE, 9.0)
    assert [one.tenant for one in attempts.failing()] == [2]


def test_no_end_of_tenants_is_remembered() -> None:
    attempts = Attempts()
    for number in range(attempts_module._MOST_TENANTS + 50):
        attempts.succeeded(tenant(number + 1), 1.0)
    assert len(attempts._records) == attempts_module._MOST_TENANTS
    assert not attempts.any_got_through(tenant(1), 0.0)


def test_who_was_asked_to_wait_waits_though_the_breaker_closes() -> None:
    attempts = Attempts()
    attempts.failed(TWO, 1.0, "429", retry_after=600.0, was_there=True)
    attempts.failed(THREE, 1.0, "503", retry_after=600.0)
    assert attempts.asked_to_wait(2.0) == {2}
    assert ALL_TENANTS.without(attempts.asked_to_wait(2.0)) == TenantFilter(frozenset({TWO}))
    assert TenantFilter(frozenset({TWO, THREE}), others=False).without({TWO}) == TenantFilter(
        frozenset({THREE}), others=False
    )
    assert attempts.asked_to_wait(601.5) == frozenset()
