"""What must not be lost. base.py is the promise; the other files keep it."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.errors import StartRefused
from gateway.store.base import HELP_SECONDS, Limits, Page, Store
from gateway.store.files import FileStore
from gateway.store.redis import RedisStore
from gateway.store.scripts import SCHEMES

__all__ = ["HELP_SECONDS", "Limits", "Page", "Store", "open_store"]


Leave = Callable[[str], None]


async def open_store(url: str, limits: Limits, leave: Leave = lambda _: None) -> Store:
    """The store that url names by its scheme (file:<folder>); StartRefused if unusable.

    leave is called with the reason when it turns out that it cannot be trusted any longer: the
    process must end then.
    """
    scheme, _, place = url.partition(":")
    if scheme not in _STORES:
        raise StartRefused(
            f"STORE_URL={scheme}:…: must be empty or begin with one of {', '.join(_STORES)}:"
        )
    return await _STORES[scheme](place, limits, leave)


async def _files(place: str, limits: Limits, leave: Leave) -> Store:
    return await FileStore.open(Path(place), limits, leave=leave)


def _redis(scheme: str) -> Callable[[str, Limits, Leave], Awaitable[Store]]:
    async def open_(place: str, limits: Limits, leave: Leave) -> Store:
        return await RedisStore.open(f"{scheme}:{place}", limits)

    return open_


_STORES: dict[str, Callable[[str, Limits, Leave], Awaitable[Store]]] = {
    "file": _files,
    **{scheme: _redis(scheme) for scheme in SCHEMES},
}
