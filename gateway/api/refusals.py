"""Callers that are turned away, in the log: each kind once a minute and source.

WAHA repeats a refused webhook for minutes, and who scans the port does not tire either.
"""

import logging

from starlette.requests import HTTPConnection

from gateway.api import answers
from gateway.errors import (
    BadBody,
    BadSignature,
    BodyEncoded,
    BodyTooLarge,
    GatewayError,
    NotAllowed,
    TooManyGuesses,
)
from gateway.log import Throttle
from gateway.settings import WEBHOOK_PATH

_CALLERS_FAULT = BadBody | BadSignature | BodyEncoded | BodyTooLarge | NotAllowed | TooManyGuesses

log = logging.getLogger(__name__)


class Refusals:
    def __init__(self, throttle: Throttle | None = None) -> None:
        self._throttle = throttle or Throttle()

    def answer(self, connection: HTTPConnection, error: GatewayError) -> answers.Json:
        """The answer that error is, noted in the log if its kind is new there."""
        answer = answers.of_error(error)
        # Others say that something cannot be done, which is no fault of the caller's.
        if isinstance(error, _CALLERS_FAULT):
            source = connection.client.host if connection.client else "nowhere"
            self._note(source, connection.scope.get("path", ""), answer.status_code, error)
        return answer

    def wrong_path(self, connection: HTTPConnection, status: int) -> None:
        """Note a call that no route takes: somebody may mean the webhook's path."""
        path, method = connection.scope.get("path", ""), connection.scope.get("method", "")
        source = connection.client.host if connection.client else "nowhere"
        self._throttle.warn(
            log,
            (source, "path", status),
            "🚫 %s %a from %s: nothing is there (%s). The webhook is POST %s",
            method,
            path[:100],
            source,
            status,
            WEBHOOK_PATH,
            event="refused.path",
            source=source,
            status=status,
        )

    def _note(self, source: str, path: str, status: int, error: GatewayError) -> None:
        side = "webhook" if path.startswith("/webhook/") else "admin"
        self._throttle.warn(
            log,
            (source, side, type(error)),
            "🚫 Refused a call from %s with %s: %s (%s)",
            source,
            status,
            error,
            side,
            event=f"refused.{side}",
            source=source,
            status=status,
        )
