"""HTTP/1.1 as uvicorn speaks it, with the bounds that its fast parser (httptools) lacks.

Without them a caller who never needs a key can hold memory and connections for good: with a head
that does not end, with one byte a minute, with requests sent on without waiting for answers.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.log import Throttle

MAX_HEAD_BYTES = 65_536  # request line and header lines; WAHA's are about 500
REQUEST_SECONDS = 20.0  # from a request's first byte to its last; WAHA sends it at once
_MAX_PIPELINED = 64  # requests read before the first of them is answered; WAHA sends one

_TOO_LARGE = ("431 Request Header Fields Too Large", f"a head over {MAX_HEAD_BYTES} bytes")
_NO_HTTP = ("400 Bad Request", "what it sends is no HTTP")

log = logging.getLogger(__name__)
# For uvicorn's own lines: it tells of each malformed request, which could fill the log.
_errors = logging.getLogger(f"{__name__}.uvicorn")
_errors.setLevel("ERROR")


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Overrides what uvicorn 0.54 calls; tests/e2e/test_wire.py would notice."""

    _refusals = Throttle()

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.logger = _errors
        self._began: float | None = None  # when the request being read did
        self._in_head = False
        self._head_bytes = 0  # of the chunks between a head's first and its last
        self._too_large = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._began = self.loop.time()  # who connects is about to ask
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._too_large = True
            self.send_400_response("")
        elif len(self.pipeline) > _MAX_PIPELINED:
            self._drop("it sends requests without waiting for answers")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._began is None:
            self._began = self.loop.time()

    def on_headers_complete(self) -> None:
        self._in_head = False
        # ": " and the line's end are the 4 bytes
        head = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head > MAX_HEAD_BYTES:
            self._too_large = True
            raise ValueError  # the parser stops, and comes to send_400_response
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._began = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self.transport.is_closing():
            return
        status, reason = _TOO_LARGE if self._too_large else _NO_HTTP
        self._note(reason)
        self.transport.write(
            f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        )
        self.transport.close()

    def _look(self) -> None:
        """Drop a request that does not come to its end. One timer a connection, not a request."""
        rest = REQUEST_SECONDS
        if self._began is not None:
            rest -= self.loop.time() - self._began
        if rest > 0:
            self._watch = self.loop.call_later(rest, self._look)
        else:
            self._drop(f"its request did not end within {REQUEST_SECONDS:g} s")

    def _drop(self, reason: str) -> None:
        self._note(reason)
        self.transport.abort()

    def _note(self, reason: str) -> None:
        source = self.client[0] if self.client else "nowhere"
        if self._refusals.passes((source, reason)):
            log.warning(
                "🚫 Closed a connection from %s: %s (told once a minute)",
                source,
                reason,
                extra={"event": "refused.connection", "source": source},
            )
