"""What must not be lost. base.py is the promise; the other files keep it."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.errors import StartRefused
from gateway.store.base import Limits, Page, Store
from gateway.store.files import FileStore

__all__ = ["Limits", "Page", "Store", "open_store"]


async def open_store(url: str, limits: Limits) -> Store:
    """The store that url names by its scheme (file:<folder>); StartRefused if unusable."""
    scheme, _, place = url.partition(":")
    if scheme not in _STORES:
        raise StartRefused(
            f"STORE_URL={url!r}: must be empty or begin with one of {', '.join(_STORES)}:"
        )
    return await _STORES[scheme](place, limits)


async def _files(place: str, limits: Limits) -> Store:
    return await FileStore.open(Path(place), limits)


_STORES: dict[str, Callable[[str, Limits], Awaitable[Store]]] = {"file": _files}
