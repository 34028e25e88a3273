"""/router/user, lock and unlock: what an operator asks and decides about one user."""

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query

from gateway.api.answers import Json
from gateway.api.inputs import Before, Session, Users, time_or_null, time_text
from gateway.domain.model import (
    LARGEST_TENANT,
    Export,
    HistoryEntry,
    StoredMessage,
    TenantId,
    unscoped,
)
from gateway.operations.actions import Actions
from gateway.store import Store


def users_router(store: Store, actions: Actions, users: Users) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["users"])

    @api.get("/user/{phone}")
    async def user(phone: str, session: Session = None) -> Json:
        """Where a user is locked to. Phones in any usual spelling, `…@c.us` and `…@lid`."""
        known, lock = await store.lock_of(users.named(phone, session))
        return Json(
            {
                "phone": unscoped(known),
                "locked_to_tenant": lock.tenant,
                "status": "no_session" if lock.tenant is None else "active_session",
            }
        )

    @api.get("/user/{phone}/history")
    async def history(
        phone: str,
        session: Session = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        before: Before = None,
    ) -> Json:
        """What was decided of the user's lock, newest first; `next`, if there is more, goes into
        `before`. No call changes it, but an erasure takes the name off."""
        who = users.named(phone, session)
        found = await store.history(who, limit=limit + 1, before=before)
        content: dict[str, Any] = {"history": [_history_entry(one) for one in found[:limit]]}
        if len(found) > limit:
            content["next"] = found[limit - 1].id
        return Json(content)

    @api.get("/user/{phone}/export")
    async def export(phone: str, session: Session = None) -> Json:
        """All that is held of a person, the messages that wait included."""
        return Json(_export(await store.export(users.named(phone, session))))

    @api.delete("/user/{phone}")
    async def erase(phone: str, session: Session = None) -> Json:
        """Forget a person: lock, messages, aliases. The history keeps lines without a name."""
        ids, erased = await actions.erase(users.named(phone, session))
        counts = {
            "locks": erased.locks,
            "waiting": erased.waiting,
            "held": erased.held,
            "dead_letters": erased.dead_letters,
            "aliases": erased.aliases,
            "help": erased.help,
            "unreadable": erased.unreadable,
            "history": erased.history,
        }
        if not any(counts.values()):
            return Json({"status": "not_found", "phone": unscoped(ids[0])}, 404)
        return Json({"status": "erased", "phone": unscoped(ids[0]), **counts})

    return api


def locks_router(actions: Actions, users: Users) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["users"])

    @api.post("/lock/{phone}")
    async def lock(
        phone: str,
        tenant_id: Annotated[int, Body(embed=True, ge=1, le=LARGEST_TENANT, strict=True)],
        session: Session = None,
    ) -> Json:
        """Lock a user to a tenant, or move the user there. What already waits goes where it was to
        go; what was held for want of a lock goes to the new tenant."""
        who = users.named(phone, session)
        known, before, released = await actions.lock(who, TenantId(tenant_id))
        return Json(
            {
                "status": "locked",
                "phone": unscoped(known),
                "locked_to_tenant": tenant_id,
                "was_locked_to": before,
                "released": released,
            }
        )

    @api.post("/unlock/{phone}")
    async def unlock(
        phone: str, session: Session = None, waiting: Literal["keep", "drop"] = "keep"
    ) -> Json:
        """Take a user's lock away. What already waits is still delivered, unless waiting=drop makes
        dead letters of it."""
        known, tenant, dropped = await actions.unlock(
            users.named(phone, session), drop_waiting=waiting == "drop"
        )
        if tenant is None and not dropped:
            return Json({"status": "not_found", "phone": unscoped(known)}, 404)
        content: dict[str, Any] = {
            "status": "unlocked",
            "phone": unscoped(known),
            "was_locked_to": tenant,
        }
        if waiting == "drop":
            content["dropped"] = dropped
        return Json(content)

    return api


def _history_entry(entry: HistoryEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "at": time_text(entry.at),
        "user": unscoped(entry.user),
        "what": entry.kind,
        "from_tenant": entry.from_tenant,
        "to_tenant": entry.to_tenant,
        "message_id": entry.message_id,
        "why": entry.cause,
        "other": unscoped(entry.other) if entry.other else None,
    }


def _export(export: Export) -> dict[str, Any]:
    return {
        "ids": [unscoped(one) for one in export.ids],
        "locked_to_tenant": export.tenant,
        "messages": [_message(one) for one in export.messages],
        "history": [_history_entry(one) for one in export.history],
        "help_message": export.help
        and {"queued": time_text(export.help[0]), "sent": time_or_null(export.help[1])},
    }


def _message(stored: StoredMessage) -> dict[str, Any]:
    return {
        "where": stored.where,
        "tenant_id": stored.tenant,
        "arrived": time_text(stored.arrived),
        "message_id": stored.message_id,
        **body_of(stored.body),
    }


def body_of(body: bytes) -> dict[str, str]:
    """A body as a text if it is one."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(body).decode()}
