"""What runs on the failing disk: python -m tests.faults.scenario FOLDER

Locks, moves and unlocks a few users and delivers some of their messages, trying again whatever is
refused, and prints a JSON line for each thing that was promised. The first line says that the start
succeeded.
"""

import asyncio
import functools
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from gateway.domain.model import Delivered
from gateway.errors import StartRefused, StoreUnavailable
from gateway.store import Store, open_store
from tests.conftest import LIMITS
from tests.messages import NOW, by_the_rules, message, user

T = TypeVar("T")


def promise(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()  # one call for one promise


async def again(work: Callable[[], Awaitable[T]]) -> T:
    for _ in range(20):
        try:
            return await work()
        except StoreUnavailable:
            await asyncio.sleep(0.002)
    raise SystemExit("refused twenty times")


async def say(store: Store, who: str, text: str, sent: float) -> None:
    inbound = message(text, who, sent=sent, bare_id=f"{who}{text}")
    accepted = await again(lambda: store.accept(inbound, by_the_rules(inbound)))
    decision = accepted.decision
    # A copy may be the first that was kept: the promise is the same.
    promise(user=who, text=text, tenant=getattr(decision, "tenant", None))


async def main(folder: str) -> None:
    store = await open_store(f"file:{folder}", LIMITS)
    promise(started=True)
    for number in range(3):
        who = f"97150000000{number}"
        await say(store, who, f"start_realty_{number + 1}", NOW - 9)
        await say(store, who, "second", NOW - 8)
    await asyncio.gather(*(say(store, f"97150000000{n}", "third", NOW - 7) for n in range(3)))
    await say(store, "971500000000", "start_realty_9", NOW - 6)
    for delivery in await again(lambda: store.claim(2, wait=0)):
        text = json.loads(delivery.body)["payload"]["body"]
        promise(claimed=text, by=delivery.user)
        await again(functools.partial(store.settle, delivery, Delivered()))
        promise(done=text, by=delivery.user)
    await again(lambda: store.unlock(user("971500000002")))
    promise(unlocked="971500000002")
    await store.close()
    promise(closed=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except StartRefused as exc:
        sys.exit(str(exc))
