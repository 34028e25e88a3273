"""recover: let the router ask WAHA for messages that never came."""

from gateway.cli.router_client import progress_of, request
from gateway.settings import Settings


async def recover(settings: Settings, *, session: str | None, hours: float | None) -> int:
    """Ask WAHA, through the router, for messages that never came. Return the exit status."""
    answer = await request(
        settings,
        "/router/recover",
        query={"session": session} if session else {},
        body={"hours": hours} if hours is not None else None,
        progress=progress_of(settings, "gateway_recovered_messages"),
    )
    names = ("routed", "unknown_user", "duplicate", "ignored")
    print(", ".join(f"{answer[name]} {name}" for name in names))
    return 0
