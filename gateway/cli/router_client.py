"""Long work that the running router does on request, with a progress bar on a terminal."""

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

_MAX_SECONDS = 3600.0  # a large database on a slow disk, or a WAHA that answers slowly


async def request(
    settings: Settings,
    path: str,
    *,
    query: dict[str, Any] | None = None,
    body: Any = None,
    progress: AbstractAsyncContextManager[None],
) -> dict[str, Any]:
    """POST to the router that runs with these settings and return its answer.

    Raise StartRefused with what it says, or because it is not there.
    """
    url = f"{settings.local_url}{path}"
    try:
        async with _client(settings, _MAX_SECONDS) as client, progress:
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
async def progress_of(
    settings: Settings, name: str, *, falling: bool = False
) -> AsyncIterator[None]:
    """Show a bar of how far the sum of that series has come since the beginning."""
    with tqdm(unit=" messages", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return

        async def show_progress() -> None:
            begin: float | None = None
            async with _client(settings, 10) as client:
                while True:
                    with contextlib.suppress(httpx.HTTPError, ValueError):
                        now = await _value(client, settings, name)
                        begin = now if begin is None else begin
                        bar.update((begin - now if falling else now - begin) - bar.n)
                    await asyncio.sleep(0.3)

        showing = asyncio.create_task(show_progress())
        try:
            yield
        finally:
            showing.cancel()


async def _value(client: httpx.AsyncClient, settings: Settings, name: str) -> float:
    answer = await client.get(f"{settings.local_url}/metrics")
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.text)
        if family.name == name
        for sample in family.samples
    )
