"""POST /router/explain: what would become of a webhook, and why."""

import json
from typing import Any

from fastapi import APIRouter, Request

from gateway.api import answers, bodies
from gateway.api.access import Access
from gateway.api.answers import Json
from gateway.api.webhook import answer_of
from gateway.errors import BadSignature, StoreUnavailable
from gateway.inbound.ingest import Explained, Ingest

_ANY_JSON = {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}


def explain_router(ingest: Ingest, access: Access, limit: bodies.Limit) -> APIRouter:
    api = APIRouter(prefix="/router", tags=["router"])

    @api.post("/explain", openapi_extra={"requestBody": _ANY_JSON})
    async def explain(request: Request) -> Json:
        """The answer that a webhook with this body and these headers would get now, and each rule
        with what it says of it. Nothing is kept, sent or counted. 400 for what is no event."""
        body = await bodies.read(request, request.receive, limit)
        explained = await ingest.explain(body, request.headers)
        answer, signature = _answer(explained), access.webhook_access
        try:
            access.check_signature(request, body)
        except BadSignature as exc:
            answer, signature = json.loads(bytes(answers.of_error(exc).body)), f"401: {exc}"
        rules = {"signature": signature} | explained.rules
        return Json({"answer": answer, "rules": rules}, lines=True)

    return api


def _answer(explained: Explained) -> dict[str, Any]:
    if isinstance(explained.outcome, StoreUnavailable):
        refusal: dict[str, Any] = json.loads(bytes(answers.of_error(explained.outcome).body))
        return refusal
    return answer_of(explained.outcome)
