"""replay: let the router deliver dead letters again."""

from typing import Any

from gateway.cli.router_client import progress_of, request
from gateway.settings import Settings


async def replay(settings: Settings, *, tenant: int | None, user: str | None) -> int:
    """Deliver dead letters again: a tenant's, a user's, or with neither all.

    Return the exit status.
    """
    which: dict[str, Any] = {"tenant": tenant, "user": user}
    query = {name: value for name, value in which.items() if value is not None} or {"all": "true"}
    answer = await request(
        settings,
        "/router/dead-letters/replay",
        query=query,
        progress=progress_of(settings, "gateway_dead_letters", falling=True),
    )
    print(f"{answer['count']} replayed")
    return 0
