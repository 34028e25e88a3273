"""HTTP/1.1 as uvicorn speaks it, with the bounds that its fast parser (httptools) lacks.

Without them a caller who never needs a key can hold memory and connections for good: with a head
that does not end, with one byte a minute, with requests sent on without waiting for answers.

And with a shorter way for a webhook: its body lies here whole, its answer is one write.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api.webhook import AT_ONCE
from gateway.log import Throttle

MAX_HEAD_BYTES = 65_536  # request line and header lines; WAHA's are about 500
REQUEST_SECONDS = 20.0  # from a request's first byte to its last; WAHA sends it at once
_ONE_READ = 262_144  # what uvloop hands over at once, at most
_MAX_PIPELINED = 64  # requests read before the first of them is answered; WAHA sends one

_TOO_LARGE = ("431 Request Header Fields Too Large", f"a head over {MAX_HEAD_BYTES} bytes")
_NO_HTTP = ("400 Bad Request", "what it sends is no HTTP")

log = logging.getLogger(__name__)
# For uvicorn's own lines: it logs each malformed request, which could fill the log.
_errors = logging.getLogger(f"{__name__}.uvicorn")
_errors.setLevel("ERROR")
_tracebacks = Throttle()
_errors.addFilter(lambda record: _tracebacks.passes((record.msg, (record.exc_info or "x")[0])))


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Overrides what uvicorn 0.54 calls; tests/e2e/test_hostile.py would notice."""

    _refusals = Throttle()

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.logger = _errors
        self._began: float | None = None  # when the request being read did
        self._in_head = False
        self._had_body = False  # in what was read last
        self._bare_bytes = 0  # read for the request since the last of its body: head or trailers
        self._reading = 0  # bytes of the read that is being parsed
        self._head_reads = 0  # of all reads that hold the head being parsed: no less than it
        self._too_large = False
        self._unsent = 0  # bytes of answers that waited to be taken at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._began = self.loop.time()  # who connects is about to ask
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._had_body = False
        self._reading = len(data)
        if self._in_head:
            self._head_reads += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        bare = self._began is not None and not self._had_body
        self._bare_bytes = self._bare_bytes + len(data) if bare else 0
        if self._bare_bytes > MAX_HEAD_BYTES + _ONE_READ:
            self._too_large = True
            self.send_400_response("")
        elif len(self.pipeline) > _MAX_PIPELINED:
            self._drop("it sends requests without waiting for answers")
        elif self._began is None and (self.cycle is None or self.cycle.response_complete):
            # A bare CRLF begins no request, but has stopped uvicorn's timer.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_reads = self._reading
        self._began = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are no headers (RFC 9110, 6.5.1), and have no end
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._had_body = True
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head = False
        # Most heads come whole in one small read, and need no counting.
        if self._head_reads > MAX_HEAD_BYTES and self._head() > MAX_HEAD_BYTES:
            self._too_large = True
            raise ValueError  # the parser stops, and comes to send_400_response
        super().on_headers_complete()

    def _head(self) -> int:
        """Bytes of the request line and the headers; ": " and the line's end are the 4."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
        extensions[AT_ONCE] = _AtOnce(cycle)
        super()._start_asgi_task(cycle, app)

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

    def _check_progress(self) -> None:
        """Drop a request that does not come to its end. One timer a connection, not a request."""
        rest = REQUEST_SECONDS
        if self._began is not None:
            rest -= self.loop.time() - self._began
        unsent, before = self.transport.get_write_buffer_size(), self._unsent
        self._unsent = unsent
        if rest <= 0:
            self._drop(f"its request did not end within {REQUEST_SECONDS:g} s")
        elif 0 < before <= unsent:
            self._drop(f"it took nothing of its answers for {REQUEST_SECONDS:g} s")
        else:
            self._timer = self.loop.call_later(max(rest, 0.01), self._check_progress)

    def _drop(self, reason: str) -> None:
        self._note(reason)
        self.transport.abort()

    def _note(self, reason: str) -> None:
        source = self.client[0] if self.client else "nowhere"
        self._refusals.warn(
            log,
            (source, reason),
            "🚫 Closed a connection from %s: %s",
            source,
            reason,
            event="refused.connection",
            source=source,
        )


class _AtOnce:
    """See api.webhook.AtOnce. uvicorn's own receive() and send() are a fifth of what accepting
    costs: an event, a time-out, two messages, and a look at each header for what it may not hold.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def body(self) -> bytes | None:
        cycle = self._cycle
        return None if cycle.more_body else bytes(cycle.body)

    def answer(self, json: bytes) -> bool:
        cycle = self._cycle
        if cycle.disconnected or not cycle.keep_alive or cycle.flow.write_paused:
            return False
        head = b"".join([b"%s: %s\r\n" % header for header in cycle.default_headers])
        cycle.transport.write(
            b"HTTP/1.1 200 OK\r\n%scontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (head, len(json), json)
        )
        cycle.response_started = cycle.response_complete = True
        cycle.on_response()
        return True
