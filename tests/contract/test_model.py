"""A machine plays with the store at random and compares it with a small model.

The model knows people (a phone and a LID each), what was accepted for which tenant, and what is in
flight. It checks each claim: the right tenant, the oldest of its line, one at a time; and at the
end that everything accepted was delivered once.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.domain.model import (
    ALL_TENANTS,
    AskForLink,
    DeadLettered,
    Delivered,
    Delivery,
    IdentityLink,
    Outcome,
    Requeue,
    Retry,
    Selection,
    TenantId,
)
from gateway.errors import StoreUnavailable
from gateway.store import Store, open_store
from tests.conftest import LIMITS
from tests.messages import NOW, by_the_rules, message, user

PEOPLE = range(3)
SHOWN = ("phone", "lid", "both")
OUTCOMES: dict[str, Outcome] = {
    "done": Delivered(),
    "again": Retry(0.0, "no", poison=True, tried_at=NOW, age=1.0),
    "put back": Requeue(),
    "sent, put back": Requeue(sent_at=NOW),
    "dead": DeadLettered("refused", NOW),
}


@dataclass
class Copy:
    """An accepted message. place orders it in its line."""

    text: str
    person: int
    by: str  # the id it came under: "phone" or "lid"
    tenant: int
    place: tuple[float, int]

    @property
    def number(self) -> tuple[float, int]:
        """Dead letters come back in the order in which the store first took them."""
        return 0.0, self.place[1]


class Play(RuleBasedStateMachine):
    """fresh: makes an empty store and says where it is."""

    def __init__(self, fresh: Callable[[], str]) -> None:
        super().__init__()
        self.url = fresh()
        self.runner = asyncio.Runner()
        self.numbers = itertools.count(1)
        self.waiting: dict[str, Copy] = {}  # by text, in flight included
        self.in_flight: dict[str, Delivery] = {}
        self.dead: dict[str, Copy] = {}
        self.tried: set[str] = set()  # with an attempt that was counted
        self.ghosts: list[Delivery] = []  # in flight when their person was erased
        self.one_person: set[int] = set()  # of whom both ids were seen together
        self.store: Store = self.run(self.open())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 10))

    async def open(self) -> Store:
        return await open_store(self.url, LIMITS)

    def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Until the store takes it, as the courier does."""
        while True:
            with contextlib.suppress(StoreUnavailable):
                self.run(self.store.settle(delivery, outcome))
                return

    def line(self, sent: Copy) -> tuple[int, str, int]:
        return sent.person, "one" if sent.person in self.one_person else sent.by, sent.tenant

    @rule(
        person=st.sampled_from(PEOPLE),
        shown=st.sampled_from(SHOWN),
        link=st.sampled_from([0, 0, 1, 2, 3]),
        age=st.integers(0, 20),
        copies=st.sampled_from([1, 1, 1, 2]),
    )
    def somebody_writes(self, person: int, shown: str, link: int, age: int, copies: int) -> None:
        number = next(self.numbers)
        text = f"{f'start_realty_{link} ' if link else ''}#{number}"
        phone, lid = f"97150123450{person}", f"15876432100000{person}@lid"
        inbound = message(
            text,
            lid if shown == "lid" else phone,
            other_id=lid if shown == "both" else None,
            sent=NOW - age,
        )

        async def accept() -> Any:
            calls = [self.store.accept(inbound, by_the_rules(inbound)) for _ in range(copies)]
            return await asyncio.gather(*calls, return_exceptions=True)

        # Copies that were refused were not promised; of the others only the first is news.
        answers = [one for one in self.run(accept()) if not isinstance(one, StoreUnavailable)]
        if not answers:
            return
        first, *others = answers
        assert all(other.decision is None for other in others)
        if shown == "both":
            self.one_person.add(person)
        if not isinstance(first.decision, AskForLink):
            by = "lid" if shown == "lid" else "phone"
            place = (NOW - age, number)
            self.waiting[text] = Copy(text, person, by, first.decision.tenant, place)

    @rule(person=st.sampled_from(PEOPLE))
    def waha_says_whose_a_lid_is(self, person: int) -> None:
        phone, lid = user(f"97150123450{person}"), user(f"15876432100000{person}@lid")
        with contextlib.suppress(StoreUnavailable):
            self.run(self.store.link_identity(IdentityLink(lid, phone, NOW, asked=True)))
            self.one_person.add(person)

    @rule(limit=st.integers(1, 5), probe=st.booleans())
    def the_worker_claims(self, limit: int, probe: bool) -> None:
        whom = ALL_TENANTS if probe else None
        for delivery in self.run(self.store.claim(limit, wait=0, probe=whom)):
            text = json.loads(delivery.body)["payload"]["body"]
            sent = self.waiting[text]
            assert text not in self.in_flight
            assert delivery.tenant == sent.tenant
            line = [one for one in self.waiting.values() if self.line(one) == self.line(sent)]
            assert not any(one.text in self.in_flight for one in line), "one at a time"
            assert sent.place == min(one.place for one in line), "the oldest first"
            self.in_flight[text] = delivery

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), kind=st.sampled_from(["done", "done", *OUTCOMES]))
    def an_attempt_ends(self, data: st.DataObject, kind: str) -> None:
        text = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.settle(self.in_flight.pop(text), OUTCOMES[kind])
        if kind in ("again", "dead", "sent, put back"):
            self.tried.add(text)
        if kind == "dead":
            self.dead[text] = self.waiting[text]
        if kind in ("done", "dead"):
            del self.waiting[text]

    @rule(person=st.sampled_from(PEOPLE), drop=st.booleans())
    def an_operator_unlocks(self, person: int, drop: bool) -> None:
        phone = user(f"97150123450{person}")
        with contextlib.suppress(StoreUnavailable):
            _, _, dropped = self.run(self.store.unlock(phone, drop_waiting=drop))
            if drop:
                theirs = self.of_phone(person, self.waiting)
                gone = [text for text in theirs if text not in self.in_flight]
                assert dropped == len(gone)
                for text in gone:
                    self.dead[text] = self.waiting.pop(text)

    def of_phone(self, person: int, tenants: dict[str, Copy]) -> list[str]:
        """What came from the person under the phone, or under both once they are known as one."""
        known = "both" if person in self.one_person else "phone"
        return [
            text
            for text, one in tenants.items()
            if one.person == person and known in ("both", one.by)
        ]

    @rule(person=st.sampled_from(PEOPLE), tenant=st.integers(1, 3))
    def an_operator_locks(self, person: int, tenant: int) -> None:
        phone = user(f"97150123450{person}")
        with contextlib.suppress(StoreUnavailable):
            self.run(self.store.lock(phone, TenantId(tenant)))
            assert self.run(self.store.lock_of(phone))[1].tenant == tenant

    @rule(old=st.integers(1, 3), new=st.integers(1, 3), with_waiting=st.booleans())
    def an_operator_moves_a_tenant(self, old: int, new: int, with_waiting: bool) -> None:
        if old == new:
            return
        with contextlib.suppress(StoreUnavailable):
            _, along = self.run(
                self.store.move(TenantId(old), TenantId(new), with_waiting=with_waiting)
            )
            moved = [
                text
                for text, one in self.waiting.items()
                if with_waiting and one.tenant == old
                if text not in self.in_flight and text not in self.tried
            ]
            assert along == len(moved)
            for text in moved:
                self.waiting[text] = replace(self.waiting[text], tenant=new)

    @rule(person=st.sampled_from(PEOPLE))
    def an_operator_erases(self, person: int) -> None:
        phone = user(f"97150123450{person}")
        with contextlib.suppress(StoreUnavailable):
            _, erased = self.run(self.store.erase(phone))
            waiting, dead = (self.of_phone(person, stored) for stored in (self.waiting, self.dead))
            assert (erased.waiting, erased.dead_letters) == (len(waiting), len(dead))
            for text in waiting:
                del self.waiting[text]
                if in_flight := self.in_flight.pop(text, None):
                    self.ghosts.append(in_flight)
            for text in dead:
                del self.dead[text]
            self.one_person.discard(person)

    @precondition(lambda self: self.ghosts)
    @rule(kind=st.sampled_from(["done", "again", "put back", "dead"]))
    def an_attempt_of_who_was_erased_ends(self, kind: str) -> None:
        self.settle(self.ghosts.pop(), OUTCOMES[kind])

    @rule()
    def an_operator_replays(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            assert self.run(self.store.replay(Selection())) == len(self.dead)
            for text in sorted(self.dead, key=lambda text: self.dead[text].number):
                again = self.dead.pop(text)
                self.waiting[text] = replace(again, place=(time.time(), next(self.numbers)))

    @rule()
    def the_breaker_closes(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            self.run(self.store.make_due())

    @rule()
    def the_router_starts_again(self) -> None:
        self.run(self.store.close())
        self.in_flight.clear()
        self.ghosts.clear()
        self.store = self.run(self.open())

    @invariant()
    def the_backlog_is_what_waits(self) -> None:
        assert self.run(self.store.backlog()).waiting == len(self.waiting)

    def teardown(self) -> None:
        for delivery in [*self.in_flight.values(), *self.ghosts]:
            self.settle(delivery, Requeue())
        self.in_flight.clear()
        while self.waiting:
            before = len(self.waiting)
            self.the_worker_claims(100, False)
            for text, delivery in self.in_flight.items():
                self.settle(delivery, Delivered())
                del self.waiting[text]
            self.in_flight.clear()
            assert len(self.waiting) < before, f"never delivered: {list(self.waiting)}"
        self.run(self.store.close())
        self.runner.close()


def play(machine: type[Play], fresh: Callable[[], str], *, examples: int) -> None:
    run_state_machine_as_test(
        lambda: machine(fresh),  # type: ignore[arg-type]  # anything that makes one will do
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=40, deadline=None),
    )


@pytest.mark.parametrize("kind", ["file", "redis", "memory"])
def test_play(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    socket = request.getfixturevalue("redis_socket") if kind == "redis" else ""
    numbers = itertools.count()

    def fresh() -> str:
        if kind != "redis":
            return f"{kind}:{tmp_path / str(next(numbers))}"
        with redis.Redis(unix_socket_path=socket) as client:
            client.flushall()
        return f"unix:{socket}"

    play(Play, fresh, examples=60)
