"""/router/stats, pending and dead-letters: what an operator looks at and clears up."""

import logging
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query

from gateway.api.answers import Json
from gateway.api.inputs import LARGEST_ID, Before, Limit, Session, Users, time_text
from gateway.api.users import body_of
from gateway.domain.model import (
    LARGEST_TENANT,
    DeadLetter,
    Selection,
    TenantId,
    Unreadable,
    UserId,
    unscoped,
)
from gateway.operations.actions import Actions
from gateway.store import Store

log = logging.getLogger(__name__)

DeadLetterId = Annotated[int, Path(ge=1, le=LARGEST_ID, description="the dead letter's id")]
Tenant = Annotated[int | None, Query(ge=1, le=LARGEST_TENANT)]


def router(store: Store) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["router"])

    @api.get("/stats")
    async def stats(
        limit: Limit = 1000,
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

    @api.get("/pending")
    async def pending(limit: Limit = 1000) -> Json:
        """What waits or is in flight: how many, since when, of which tenants, the largest first."""
        backlog = await store.backlog()
        tenants = list(backlog.by_tenant.items())[:limit]
        return Json(
            {
                "waiting": backlog.waiting,
                "oldest": None if backlog.oldest is None else time_text(backlog.oldest),
                "tenants": [{"tenant_id": tenant, "waiting": n} for tenant, n in tenants],
            }
        )

    @api.get("/unreadable")
    async def unreadable(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50, before: Before = None
    ) -> Json:
        """Messages of the last 48 h that were answered 200 and went to nobody, newest first:
        `no_chat` (whose it is cannot be found), `not_decrypted` (its content has not come). `next`,
        if there is more, goes into `before`."""
        found = await store.unreadable(limit=limit + 1, before=before)
        content: dict[str, Any] = {"unreadable": [_unreadable(one) for one in found[:limit]]}
        if len(found) > limit:
            content["next"] = found[limit - 1].id
        return Json(content)

    @api.post("/backup")
    async def backup() -> Json:
        """Write a consistent copy of all into the data folder, for `python whatsapp_router.py
        backup` to fetch. Webhooks go on meanwhile."""
        place = await store.back_up()
        log.info("💾 A back-up was written", extra={"event": "operator.backup"})
        return Json({"status": "written", "folder": str(place.resolve())})

    return api


def dead_letters_router(store: Store, actions: Actions, users: Users) -> APIRouter:
    api = APIRouter(prefix="/router/dead-letters", tags=["dead letters"])

    def selection(tenant: int | None, user: str | None, session: str | None) -> Selection:
        known = users.named(user, session) if user is not None else None
        return Selection(tenant=None if tenant is None else TenantId(tenant), user=known)

    @api.get("")
    async def some(
        tenant: Tenant = None,
        user: str | None = None,
        session: Session = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Before = None,
    ) -> Json:
        """Newest first, without bodies; `next`, if there is more, goes into `before`."""
        which = selection(tenant, user, session)
        found = await store.dead_letters(which, limit=limit + 1, before=before)
        content: dict[str, Any] = {
            "dead_letters": [_dead_letter(dead_letter) for dead_letter in found[:limit]]
        }
        if len(found) > limit:
            content["next"] = found[limit - 1].id
        return Json(content)

    @api.get("/{number}")
    async def one(number: DeadLetterId) -> Json:
        """One, with the body that was to be delivered and the backend's last answer."""
        dead_letter = await store.dead_letter(number)
        return _not_found(number) if dead_letter is None else Json(_dead_letter(dead_letter))

    @api.post("/replay")
    async def replay_all(
        tenant: Tenant = None,
        user: str | None = None,
        session: Session = None,
        all_: Annotated[bool, Query(alias="all")] = False,
    ) -> Json:
        """Deliver a tenant's, a user's, or with all=true every dead letter again."""
        if tenant is None and user is None and not all_:
            raise HTTPException(422, "say which: ?tenant=…, ?user=… or ?all=true")
        replayed = await actions.replay(selection(tenant, user, session))
        return Json({"status": "replayed", "count": replayed})

    @api.post("/{number}/replay")
    async def replay_one(number: DeadLetterId) -> Json:
        """Deliver one again, with its key, behind what waits of its user."""
        if not await actions.replay(Selection(id=number)):
            return _not_found(number)
        return Json({"status": "replayed", "id": number})

    @api.delete("/{number}")
    async def delete(number: DeadLetterId) -> Json:
        """Delete one for good."""
        if not await actions.delete_dead_letters(Selection(id=number)):
            return _not_found(number)
        return Json({"status": "deleted", "id": number})

    return api


def _unreadable(one: Unreadable) -> dict[str, Any]:
    return {
        "id": one.id,
        "arrived": time_text(one.arrived),
        "session": one.session,
        "event": one.event,
        "reason": one.reason.value,
        "user": one.user and unscoped(one.user),
        "message_id": one.message_id,
        **body_of(one.body),
    }


def _not_found(number: int) -> Json:
    return Json({"status": "not_found", "id": number}, 404)


def _dead_letter(dead_letter: DeadLetter) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": dead_letter.id,
        "tenant_id": dead_letter.tenant,
        "user": unscoped(dead_letter.user),
        "reason": dead_letter.reason,
        "last_status": dead_letter.status,
        "answer": dead_letter.answer.decode("utf-8", "replace"),
        "attempts": dead_letter.attempts,
        "arrived": time_text(dead_letter.arrived),
        "died": time_text(dead_letter.died_at),
        "message_id": dead_letter.message_id,
        "idempotency_key": dead_letter.idempotency_key,
    }
    if dead_letter.body is not None:
        content |= body_of(dead_letter.body)
    return content
