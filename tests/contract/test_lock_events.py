"""Each change of a lock is one event, the same in every store."""

from typing import Any

from gateway.domain.lock_events import LockEvent
from gateway.domain.model import TenantId
from gateway.store import open_store
from tests.conftest import LIMITS
from tests.messages import ALI, LID, NOW, OMAR, by_the_rules, message, user


async def test_each_change_of_a_lock_is_one_event_under_the_names_of_the_history(
    store_url: str,
) -> None:
    events: list[LockEvent] = []
    store = await open_store(store_url, LIMITS, on_lock_event=events.append)

    async def say(text: str, who: str, **how: Any) -> None:
        inbound = message(text, who, **how)
        await store.accept(inbound, by_the_rules(inbound))

    await say("start_realty_2", ALI, sent=NOW - 30)
    await say("hello", ALI, sent=NOW - 19)
    await say("start_realty_2", ALI, sent=NOW - 18)
    await say("start_realty_3", ALI, sent=NOW - 17)
    await say("start_realty_2", ALI, sent=NOW - 40)  # an old one comes late
    await say("start_realty_4", LID, sent=NOW - 16)
    await say("hello", LID, other_id=ALI, sent=NOW - 15)
    await store.lock(user(OMAR), TenantId(5))
    await store.lock(user(OMAR), TenantId(6))
    await store.unlock(user(OMAR))
    await store.unlock(user(OMAR))  # there is none any more
    recorded = [*await store.history(user(ALI), limit=99)]
    recorded += await store.history(user(OMAR), limit=99)
    await store.move(TenantId(4), TenantId(7))  # reported as a whole
    await store.erase(user(ALI))
    await store.close()

    assert [(one.kind.value, one.why and one.why.value, one.to_tenant) for one in events] == [
        ("locked", "link", 2),
        ("confirmed", "link", 2),
        ("moved", "link", 3),
        ("stale", "link", 2),
        ("locked", "link", 4),
        ("merged", "merged_into", None),
        ("merged", "merged_from", 4),
        ("locked", "operator", 5),
        ("moved", "operator", 6),
        ("unlocked", "operator", None),
        ("erased", "operator", None),
    ]
    shown = [(one.at, one.user, one.kind, one.why, one.other) for one in recorded]
    assert sorted(shown, key=str) == sorted(
        (
            (one.at, one.user, one.kind.value, one.why and one.why.value, one.other)
            for one in events[:-1]
        ),
        key=str,
    )
