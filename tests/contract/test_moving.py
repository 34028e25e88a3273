"""Migration: all of one store in another, of the same or the other kind."""

import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from gateway.domain.model import (
    DeadLettered,
    Delivered,
    IdentityLink,
    Outcome,
    Requeue,
    Retry,
    Selection,
    UnreadableReason,
)
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store import Store, open_store
from gateway.store.migration import migrate
from gateway.store.migration.files import FileContents
from gateway.store.migration.redis import RedisContents
from gateway.store.redis.scripts import Scripts
from tests.conftest import LIMITS
from tests.messages import by_the_rules, message, parse, user, webhook

PHONES = [f"97150000{number:04}" for number in range(12)]
LIDS = [f"15876432100000{number}@lid" for number in range(4)]


@pytest.fixture
def urls(tmp_path: Path, redis_socket: str) -> Callable[[str], str]:
    """A place for a store of that kind, empty at first."""
    with redis.Redis(unix_socket_path=redis_socket) as client:
        client.flushall()
    databases = iter(range(16))

    def place(kind: str) -> str:
        number = next(databases)
        if kind == "file":
            return f"file:{tmp_path / f'house{number}'}"
        return f"unix:{redis_socket}?db={number}"

    return place


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Store]:
    store = await open_store(url, LIMITS)
    try:
        yield store
    finally:
        await store.close()


async def live(store: Store, seed: int, steps: int = 200) -> None:
    """Some of everything, in two sessions."""
    dice, now = random.Random(seed), time.time()
    for step in range(steps):
        who, session = dice.choice(PHONES + LIDS), dice.choice(["default", "default", "sales"])
        id_ = user(who if session == "default" else f"sales/{who}")
        text = dice.choice(["hello", "", "\udce9 \U0001f3e0", f"start_realty_{dice.randint(1, 4)}"])
        match dice.choice(
            ["say"] * 12 + ["settle"] * 4 + ["unlock", "erase", "learn", "learn", "unreadable"]
        ):
            case "say":
                said = text.encode("utf-8", "replace").decode()
                sent = now - 90 + step / 2
                inbound = message(said, who, session=session, now=now, sent=sent)
                if dice.random() < 0.3:  # bytes that are no UTF-8
                    inbound = replace(inbound, body=inbound.body + b"\xff\xfe")
                await store.accept(inbound, by_the_rules(inbound, may_help=True))
            case "settle":
                for delivery in await store.claim(3, wait=0):
                    outcomes: list[Outcome] = [
                        Delivered(),
                        Retry(0.0, "500", poison=True, tried_at=now, age=3.5),
                        Retry(600.0, "500", poison=False, tried_at=now, age=1.0),
                        DeadLettered("refused", now, status=422, answer=b"\xff no"),
                        Requeue(now),
                    ]
                    await store.settle(delivery, dice.choice(outcomes))
            case "unreadable":
                body = webhook(None, who, session=session, sent=now, _data={})
                inbound = parse(body, now=now)
                await store.add_unreadable(inbound, UnreadableReason.NOT_DECRYPTED)
            case "unlock":
                await store.unlock(id_, drop_waiting=dice.random() < 0.5)
            case "erase":
                await store.erase(id_)
            case "learn":
                prefix = "" if session == "default" else "sales/"
                lid, phone = dice.choice(LIDS), dice.choice(PHONES)
                await store.link_identity(
                    IdentityLink(
                        user(prefix + lid), user(prefix + phone), now - 90 + step / 2, None
                    )
                )
    await store.note_heard({"default": now, "sales": now - 5})
    for user_, _ in (await store.help_waits())[:3]:
        await store.begin_help(user_)


async def seen_by_operators(store: Store) -> dict[str, Any]:
    """All that the Protocol shows, but for ids that each store gives itself."""
    found: dict[str, Any] = {
        "totals": store.totals(),
        "locks": (await store.locks(999, None)).locks,
    }
    for who in [f"{prefix}{one}" for prefix in ("", "sales/") for one in PHONES + LIDS]:
        export = await store.export(user(who))
        found[who] = (
            await store.lock_of(user(who)),
            [replace(line, id=0) for line in export.history],
            sorted(export.messages, key=lambda stored: (stored.where, stored.body)),
            replace(export, history=(), messages=()),
        )
    unreadable = await store.unreadable(limit=999)
    found["unreadable"] = sorted(
        (replace(one, id=0) for one in unreadable), key=lambda one: one.message_id or ""
    )
    letters = await store.dead_letters(Selection(), limit=999)
    bodies = [await store.dead_letter(letter.id) for letter in letters]
    found["letters"] = sorted(
        (replace(one, id=0) for one in bodies if one), key=lambda one: one.idempotency_key
    )
    found["help"] = await store.help_waits()
    found["tenants"] = await store.tenant_totals()
    found["backlog"] = await store.backlog()
    found["heard"] = await store.heard()
    found["lids"] = sorted(await store.held_lids())
    return found


