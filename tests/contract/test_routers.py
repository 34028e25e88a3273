"""Several routers on one Redis: what each of them does must be as if there were one."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway.domain.model import (
    Accepted,
    DeadLettered,
    Delivered,
    Delivery,
    Forward,
    IdentityLink,
    Requeue,
    Selection,
    UnreadableReason,
)
from gateway.errors import StoreUnavailable
from gateway.store import Limits, Store, open_store
from gateway.store.redis.store import RedisStore
from tests.conftest import LIMITS
from tests.e2e.redis import RedisServer
from tests.messages import ALI, NOW, OMAR, SARA, by_the_rules, message, tenant, user

Router = Callable[..., Awaitable[RedisStore]]


@pytest.fixture
def server(redis_socket: str) -> redis.Redis:
    """A look past the routers at their Redis, empty at first."""
    client = redis.Redis(unix_socket_path=redis_socket)
    client.flushall()
    return client


@pytest.fixture
async def router(redis_socket: str, server: redis.Redis) -> AsyncIterator[Router]:
    opened: list[Store] = []

    async def open_(limits: Limits = LIMITS) -> RedisStore:
        store = await open_store(f"unix:{redis_socket}", limits)
        assert isinstance(store, RedisStore)
        opened.append(store)
        return store

    yield open_
    for store in opened:
        await store.close()


async def say(store: Store, text: str, who: str = ALI, **how: object) -> Accepted:
    inbound = message(text, who, **how)  # type: ignore[arg-type]
    return await store.accept(inbound, by_the_rules(inbound))


async def claim(store: Store, limit: int = 100) -> list[Delivery]:
    return await store.claim(limit, wait=0)


def texts(deliveries: list[Delivery]) -> list[str]:
    return [json.loads(one.body)["payload"]["body"] for one in deliveries]


def end_leases(server: redis.Redis) -> None:
    """As if every router had been paused for longer than its lease."""
    for key in server.scan_iter("gw:*:lease:*"):
        server.delete(key)


async def test_of_one_webhook_at_two_routers_one_is_the_copy(router: Router) -> None:
    one, two = await router(), await router()
    for number in range(30):
        inbound = message("start_realty_2", f"97150000{number:04}", bare_id=f"A{number}")
        got = await asyncio.gather(
            *(store.accept(inbound, by_the_rules(inbound)) for store in (one, two))
        )
        assert sorted(answer.decision is None for answer in got) == [False, True]
    assert len(await claim(one) + await claim(two)) == 30


async def test_a_queue_is_in_flight_once_over_all_routers(router: Router) -> None:
    one, two = await router(), await router()
    for text in ("start_realty_2 a", "b", "c"):
        await say(one, text)
    (first,) = await claim(one)
    assert await claim(two) == []
    await one.settle(first, Delivered())
    (second,) = await claim(two)
    assert await claim(one) == []
    await two.settle(second, Delivered())
    (third,) = await claim(one)
    assert texts([first, second, third]) == ["start_realty_2 a", "b", "c"]


async def test_a_lock_made_at_one_router_counts_at_the_other(router: Router) -> None:
    one, two = await router(), await router()
    await say(one, "start_realty_2")
    assert (await say(two, "hello")).decision == Forward(tenant(2))
    await two.unlock(user(ALI))
    assert (await one.lock_of(user(ALI)))[1].tenant is None


async def test_a_session_that_another_router_made_known_may_not_vanish_either(
    router: Router, server: redis.Redis
) -> None:
    """In a cluster each session lies on a node of its own, which may come back empty."""
    one, other = await router(), await router()
    await say(one, "start_realty_2", session="sales")
    await other._renew_all()
    server.delete(*server.keys("gw:{sales}:*"))
    with pytest.raises(StoreUnavailable, match="came back empty"):
        await say(other, "hello", session="sales")
    assert server.keys("gw:{sales}:*") == []


async def test_the_cap_of_a_tenant_binds_over_all_routers(router: Router) -> None:
    limits = Limits(max_in_flight=4, max_in_flight_per_tenant=2, min_free_disk_bytes=0)
    one, two = await router(limits), await router(limits)
    for number in range(9):
        await say(one, "start_realty_2", f"97150000{number:04}")
    # Half of what both may have in flight is 4: until then the cap does not bind.
    assert len(await claim(one, 4) + await claim(two, 4)) == 4


async def test_what_a_dead_router_had_claimed_goes_to_another(
    router: Router, server: redis.Redis
) -> None:
    one, two = await router(), await router()
    await say(one, "start_realty_2")
    (taken,) = await claim(one)
    assert await claim(two) == []
    end_leases(server)
    await two._renew_all()
    (again,) = await claim(two)
    assert (again.id, again.idempotency_key, again.attempt) == (
        taken.id,
        taken.idempotency_key,
        1,
    )


async def test_who_lost_the_lease_may_not_send_and_is_not_heard(
    router: Router, server: redis.Redis
) -> None:
    """A router that was paused comes back, and another one has its claims."""
    one, two = await router(), await router()
    await say(one, "start_realty_2 a")
    await say(one, "b")
    (taken,) = await claim(one)
    assert one.may_send(taken)
    end_leases(server)
    await two._renew_all()
    (again,) = await claim(two)
    await one._renew_all()  # a new lease, which is not that of the claim
    assert not one.may_send(taken)
    await one.settle(taken, DeadLettered("refused", NOW))
    assert await one.dead_letters(Selection(), limit=10) == []
    assert two.may_send(again)
    assert await claim(one) == [], "the line is the other one's"
    await two.settle(again, Delivered())
    assert texts(await claim(one)) == ["b"]


async def test_a_lease_that_is_about_to_end_is_not_sent_under(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await router()
    await say(store, "start_realty_2")
    (taken,) = await claim(store)
    for lease in store._leases.values():
        lease.until -= 14.5
    assert not store.may_send(taken)
    await store._renew_all()
    assert store.may_send(taken), "it was renewed in time"


async def test_flushed_scripts_are_sent_again(router: Router, server: redis.Redis) -> None:
    store = await router()
    await say(store, "start_realty_2")
    server.script_flush()
    assert (await say(store, "hello")).decision == Forward(tenant(2))


async def test_two_sessions_have_locks_and_letters_of_their_own(router: Router) -> None:
    one, two = await router(), await router()
    await say(one, "start_realty_2")
    await say(two, "start_realty_3", session="sales")
    await one._renew_all()
    for delivery in await claim(one):
        await one.settle(delivery, DeadLettered("refused", NOW))
    letters = await one.dead_letters(Selection(), limit=10)
    assert sorted(one.tenant for one in letters) == [2, 3]
    assert len({one.id for one in letters}) == 2
    assert await one.replay(Selection(id=letters[0].id)) == 1
    assert len(await two.dead_letters(Selection(), limit=10)) == 1


async def test_a_cancelled_caller_leaves_its_answer_to_nobody(router: Router) -> None:
    """redis-py once gave it to the next one on the same connection."""
    store = await router()
    people = [ALI, SARA, OMAR]
    for number, who in enumerate(people):
        await say(store, f"start_realty_{number + 1}", who)
    dice = random.Random(7)

    async def look(who: str) -> None:
        for _ in range(20):
            known, lock = await store.lock_of(user(who))
            assert (known, lock.tenant) == (who, people.index(who) + 1)

    async def be_cancelled(who: str) -> None:
        task = asyncio.create_task(look(who))
        await asyncio.sleep(dice.random() / 200)
        task.cancel()

    await asyncio.gather(*(be_cancelled(people[n % 3]) for n in range(60)),
                         *(look(who) for who in people))  # fmt: skip


async def test_what_is_put_back_by_one_goes_to_another(router: Router) -> None:
    one, two = await router(), await router()
    await say(one, "start_realty_2")
    (taken,) = await claim(one)
    await one.settle(taken, Requeue())
    assert texts(await claim(two)) == ["start_realty_2"]


async def test_a_claim_whose_answer_was_lost_is_free_again(router: Router) -> None:
    """The lease is renewed all the while: without a look it would be claimed for good."""
    store = await router()
    await say(store, "start_realty_2")
    taken = await claim(store)
    store._claims.clear()  # as if the answer had never come
    for _ in range(2):
        assert await claim(store) == []
        await store._renew_all()
    assert [one.id for one in await claim(store)] == [one.id for one in taken]
    for _ in range(3):
        await store._renew_all()
    assert await claim(store) == [], "what is known stays claimed"


async def test_of_sessions_that_are_full_one_keeps_health_red_until_there_is_room(
    router: Router,
) -> None:
    store = await router(Limits(max_backlog=2, min_free_disk_bytes=0))
    for session in ("default", "sales"):
        for number in range(2):
            await say(store, "start_realty_2", f"97150000{number:04}", session=session)
    with pytest.raises(StoreUnavailable, match="MAX_BACKLOG=2"):
        await say(store, "start_realty_2", OMAR, session="sales")
    assert store.health().refusing
    for delivery in await claim(store):
        if delivery.user.startswith("sales/"):
            await store.settle(delivery, Delivered())
    assert store.health().refusing is None
    assert (await say(store, "start_realty_2", OMAR, session="sales")).decision


async def test_an_operation_that_fails_fails_alone(router: Router) -> None:
    store = await router()
    await say(store, "start_realty_2")
    odd = asyncio.create_task(store._scripts.run("~", "no such operation"))
    _, lock = await store.lock_of(user(ALI))  # in the same call
    assert lock.tenant == 2
    with pytest.raises(StoreUnavailable):
        await odd
    assert store.health().refusing is None, "the store is well"


async def test_what_is_in_flight_does_not_settle_what_got_its_id_after_a_take_over(
    tmp_path: Path,
) -> None:
    """A replica that lacks the last messages takes over: ids are given once more."""
    server = RedisServer(tmp_path / "redis").start()
    store = await open_store(server.url, LIMITS)
    await say(store, "start_realty_2", OMAR)
    for delivery in await claim(store):
        await store.settle(delivery, Delivered())
    server.save_log(tmp_path / "earlier")
    await say(store, "start_realty_2", ALI)
    (old,) = await claim(store)
    server.kill()
    server.put_log_back(tmp_path / "earlier")
    await asyncio.to_thread(server.start)
    while True:
        with contextlib.suppress(StoreUnavailable):
            await say(store, "start_realty_5", SARA)
            break
    (new,) = await claim(store)
    assert old.id == new.id
    assert not store.may_send(old)
    await store.settle(old, Delivered())
    assert (await store.backlog()).waiting == 1, "it was not the new one that was done"
    assert store.may_send(new)
    await store.settle(new, Delivered())
    assert (await store.backlog()).waiting == 0
    await store.close()
    server.stop()


async def test_a_redis_without_memory_refuses_webhooks_and_delivers_all_the_same(
    tmp_path: Path,
) -> None:
    server = RedisServer(tmp_path / "redis").start()
    store = await open_store(server.url, LIMITS)
    for number in range(20):
        await say(store, "start_realty_2", f"97150000{number:04}")
    await say(store, "start_realty_2", ALI)
    await say(store, "known from now on", ALI)  # so that accepting takes one step
    with server.client() as look:
        look.set("filler", b"x" * 5_000_000)
        look.config_set("maxmemory", 2_000_000)
    claimed, refused = await asyncio.gather(
        claim(store, 5), say(store, "hello", ALI), return_exceptions=True
    )  # in one call
    assert isinstance(refused, StoreUnavailable)
    assert isinstance(claimed, list)
    while claimed:
        for delivery in claimed:
            await store.settle(delivery, Delivered())
        claimed = await claim(store)
    assert (await store.backlog()).waiting == 0
    another = await open_store(server.url, LIMITS)  # which needs a lease
    await another.close()
    await store.close()
    server.stop()


async def test_what_one_session_gave_is_sent_though_redis_fails_at_the_next(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await router()
    await say(store, "start_realty_2")
    await say(store, "start_realty_2", SARA, session="zz")
    claim_of, calls = store._claim_of, 0

    async def fails_at_the_second(*args: Any, **how: Any) -> tuple[list[Delivery], float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StoreUnavailable("Redis is away")
        return await claim_of(*args, **how)

    monkeypatch.setattr(store, "_claim_of", fails_at_the_second)
    assert len(await claim(store)) == 1
    assert len(await claim(store)) == 1


async def test_a_text_by_phone_does_not_overtake_a_link_by_lid(router: Router) -> None:
    store = await router()
    for number in range(10):
        phone, lid = f"97150000{number:04}", f"15876432100{number:04}@lid"
        await store.link_identity(IdentityLink(user(lid), user(phone), NOW - 100, None))
        await say(store, "start_realty_2", phone, sent=NOW - 50)
        await say(store, "known", phone, sent=NOW - 40)
        link = asyncio.create_task(say(store, "start_realty_3", lid, sent=NOW - 20))
        await asyncio.sleep(0)
        said = await say(store, "for tenant 3", phone, sent=NOW - 10)
        assert said.decision == Forward(tenant(3))
        await link


async def test_of_many_who_were_never_served_the_oldest_is_first(router: Router) -> None:
    store = await router()
    for number in range(150):
        how = {"now": NOW - 1000} if number == 149 else {}
        await say(store, f"start_realty_{number + 1}", f"97150000{number:04}", **how)
    assert [one.tenant for one in await claim(store, 1)] == [150]


async def test_connections_that_are_cut_are_made_again(router: Router, server: redis.Redis) -> None:
    store = await router()
    await say(store, "start_realty_2")
    for number in range(20):
        server.client_kill_filter(_type="normal", skipme=True)
        while True:
            with contextlib.suppress(StoreUnavailable):  # WAHA would repeat it
                said = await say(store, f"text {number}", bare_id=f"B{number}")
                break
        assert said.decision in (Forward(tenant(2)), None)
    assert (await store.backlog()).waiting == 21


@pytest.mark.parametrize(
    "text", ["hello", "start_realty_3", "start_realty_2", "quotes start_realty_9"]
)
async def test_a_dry_run_leaves_every_key_as_it_was(
    router: Router, server: redis.Redis, text: str
) -> None:
    store = await router()
    await say(store, "start_realty_2", "158764321000005@lid")
    await say(store, "held", now=time.time())
    await say(store, "start_realty_3", SARA)
    for who, other in ((ALI, None), (SARA, None), (ALI, "158764321000005@lid")):
        inbound = message(text, who, other_id=other, sent=NOW + 9, raised=NOW + 9)
        before = everything(server)
        await store.dry_run(inbound, by_the_rules(inbound, may_help=True))
        assert everything(server) == before


def everything(server: redis.Redis) -> dict[bytes, Any]:
    """All that the routers keep, but for their leases."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"hash": server.hgetall,
        b"zset": lambda key: server.zrange(key, 0, -1, withscores=True),
        b"set": server.smembers,
        b"list": lambda key: server.lrange(key, 0, -1),
        b"string": server.get,
    }
    keys = [key for key in server.scan_iter() if b":lease" not in key]
    return {key: readers[bytes(server.type(key))](key) for key in keys}  # type: ignore[arg-type]


