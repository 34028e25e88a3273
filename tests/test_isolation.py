"""Whatever is called in whatever order: a message reaches the tenant that its sender's lock named
when it was accepted, and no other.

A machine plays WAHA, a forger, the operator and a moody backend over the HTTP interface. What the
router answered to a webhook is the promise; the lock is followed in a small model of its own.
"""

import contextlib
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.clients import HOOK, client_of
from tests.messages import webhook

PEOPLE = ("971501234560", "971501234561", "158764321000002@lid")
people = st.sampled_from(PEOPLE)
tenants = st.sampled_from([1, 2, 3])
FORGED = {"X-Tenant-ID": "9", "X-User-ID": "971501234560", "Idempotency-Key": "0" * 32}


class Company(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.mood = 200
        self.lock: dict[str, int | None] = dict.fromkeys(PEOPLE)
        self.promised: dict[str, int] = {}  # text → tenant
        self.held: dict[str, str] = {}  # text → person without a lock
        self.arrived: list[tuple[str, str, int]] = []  # text, person, tenant
        self.numbers = itertools.count(1)
        # Each message is later than the one before, as a link acts only then.
        self.clock = time.time() - 100_000
        self.enter()

    def enter(self) -> None:
        self.company = contextlib.ExitStack()
        client = client_of(Path(self.folder.name), handler=self.backend)
        self.client = self.company.enter_context(client)

    def backend(self, request: httpx.Request) -> httpx.Response:
        if self.mood == 200:
            text = json.loads(request.content)["payload"]["body"]
            tenant = int(request.headers["X-Tenant-ID"])
            self.arrived.append((text, request.headers["X-User-ID"], tenant))
        return httpx.Response(self.mood)

    @rule(person=people, link=st.sampled_from([0, 0, 1, 2, 3]), forged=st.booleans())
    def somebody_writes(self, person: str, link: int, forged: bool) -> None:
        text = f"{f'start_realty_{link} ' if link else ''}#{next(self.numbers)}"
        self.clock += 2
        body = webhook(text, person, sent=self.clock)
        answer = self.client.post(HOOK, content=body, headers=FORGED if forged else {}).json()
        if link:
            self.lock[person] = link
            for held in [one for one, who in self.held.items() if who == person]:
                self.held.pop(held)  # written before the link: it may follow, or wait for good
                self.promised[held] = link
        if (tenant := self.lock[person]) is None:
            assert answer["status"] == "unknown_user"
            self.held[text] = person
        else:
            assert answer["tenant_id"] == tenant, "the answer names the lock's tenant"
            self.promised[text] = tenant

    @rule(person=people, tenant=tenants, age=st.integers(1, 50))
    def an_old_link_comes_late(self, person: str, tenant: int, age: int) -> None:
        if self.lock[person] is None or self.lock[person] == tenant:
            return
        text = f"start_realty_{tenant} #{next(self.numbers)}"
        body = webhook(text, person, sent=self.clock - 200_000 - age)
        answer = self.client.post(HOOK, content=body).json()
        assert answer["tenant_id"] == self.lock[person]
        self.promised[text] = answer["tenant_id"]

    @rule(person=people, waiting=st.sampled_from(["keep", "drop"]))
    def the_operator_unlocks(self, person: str, waiting: str) -> None:
        self.client.post(f"/router/unlock/{person}", params={"waiting": waiting})
        self.lock[person] = None
        self.clock = max(self.clock, time.time())  # only a newer link acts now

    @rule(what=st.sampled_from(["replay", "delete"]), tenant=tenants)
    def the_operator_sees_to_dead_letters(self, what: str, tenant: int) -> None:
        if what == "replay":
            self.client.post("/router/dead-letters/replay", params={"tenant": tenant})
            return
        found = self.client.get("/router/dead-letters", params={"tenant": tenant}).json()
        for letter in found["dead_letters"][:1]:
            assert letter["tenant_id"] == tenant
            self.client.delete(f"/router/dead-letters/{letter['id']}")

    @rule(mood=st.sampled_from([200, 200, 422, 500]))
    def the_backend_changes_its_mood(self, mood: int) -> None:
        self.mood = mood

    @rule()
    def the_router_starts_again(self) -> None:
        self.company.close()
        self.enter()

    @invariant()
    def nothing_reached_a_wrong_tenant(self) -> None:
        for text, person, tenant in list(self.arrived):
            assert person in PEOPLE
            assert self.promised.get(text) == tenant, f"{text} of {person} came to {tenant}"

    @invariant()
    def the_locks_are_those_of_the_model(self) -> None:
        stored = self.client.get("/router/stats").json()["mappings"]
        assert stored == {person: tenant for person, tenant in self.lock.items() if tenant}

    def teardown(self) -> None:
        try:
            self.what_waits_goes_to_its_tenant_too()
        finally:
            self.company.close()
            self.folder.cleanup()

    def what_waits_goes_to_its_tenant_too(self) -> None:
        """What waits out a backoff is not waited for."""
        self.mood = 200
        self.client.post("/router/dead-letters/replay", params={"all": "true"})
        for _ in range(40):
            if not self.client.get("/router/pending").json()["waiting"]:
                break
            time.sleep(0.005)
        self.nothing_reached_a_wrong_tenant()


TestCompany: Any = Company.TestCase
TestCompany.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)
