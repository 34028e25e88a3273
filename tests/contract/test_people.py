"""Phones change hands, people change phones: what a person was locked to stays the person's.

A person is a LID here. Everybody writes by LID, at times with the phone shown; WAHA is asked, too,
and may answer late. Whatever happens to the phones, a lock goes with its LID, and what a person
wrote goes to the tenant of that lock.
"""

import asyncio
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.domain.model import Bind, Delivered, Forward, IdentityLink
from gateway.store import Store, open_store
from tests.conftest import LIMITS
from tests.messages import NOW, by_the_rules, message, user

LIDS = [f"15876432100000{n}@lid" for n in range(3)]
PHONES = [f"97150123450{n}" for n in range(3)]
WHO, PHONE = st.integers(0, 2), st.integers(0, 2)
STEPS = st.lists(
    st.tuples(st.just("writes"), WHO, PHONE | st.none(), st.integers(0, 3))
    | st.tuples(st.just("is looked up"), WHO, PHONE, st.integers(0, 5))
    | st.tuples(st.just("is delivered"), WHO, st.none(), st.just(0)),
    max_size=25,
)


async def play(store: Store, steps: list[tuple[str, int, int | None, int]]) -> None:
    locks: dict[int, int] = {}
    expected: dict[str, tuple[int, int]] = {}  # text → who wrote it, tenant
    delivered: list[str] = []

    async def deliver() -> None:
        while claimed := await store.claim(10, wait=0):
            for delivery in claimed:
                text = json.loads(delivery.body)["payload"]["body"]
                assert delivery.tenant == expected[text][1], text
                delivered.append(text)
                await store.settle(delivery, Delivered())

    for number, (what, who, phone, detail) in zip(itertools.count(1), steps):
        now = NOW + number
        match what:
            case "writes":
                text = f"{f'start_realty_{detail} ' if detail else ''}#{number}"
                shown = None if phone is None else PHONES[phone]
                inbound = message(text, LIDS[who], other_id=shown, sent=now, now=now)
                accepted = await store.accept(inbound, by_the_rules(inbound))
                if detail:
                    locks[who] = detail
                decision = accepted.decision
                goes_to = decision.tenant if isinstance(decision, Bind | Forward) else None
                assert goes_to == locks.get(who), text
                if goes_to is not None:
                    expected[text] = who, goes_to
            case "is looked up":
                assert phone is not None
                asked_at = now - detail  # the answer may come late
                identity_link = IdentityLink(
                    user(LIDS[who]), user(PHONES[phone]), asked_at, asked=True
                )
                await store.link_identity(identity_link)
            case _:
                await deliver()
        for one, locked_to in locks.items():
            assert (await store.lock_of(user(LIDS[one])))[1].tenant == locked_to
        assert store.totals()[0] == len(locks), "no lock is left behind, none is doubled"
    await deliver()
    assert sorted(delivered) == sorted(expected)
    for who in range(3):
        mine = [text for text in delivered if expected[text][0] == who]
        for tenant in range(1, 4):
            line = [text for text in mine if expected[text][1] == tenant]
            assert line == sorted(line, key=lambda text: int(text.rpartition("#")[2]))


@pytest.mark.parametrize("kind", ["file", "redis", "memory"])
def test_whatever_happens_to_the_phones_a_lock_stays_its_persons(
    kind: str, request: pytest.FixtureRequest
) -> None:
    socket = request.getfixturevalue("redis_socket") if kind == "redis" else ""

    @given(steps=STEPS)
    @settings(max_examples=150, deadline=None)
    def run(steps: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            url = f"{'file' if kind == 'redis' else kind}:{Path(folder) / 'data'}"
            if kind == "redis":
                url = f"unix:{socket}"
                with redis.Redis(unix_socket_path=socket) as client:
                    client.flushall()
            asyncio.run(played(url, steps))

    run()


async def played(url: str, steps: Any) -> None:
    store = await open_store(url, LIMITS)
    try:
        await play(store, steps)
    finally:
        await store.close()
