"""Long work that the running router is told to do: recover and replay, with a bar on a terminal."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from gateway.errors import StartRefused
from gateway.settings import Settings, split

_SECONDS = 3600.0  # a large database on a slow disk, or a WAHA that tells slowly


async def recover(settings: Settings, *, session: str | None, hours: float | None) -> int:
    """Ask WAHA, through the router, for messages that never came; the exit status."""
    answer = await order(
        settings,
        "/router/recover",
        query={"session": session} if session else {},
        body={"hours": hours} if hours is not None else None,
        progress=_counted(settings, "gateway_recovered_messages"),
    )
    names = ("routed", "unknown_user", "duplicate", "ignored")
    print(", ".join(f"{answer[name]} {name}" for name in names))
    return 0


async def replay(settings: Settings, *, tenant: int | None, user: str | None) -> int:
    """Deliver dead letters again: a tenant's, a user's, or with neither all; the exit status."""
    which: dict[str, Any] = {"tenant": tenant, "user": user}
    query = {name: value for name, value in which.items() if value is not None} or {"all": "true"}
    answer = await order(
        settings,
        "/router/dead-letters/replay",
        query=query,
        progress=_counted(settings, "gateway_dead_letters", falling=True),
    )
    print(f"{answer['count']} replayed")
    return 0


async def order(
    settings: Settings,
    path: str,
    *,
    query: dict[str, Any] | None = None,
    body: Any = None,
    progress: AbstractAsyncContextManager[None],
) -> dict[str, Any]:
    """POST to the router that runs with these settings; its answer. Raise StartRefused with what
    it says, or that it is not there."""
    url = f"{settings.local_url}{path}"
    try:
        async with _client(settings, _SECONDS) as client, progress:
            answer = await client.post(url, params=query, json=body)
    except httpx.HTTPError as exc:
        raise StartRefused(f"{url}: {exc or type(exc).__name__}: is the router running?") from exc
    if not answer.is_success:
        raise StartRefused(f"{url}: {answer.status_code} {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


def _client(settings: Settings, seconds: float) -> httpx.AsyncClient:
    keys = split(settings.admin_api_key)
    headers = {b"X-Api-Key": keys[0].encode()} if keys else {}
    return httpx.AsyncClient(trust_env=False, timeout=seconds, headers=headers)


@contextlib.asynccontextmanager
async def _counted(settings: Settings, name: str, *, falling: bool = False) -> AsyncIterator[None]:
    """A bar of how far the sum of that series has come since the beginning."""
    with tqdm(unit=" messages", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return

        async def look() -> None:
            begin: float | None = None
            async with _client(settings, 10) as client:
                while True:
                    with contextlib.suppress(httpx.HTTPError, ValueError):
                        now = await _value(client, settings, name)
                        begin = now if begin is None else begin
                        bar.update((begin - now if falling else now - begin) - bar.n)
                    await asyncio.sleep(0.3)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            looking.cancel()


async def _value(client: httpx.AsyncClient, settings: Settings, name: str) -> float:
    answer = await client.get(f"{settings.local_url}/metrics")
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.text)
        if family.name == name
        for sample in family.samples
    )
