"""/router/*: what operators ask and order."""

import re
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query

from gateway.api.answers import Json
from gateway.model import UserId, scoped, unscoped
from gateway.store import Store

_PHONE = re.compile(r"\+?([0-9]{5,20})(?:@c\.us|@s\.whatsapp\.net)?")
_LID = re.compile(r"[0-9]{5,20}@lid")
_PUNCTUATION = re.compile(r"[\s()./-]")  # as people write numbers; the dots of @c.us are kept

Session = Annotated[
    str | None,
    Query(pattern="^[A-Za-z0-9_-]{1,64}$", description="another WAHA session than WAHA_SESSION"),
]


def router(store: Store, home_session: str) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["router"])

    def user_of(phone: str, session: str | None) -> UserId:
        return scoped(session or home_session, _person(phone), home_session)

    @api.get("/user/{phone}")
    async def user(phone: str, session: Session = None) -> Json:
        """Where a user is locked to. Phones in any usual spelling, `…@c.us` and `…@lid`."""
        known, lock = await store.lock_of(user_of(phone, session))
        return Json(
            {
                "phone": unscoped(known),
                "locked_to_tenant": lock.tenant,
                "status": "no_session" if lock.tenant is None else "active_session",
            }
        )

    @api.get("/stats")
    async def stats(
        limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Json:
        """Totals, and the locks in order of user; `next`, if there is more, goes into `after`."""
        users, tenants = store.totals()
        page = await store.locks(limit, UserId(after) if after else None)
        content = {
            "total_locked_users": users,
            "unique_tenants": tenants,
            "mappings": dict(page.locks),
        }
        if page.next:
            content["next"] = page.next
        return Json(content)

    @api.post("/unlock/{phone}")
    async def unlock(phone: str, session: Session = None) -> Json:
        """Take a user's lock away. What already waits is still delivered."""
        known, tenant = await store.unlock(user_of(phone, session))
        if tenant is None:
            return Json({"status": "not_found", "phone": unscoped(known)}, 404)
        return Json({"status": "unlocked", "phone": unscoped(known), "was_locked_to": tenant})

    return api


def _person(text: str) -> str:
    text = text.strip()
    if _LID.fullmatch(text):
        return text
    number, at, server = text.partition("@")
    if found := _PHONE.fullmatch(_PUNCTUATION.sub("", number) + at + server):
        return found[1]
    raise HTTPException(
        422, f"{text[:60]!r} is no user: 5-20 digits in any usual spelling, …@c.us or …@lid"
    )