# what changes between two calls of one operation


def before_call(
    monkeypatch: pytest.MonkeyPatch, store: RedisStore, name: str, number: int
) -> Callable[[Callable[[], Awaitable[Any]]], None]:
    """Return what takes the work to be done right before that call of store's scripts."""
    real, calls = getattr(store._scripts, name), 0

    def set_up(work: Callable[[], Awaitable[Any]]) -> None:
        async def with_work(*args: Any, **how: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                await work()
            return await real(*args, **how)

        monkeypatch.setattr(store._scripts, name, with_work)

    return set_up


LID = "158764321000005@lid"


@pytest.mark.parametrize("action", ["lock", "erase", "accept"])
async def test_a_pair_that_changes_while_it_is_read_hides_nobody(
    router: Router, server: redis.Redis, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """The other id was never read: its lock stayed behind, and the counters went astray."""
    store, other = await router(), await router()
    await store.link_identity(IdentityLink(user(LID), user(ALI), NOW - 100, None))
    await store.lock(user(SARA), tenant(7))
    link = IdentityLink(user(LID), user(SARA), NOW - 50, None)
    before_call(monkeypatch, store, "transact", 2)(lambda: other.link_identity(link))
    if action == "lock":
        assert (await store.lock(user(LID), tenant(3)))[:2] == (SARA, 7)
        assert server.hgetall("gw:{~}:owners") == {b"3": b"1"}
        assert server.zrange("gw:{~}:of:7", 0, -1) == []
    elif action == "accept":
        assert (await say(store, "hello", LID)).decision == Forward(tenant(7))
    else:
        ids, erased = await store.erase(user(LID))
        assert (set(ids), erased.locks) == ({user(SARA), user(LID)}, 1)
        assert SARA.encode() not in b" ".join(server.scan_iter())
        assert server.exists("gw:{~}:lock", "gw:{~}:users", "gw:{~}:of:7") == 0


async def test_what_is_held_while_older_messages_end_stays(
    router: Router, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 of 400 messages that had just been accepted were deleted with the old ones."""
    store, other = await router(), await router()
    now = store.now()
    await say(store, "old", now=now - 1000, sent=now - 1000, raised=now - 1000)
    before_call(monkeypatch, store, "transact", 1)(lambda: say(other, "new", now=now, sent=now))
    await store._sweep()
    assert (await store.backlog()).held == 1
    assert (await store.lock(user(ALI), tenant(2)))[2] == 1
    (delivery,) = await claim(store)
    assert b'"new"' in delivery.body
    assert server.exists("gw:{~}:held_since", "gw:{~}:held_body") == 0


async def test_each_held_message_ends_by_itself(router: Router, server: redis.Redis) -> None:
    """The first kept its slot for as long as the user went on writing."""
    store = await router()
    now = store.now()
    for text, age in (("old", 1000), ("new", 10), ("newer", 5)):
        await say(store, text, now=now - age, sent=now - age, raised=now - age)
    await store._sweep()
    assert (await store.backlog()).held == 2
    assert server.zscore("gw:{~}:held_since", ALI) == pytest.approx(now - 10)
    assert (await store.lock(user(ALI), tenant(2)))[2] == 2


async def test_what_is_stored_of_a_person_and_a_key_ends(
    router: Router, server: redis.Redis
) -> None:
    store = await router()
    inbound = message("hello", bare_id="B1")
    await store.accept(inbound, by_the_rules(inbound, may_help=True))
    (key,) = server.scan_iter("gw:{~}:seen:*")
    assert 48 * 3600 < server.ttl(key) <= 72 * 3600
    await store._sweep()
    assert server.hexists("gw:{~}:person", ALI), "it counts for as long as the cool-down"
    server.zadd("gw:{~}:person_updated", {ALI: 1.0})
    await store._sweep()
    assert server.exists("gw:{~}:person", "gw:{~}:person_updated", "gw:{~}:help_waits") == 0


async def test_unreadable_messages_that_come_at_once_have_numbers_of_their_own(
    router: Router,
) -> None:
    one, other = await router(), await router()
    reason = UnreadableReason.NO_CHAT
    some = [message(f"{n}", bare_id=f"B{n}") for n in range(20)]
    await asyncio.gather(
        *(store.add_unreadable(each, reason) for each in some for store in (one, other))
    )
    found = await one.unreadable(limit=100)
    assert len(found) == len({each.id for each in found}) == 20


@pytest.mark.parametrize("erased_as", [ALI, LID])
async def test_nothing_names_who_was_erased(
    router: Router, server: redis.Redis, erased_as: str
) -> None:
    """All kinds of what can be stored of a person, under both ids, and before they were one."""
    store = await router()
    before = "158764321000099@lid"
    await say(store, "start_realty_4", before, bare_id="B1")
    await say(store, "x", before, other_id=ALI, bare_id="B2", raised=NOW - 90, sent=NOW - 90)
    await say(store, "start_realty_2", LID, bare_id="B3")
    await say(store, "x", LID, other_id=ALI, bare_id="B4", raised=NOW - 50, sent=NOW - 50)
    await say(store, "start_realty_3", ALI, bare_id="B5")
    dies = DeadLettered("refused", time.time(), 400, b"")
    for turn in range(2):  # the one before is another person: what it wrote is delivered
        for one in await store.claim(9, wait=0):
            await store.settle(one, Delivered() if turn or one.user == before else dies)
    await say(store, "waits", ALI, bare_id="B8", raised=NOW - 10, sent=NOW - 10)
    inbound = message("who are you?", ALI, bare_id="B6")
    await store.add_unreadable(inbound, UnreadableReason.NO_CHAT)
    await store.unlock(user(ALI))
    asks = message("hello", ALI, bare_id="B7", now=time.time())
    await store.accept(asks, by_the_rules(asks, may_help=True))
    await store.erase(user(erased_as))
    text = repr(everything(server))
    assert ALI not in text
    assert LID not in text


async def test_a_dead_letter_that_comes_while_its_person_is_erased_is_erased(
    router: Router, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = await router(), await router()
    await say(other, "start_realty_2")
    (delivery,) = await claim(other)
    dies = DeadLettered("refused", time.time(), 400, b"")
    before_call(monkeypatch, store, "transact", 2)(lambda: other.settle(delivery, dies))
    _, erased = await store.erase(user(ALI))
    assert erased.dead_letters == 1
    assert not [key for key in server.scan_iter("gw:*") if b":x:" in key or ALI.encode() in key]


@pytest.mark.parametrize("of", ["all", "tenant"])
async def test_a_page_of_locks_is_full_though_some_are_taken_away_meanwhile(
    router: Router, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    store, other = await router(), await router()
    users = [f"97150000{number:04}" for number in range(20)]
    for who in users:
        await store.lock(user(who), tenant(2))
    before_call(monkeypatch, store, "read", 2)(lambda: other.unlock(user(users[3])))
    if of == "all":
        page = await store.locks(5, None)
        assert (len(page.locks), page.next) == (5, users[5])
    else:
        found, last = await store.users_of(tenant(2), 5, None)
        assert (len(found), last) == (5, users[5])


async def test_a_record_that_is_written_while_old_ones_end_stays(
    router: Router, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = await router(), await router()

    async def ask(who: Store) -> None:
        inbound = message("hello", now=store.now(), sent=store.now(), bare_id=str(time.time()))
        await who.accept(inbound, by_the_rules(inbound, may_help=True))

    await ask(store)
    server.zadd("gw:{~}:person_updated", {ALI: 1.0})
    server.hset("gw:{~}:person", ALI, '{"help_queued_at": 1.0, "help_sent_at": 1.0}')
    before_call(monkeypatch, store, "transact", 1)(lambda: ask(other))
    await store._expire_records("~")
    assert [who for who, _ in await store.help_waits()] == [ALI]


async def test_a_session_that_many_ask_for_at_once_has_one_lease(
    router: Router, server: redis.Redis
) -> None:
    store = await router()
    await asyncio.gather(
        *(say(store, "start_realty_2", f"97150000{n:04}", session="new") for n in range(20))
    )
    assert len(list(server.scan_iter("gw:{new}:lease:*"))) == 1
