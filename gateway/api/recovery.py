"""/router/recover: ask WAHA for messages that never came."""

from typing import Annotated

from fastapi import APIRouter, Body, HTTPException

from gateway.api.answers import Json
from gateway.api.inputs import Session
from gateway.inbound.recovery import Recovery


def recovery_router(recovery: Recovery, *, home_session: str) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["router"])

    @api.post("/recover")
    async def recover(
        session: Session = None,
        hours: Annotated[float | None, Body(embed=True, gt=0, le=48)] = None,
    ) -> Json:
        """Take in what WAHA has of the last hours, or since the last message that came, at most
        RECOVER_HOURS back. What was seen is a duplicate."""
        name = session or home_session
        if not recovery.hours:
            raise HTTPException(409, "RECOVER_HOURS=0: recovery is off")
        since = recovery.since(name, hours)
        if since is None:
            raise HTTPException(
                409, f"nothing was ever heard of session {name}: say how many `hours` back to look"
            )
        outcomes = await recovery.recover(name, since)
        names = ("routed", "unknown_user", "duplicate", "ignored")
        return Json({"status": "recovered", **{name: outcomes[name] for name in names}})

    return api
