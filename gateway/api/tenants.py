"""/router/tenants and /router/link: what an agent's office asks, and how an operator moves one."""

import asyncio
import heapq
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Body, HTTPException, Query
from starlette.responses import Response

from gateway.api.answers import Json
from gateway.api.inputs import Limit, TenantNumber, time_or_null
from gateway.domain.model import LARGEST_TENANT, TenantId, Totals, UserId
from gateway.operations.actions import Actions
from gateway.store import Store
from gateway.tenants import qr
from gateway.tenants.links import Link, Links
from gateway.tenants.registry import Tenants

Note = Annotated[str, Query(max_length=1000, description="the text behind the link")]
Size = Annotated[int, Query(ge=32, le=4096, description="pixels of a side, margin included")]
Margin = Annotated[int, Query(ge=0, le=50, description="modules around the code")]
_SIZE = 512


def tenants_router(store: Store, actions: Actions, tenants: Tenants) -> APIRouter:
    api = APIRouter(prefix="/router/tenants", tags=["tenants"])

    @api.get("")
    async def some(
        limit: Limit = 1000, after: Annotated[int, Query(ge=0, le=LARGEST_TENANT)] = 0
    ) -> Json:
        """Every tenant that tenants.json names or that has or had anything, in order of number;
        `next`, if there is more, goes into `after`."""
        totals, listed = await store.tenant_totals(), tenants.listed or {}

        def page() -> list[TenantId]:
            more = (number for number in {*totals, *listed} if number > after)
            return heapq.nsmallest(limit + 1, more)

        numbers = await asyncio.to_thread(page)
        content: dict[str, Any] = {
            "tenants": [_totals(one, totals.get(one, Totals()), tenants) for one in numbers[:limit]]
        }
        if len(numbers) > limit:
            content["next"] = numbers[limit - 1]
        return Json(content)

    @api.get("/{number}/users")
    async def users(
        number: TenantNumber,
        limit: Limit = 1000,
        after: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Json:
        """Who is locked to a tenant, in order of id; `next`, if there is more, goes into
        `after`."""
        found, more = await store.users_of(
            TenantId(number), limit, UserId(after) if after else None
        )
        content: dict[str, Any] = {"tenant_id": number, "users": found}
        if more:
            content["next"] = more
        return Json(content)

    @api.post("/{number}/move")
    async def move(
        number: TenantNumber,
        to: Annotated[int, Body(ge=1, le=LARGEST_TENANT, strict=True)],
        waiting: Annotated[Literal["move", "keep"], Body()] = "move",
    ) -> Json:
        """Lock all users of a tenant to another, in one step. What waits and was never attempted
        goes along, unless waiting is keep."""
        if to == number:
            raise HTTPException(422, f"`to` is {to}, where the users are already")
        count, along = await actions.move(
            TenantId(number), TenantId(to), with_waiting=waiting == "move"
        )
        if not count and not along and TenantId(number) not in (tenants.listed or {}):
            return Json({"status": "not_found", "tenant_id": number}, 404)
        return Json({"status": "moved", "from": number, "to": to, "users": count, "waiting": along})

    return api


def links_router(links: Links) -> APIRouter:
    api = APIRouter(prefix="/router/link", tags=["links"])

    def link_of(number: int, note: str) -> Link:
        """404 if there is no such tenant."""
        if link := links.of(TenantId(number), note):
            return link
        raise HTTPException(404, f"tenant {number} is not in tenants.json")

    @api.get("/{number}")
    async def link(number: TenantNumber, text: Note = "") -> Json:
        """The link that a tenant hands out; text follows it on a new line."""
        found = link_of(number, text)
        query = f"?{urlencode({'text': text})}" if text else ""
        return Json(
            {
                "deep_link": found.url,
                "tenant_id": number,
                "active": found.active,
                "gateway_phone": found.phone,
                "text": found.text,
                "qr_svg": f"/router/link/{number}/qr.svg{query}",
                "qr_png": f"/router/link/{number}/qr.png{query}",
            }
        )

    @api.get("/{number}/qr.{kind}", response_class=Response)
    async def qr_code(
        number: TenantNumber,
        kind: Literal["svg", "png"],
        text: Note = "",
        size: Size = _SIZE,
        margin: Margin = qr.QUIET_ZONE,
    ) -> Response:
        """The link as a QR code. A PNG's side is at most `size`, for a module is whole pixels."""
        url = link_of(number, text).url
        draw, media = (qr.svg, "image/svg+xml") if kind == "svg" else (qr.png, "image/png")
        # In a thread: a large one takes half a second.
        drawn = await asyncio.to_thread(draw, url, size=size, margin=margin)
        return Response(drawn, media_type=media)

    return api


def _totals(number: TenantId, totals: Totals, tenants: Tenants) -> dict[str, Any]:
    tenant = tenants.get(number)
    return {
        "tenant_id": number,
        "name": tenant.name if tenant else None,
        "active": tenant.active if tenant else None,
        "note": tenant.note if tenant else None,
        "users": totals.users,
        "delivered": totals.delivered,
        "waiting": totals.waiting,
        "dead": totals.dead,
        "first_seen": time_or_null(totals.first_seen),
        "last_seen": time_or_null(totals.last_seen),
    }
