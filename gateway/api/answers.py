"""Which error of ours is which HTTP status: the only table of it."""

import json
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from gateway.errors import (
    BadBody,
    BadSignature,
    BodyEncoded,
    BodyTooLarge,
    BodyTooSlow,
    GatewayError,
    NoBackUp,
    NotAllowed,
    NotLockable,
    StoreUnavailable,
    TooLongForQr,
    TooManyGuesses,
    WahaError,
)

_STATUS: dict[type[GatewayError], int] = {
    BadBody: 400,
    BodyTooSlow: 400,
    BadSignature: 401,
    NotAllowed: 403,
    NoBackUp: 409,
    WahaError: 409,
    BodyTooLarge: 413,
    BodyEncoded: 415,
    TooLongForQr: 422,
    NotLockable: 422,
    TooManyGuesses: 429,
    StoreUnavailable: 503,
}


class Json(Response):
    """Compact JSON in the order of its keys; with lines=True a line for each key."""

    media_type = "application/json"

    def __init__(
        self,
        content: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        lines: bool = False,
    ) -> None:
        if lines:
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            # A name out of a webhook may hold half an emoji.
            super().__init__(text.encode("utf-8", "backslashreplace"), status, headers)
        else:
            super().__init__(orjson.dumps(content), status, headers)


def of_input(errors: Sequence[Any], content_type: str | None) -> Json:
    """422 for what FastAPI calls unusable: thing, reason and value, whatever that is."""
    problems = [
        f"{'.'.join(map(str, error['loc']))}: {error['msg']}, not {ascii(error.get('input'))[:60]}"
        for error in errors
    ]
    if any(error["loc"][0] == "body" for error in errors) and "json" not in (content_type or ""):
        problems.append("send the body with Content-Type: application/json")
    return Json({"detail": "; ".join(problems)[:1000].encode("utf-8", "replace").decode()}, 422)


def of_error(error: GatewayError) -> Json:
    headers = {}
    if isinstance(error, StoreUnavailable):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers["Connection"] = "close"  # the rest of the body is not read
    status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
    return Json({"detail": str(error)}, status, headers)
