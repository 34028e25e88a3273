"""What must not be lost. base.py is the promise; the other files keep it."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.domain.person import HELP_SECONDS
from gateway.errors import StartRefused
from gateway.store.base import Limits, LocksPage, OnLockEvent, Store
from gateway.store.files.journal import Committed
from gateway.store.files.store import FileStore
from gateway.store.redis.scripts import SCHEMES
from gateway.store.redis.store import RedisStore

__all__ = ["HELP_SECONDS", "Hooks", "Limits", "LocksPage", "Store", "open_store"]


OnCorruption = Callable[[str], None]
Hooks = tuple[OnCorruption, Committed, OnLockEvent]


async def open_store(
    url: str,
    limits: Limits,
    on_corruption: OnCorruption = lambda _: None,
    committed: Committed = lambda _seconds, _operations: None,
    on_lock_event: OnLockEvent = lambda _: None,
    *,
    beside: Path | None = None,
) -> Store:
    """The store that url names by its scheme (file:<folder>); StartRefused if unusable.

    on_corruption is called with the reason when the store cannot be trusted any longer: the process
    must end then. committed is called after each durable write, on_lock_event with each change of
    a lock that is durable. beside: the data folder, if the store is another one.
    """
    scheme = url.partition(":")[0]
    if scheme not in STORES:
        raise StartRefused(
            f"STORE_URL={scheme}:…: must be empty or begin with one of {', '.join(STORES)}:"
        )
    hooks = (on_corruption, committed, on_lock_event)
    return await STORES[scheme](url, limits, hooks, beside)


async def _files(url: str, limits: Limits, hooks: Hooks, _: Path | None) -> Store:
    return await FileStore.open(Path(url.partition(":")[2]), limits, *hooks)


async def _redis(url: str, limits: Limits, hooks: Hooks, beside: Path | None) -> Store:
    _, committed, on_lock_event = hooks
    return await RedisStore.open(url, limits, committed, on_lock_event, beside=beside)


# By URL scheme. A new store is one line here, and one name in the contract's parameters.
STORES: dict[str, Callable[[str, Limits, Hooks, Path | None], Awaitable[Store]]] = {
    "file": _files,
    **dict.fromkeys(SCHEMES, _redis),
}