async def drained(store: Store) -> dict[tuple[int, str], list[Any]]:
    """What each line delivers, in order."""
    await store.make_due()
    lines: dict[tuple[int, str], list[Any]] = {}
    while some := await store.claim(100, wait=0):
        for one in some:
            lines.setdefault((one.tenant, one.user), []).append(replace(one, id=0))
            await store.settle(one, Delivered())
    return lines


@pytest.mark.parametrize("kinds", [("file", "redis"), ("redis", "file"), ("file", "file"),
                                   ("redis", "redis")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_all_is_there_afterwards(
    urls: Callable[[str], str], kinds: tuple[str, str], seed: int
) -> None:
    source, target = map(urls, kinds)
    async with opened(source) as store:
        await live(store, seed)
        copy = message("hello", PHONES[0], bare_id="COPY", now=time.time())
        await store.accept(copy, by_the_rules(copy))
    async with opened(source) as store:  # counted anew, as it will be there
        before = await seen_by_operators(store)
    shown: list[str] = []
    counts = await migrate.migrate(
        source, target, show=lambda table, rows: shown.extend([table] * rows)
    )
    assert all(shown.count(name) == n for name, n in counts.items() if name != "tenant")
    assert all(counts.values()), "some of everything was carried"
    async with opened(target) as store:
        after = await seen_by_operators(store)
        again = await store.accept(copy, by_the_rules(copy))
    for name, facts in before.items():
        assert after[name] == facts, name
    assert again.decision is None, "a copy is known as one"


@pytest.mark.parametrize("seed", [4, 5])
async def test_there_and_back_every_queue_delivers_the_same_in_the_same_order(
    urls: Callable[[str], str], seed: int
) -> None:
    first, there, back = urls("file"), urls("redis"), urls("file")
    async with opened(first) as store:
        await live(store, seed)
    await migrate.migrate(first, there)
    await migrate.migrate(there, back)
    delivered = []
    for url in (first, there, back):
        if url != back:  # whoever wants to go on there must say so
            await migrate.reopen(url)
        async with opened(url) as store:
            delivered.append((await seen_by_operators(store), await drained(store)))
    assert delivered[0][1]
    assert delivered[0] == delivered[1] == delivered[2]


@pytest.fixture
async def source(urls: Callable[[str], str]) -> str:
    """A folder with a life behind it."""
    url = urls("file")
    async with opened(url) as store:
        await live(store, 9, steps=60)
    return url


@pytest.mark.parametrize("kind", ["file", "redis"])
async def test_a_move_that_broke_off_changes_nothing_and_is_done_again(
    urls: Callable[[str], str], source: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = FileContents if kind == "file" else RedisContents
    put, calls = contents.put, 0

    async def breaks(self: Any, table: str, rows: list[Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("no space left")
        await put(self, table, rows)

    target = urls(kind)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "put", breaks)
        with pytest.raises(StartRefused, match=r"broke off \(no space left\)"):
            await migrate.migrate(source, target)
    with pytest.raises(StartRefused, match="did not finish: run it again"):
        await open_store(target, LIMITS)
    with pytest.raises(StartRefused, match="did not finish"):
        await migrate.migrate(target, urls("file"))
    async with opened(source) as store:
        expected = await seen_by_operators(store)
    first = await migrate.migrate(source, target)
    assert await migrate.migrate(source, target) == first, "once more, and the same"
    async with opened(target) as store:
        assert await seen_by_operators(store) == expected


@pytest.mark.parametrize("kind", ["file", "redis"])
async def test_what_a_router_has_used_since_is_not_filled_again(
    urls: Callable[[str], str], source: str, kind: str
) -> None:
    target = urls(kind)
    await migrate.migrate(source, target)
    async with opened(target) as store:
        pass
    with pytest.raises(StartRefused, match=r"is not empty \(\d+ "):
        await migrate.migrate(source, target)
    async with opened(target) as store:
        assert store.totals()[0] > 0


@pytest.mark.parametrize("kind", ["file", "redis"])
async def test_what_has_left_is_no_routers_any_more(
    urls: Callable[[str], str], source: str, kind: str
) -> None:
    left = source
    if kind == "redis":
        left = urls("redis")
        await migrate.migrate(source, left)
    new = urls("file")
    await migrate.migrate(left, new)
    with pytest.raises(StartRefused, match=f"has been migrated to {new}"):
        await open_store(left, LIMITS)
    with pytest.raises(StartRefused, match="has been migrated away once"):
        await migrate.migrate(new, left)


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("kind", ["file", "redis"])
async def test_a_store_that_a_router_uses_is_not_moved(
    urls: Callable[[str], str], source: str, kind: str, role: str
) -> None:
    used = urls(kind)
    store = await open_store(used, LIMITS)
    ends = (used, urls("file")) if role == "source" else (source, used)
    try:
        with pytest.raises(StartRefused, match="router uses"):
            await migrate.migrate(*ends)
        inbound = message("start_realty_2")
        assert (await store.accept(inbound, by_the_rules(inbound))).decision
    finally:
        await store.close()
    await (await open_store(used, LIMITS)).close()


async def test_a_router_that_wakes_up_behind_a_move_promises_nothing(
    urls: Callable[[str], str], redis_socket: str
) -> None:
    """It was paused for longer than its lease, and the operator thought it dead."""
    left, new = urls("redis"), urls("file")
    paused = await open_store(left, LIMITS)
    inbound = message("start_realty_2")
    await paused.accept(inbound, by_the_rules(inbound))
    with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
        client.delete(*client.keys("gw:*:lease:*"))
    await migrate.migrate(left, new)
    late = message("hello")
    with pytest.raises(StoreUnavailable, match="has been migrated"):
        await paused.accept(late, by_the_rules(late))
    await paused.close()


async def test_a_router_that_wakes_up_behind_a_move_takes_in_no_new_session(
    urls: Callable[[str], str],
) -> None:
    left, new = urls("redis"), urls("file")
    paused = await open_store(left, LIMITS)
    with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
        client.delete(*client.keys("gw:*:lease:*"))
    await migrate.migrate(left, new)
    late = message("hello", session="sales")
    with pytest.raises(StoreUnavailable, match="has been migrated"):
        await paused.accept(late, by_the_rules(late))
    await paused.close()
    with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
        assert not client.keys("gw:{sales}*")
    await migrate.reopen(left)
    async with opened(left) as store:
        assert (await store.accept(late, by_the_rules(late))).decision is not None


async def test_seen_keys_that_end_during_a_move_do_not_spoil_it(urls: Callable[[str], str]) -> None:
    left, new = urls("redis"), urls("file")
    async with opened(left) as store:
        for number in range(5):
            inbound = message("start_realty_2", PHONES[number])
            await store.accept(inbound, by_the_rules(inbound))

    def end_one(_: object) -> None:
        with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
            client.delete(client.keys("gw:*:seen:*")[0])

    assert (await migrate.migrate(left, new, begin=end_one))["seen"] == 4


@pytest.mark.parametrize("kind", ["file", "redis"])
async def test_if_a_move_dies_at_its_last_step_neither_store_is_open(
    urls: Callable[[str], str], source: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else both would deliver the same."""

    async def dies(_: object) -> None:
        raise OSError("killed here")

    target = urls(kind)
    with monkeypatch.context() as patch:
        patch.setattr(FileContents if kind == "file" else RedisContents, "arrived", dies)
        with pytest.raises(StartRefused, match="killed here"):
            await migrate.migrate(source, target)
    for url in (source, target):
        with pytest.raises(StartRefused, match=r"has been migrated|did not finish"):
            await open_store(url, LIMITS)
    await migrate.migrate(source, target)
    async with opened(target) as store:
        assert store.totals()[0]


async def test_a_second_move_soon_after_one_that_was_killed_closes_it_again(
    urls: Callable[[str], str],
) -> None:
    left, new = urls("redis"), urls("file")
    async with opened(left) as store:
        inbound = message("start_realty_2")
        await store.accept(inbound, by_the_rules(inbound))
    with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
        client.set("gw:{~}:closed", "a migration, dead", ex=1)  # as the dead one left it
        with pytest.raises(StartRefused, match="another migration is under way, or was killed"):
            await migrate.migrate(left, new)
        assert client.get("gw:{~}:closed"), "which is the other one's to take away"
        client.delete("gw:{~}:closed")  # a minute later

        def seen_closed(_: object) -> None:
            assert client.ttl("gw:{~}:closed") > 30

        await migrate.migrate(left, new, begin=seen_closed)
        assert client.ttl("gw:{~}:closed") == -1, "for good now"


async def test_a_source_that_was_open_for_a_while_is_not_said_to_have_moved(
    urls: Callable[[str], str],
) -> None:
    left, new = urls("redis"), urls("file")
    async with opened(left) as store:
        inbound = message("start_realty_2")
        await store.accept(inbound, by_the_rules(inbound))

    def open_it(_: object) -> None:
        with redis.Redis.from_url(left.replace("unix:", "unix://")) as client:
            client.delete("gw:{~}:closed")  # as if it had ended while Redis was away

    with pytest.raises(
        StartRefused, match="a router may have begun there: run the migration again"
    ):
        await migrate.migrate(left, new, begin=open_it)
    with pytest.raises(StartRefused, match="did not finish"):
        await open_store(new, LIMITS)
    await migrate.migrate(left, new)


async def test_a_move_that_is_killed_while_it_looks_leaves_a_full_redis_alone(
    urls: Callable[[str], str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = urls("redis")
    async with opened(full) as store:
        inbound = message("start_realty_2")
        await store.accept(inbound, by_the_rules(inbound))

    class Killed(BaseException):
        pass

    async def dies(_: object) -> dict[str, int]:
        raise Killed

    with redis.Redis.from_url(full.replace("unix:", "unix://")) as client:
        with monkeypatch.context() as patch:
            patch.setattr(RedisContents, "counts", dies)
            with pytest.raises(Killed):
                await migrate.migrate(source, full)
        client.set("gw:moved", "looking", ex=60)  # nothing tidies up behind a kill -9
        with pytest.raises(StartRefused, match="is not empty"):
            await migrate.migrate(source, full)
        client.delete("gw:moved")  # a minute later
    async with opened(full) as store:
        assert store.totals() == (1, 1)


@pytest.mark.parametrize("query", ["?sentinel_password=SECRET", "?password=SECRET"])
async def test_no_password_is_shown_with_a_place(query: str) -> None:
    url = f"redis://me:SECRET@127.0.0.1:9/3{query}"
    scripts = Scripts(redis.asyncio.Redis(), committed=lambda _s, _n: None)
    assert RedisContents(scripts, url, as_source=True).place == "redis://127.0.0.1:9/3"


@pytest.mark.parametrize(
    ("ends", "reported"),
    [
        (("mongo:x", "file:y"), "mongo:…: must begin with file:"),
        (("file:/nowhere/at/all", "file:y"), "cannot be written|nothing to move"),
        (("unix:/nowhere.sock", "file:y"), "Redis does not answer"),
    ],
)
async def test_ends_that_are_none(
    ends: tuple[str, str], reported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartRefused, match=reported):
        await migrate.migrate(*ends)
    assert not list(tmp_path.iterdir())


async def test_ids_of_letters_are_not_given_twice_after_a_move(urls: Callable[[str], str]) -> None:
    """In SQLite only deliveries count them; a letter's may be the highest."""
    first, there, back = urls("file"), urls("redis"), urls("file")
    async with opened(first) as store:
        for number in range(3):
            inbound = message("start_realty_2", PHONES[number])
            await store.accept(inbound, by_the_rules(inbound))
        for delivery in await store.claim(9, wait=0):
            await store.settle(delivery, DeadLettered("refused", time.time()))
    await migrate.migrate(first, there)
    await migrate.migrate(there, back)
    async with opened(back) as store:
        inbound = message("hello", PHONES[0])
        await store.accept(inbound, by_the_rules(inbound))
        (fresh,) = await store.claim(9, wait=0)
        assert fresh.id > max(one.id for one in await store.dead_letters(Selection(), limit=9))
