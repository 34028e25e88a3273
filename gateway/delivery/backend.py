"""The tenants' side: one POST of the webhook's own bytes, with X-Tenant-ID.

Signed, where a secret is set, by Standard Webhooks 1.0 (standardwebhooks.com, "Signature scheme").
"""

import asyncio
import base64
import email.utils
import hashlib
import hmac
import time
from collections.abc import Callable, Sequence

import aiohttp
import httpx
import httpx_aiohttp

from gateway import VERSION
from gateway.domain.model import LONGEST_RETRY_AFTER, Delivery, unscoped
from gateway.errors import BackendError, BackendRefused, BackendUnavailable, NotConnected

_REFUSALS = frozenset({400, 410, 413, 415, 422})  # sending it again would change nothing
_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 4.0  # below the 5 s after which uvicorn and node close an idle connection
_ANSWER_BYTES = 65_536  # read so that the connection can be used again; beyond it, it is dropped
_ANSWER_SECONDS = 5.0  # for the rest of an answer whose status is known
_ANSWER_EXCERPT_BYTES = 1024  # of a refusal's answer, for the person who looks at the dead letter
_USER_AGENT = f"whatsapp-gateway-router/{VERSION}"


def transport(connections: int) -> httpx.AsyncBaseTransport:
    """The real one. It is used without httpx.Client, which would follow the backend's cookies and
    the environment's proxies; a transport sends the request it is given and nothing else."""

    def session() -> aiohttp.ClientSession:
        # It resolves names by aiodns, where that is installed: in the few threads that it would
        # take else, names that hang would stop all others.
        connector = aiohttp.TCPConnector(limit=connections, keepalive_timeout=_IDLE_SECONDS)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    return httpx_aiohttp.AiohttpTransport(client=session)


class Backend:
    """One target URL.

    timeout: seconds for one attempt, from the connection to the answer's status. secrets: the keys
    of `whsec_…` texts, all of which sign; none: unsigned. transport: may serve other URLs as well.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        secrets: Sequence[str],
        transport: httpx.AsyncBaseTransport,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url = url
        self._parsed_url = httpx.URL(url)
        self._timeout = timeout
        self._keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
        self._transport = transport
        self._clock = clock
        connect = min(_CONNECT_SECONDS, timeout)
        # "pool" is what covers the resolving of the name as well; nobody waits for a place in it.
        self._extensions = {"timeout": {"connect": connect, "pool": connect, "read": None}}

    async def post(self, delivery: Delivery) -> None:
        """Hand delivery over; raise BackendRefused or BackendUnavailable if that fails.

        Success is the status: an answer that does not end after it changes nothing.
        """
        # Given as a stream, httpx need not work out the headers again: a quarter of the time.
        request = httpx.Request(
            "POST",
            self._parsed_url,
            headers=self._headers(delivery),
            stream=httpx.ByteStream(delivery.body),
            extensions=self._extensions,
        )
        request.read()  # or the transport would send it in chunks
        response, answer = None, bytearray()
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                response = await self._transport.handle_async_request(request)
                deadline.reschedule(asyncio.get_running_loop().time() + _ANSWER_SECONDS)
                await _read(response, answer)
        except (httpx.HTTPError, aiohttp.ClientError, OSError, TimeoutError, UnicodeError) as exc:
            # UnicodeError: httpx on a status line that is no text.
            if response is None:
                raise self._no_answer(exc) from exc
            # Else the status is known; what is missing is only the text to it.
        if not response.is_success:
            raise self._failure(response, bytes(answer[:_ANSWER_EXCERPT_BYTES]))

    async def close(self) -> None:
        """Let go of the transport, and so of every Backend on it."""
        await self._transport.aclose()

    def _headers(self, delivery: Delivery) -> list[tuple[bytes, bytes]]:
        key = delivery.idempotency_key
        headers = [
            *delivery.headers,
            ("X-Tenant-ID", str(delivery.tenant)),
            ("X-User-ID", unscoped(delivery.user)),
            ("Idempotency-Key", key),
            ("X-Delivery-Attempt", str(delivery.attempt)),
            ("User-Agent", _USER_AGENT),
        ]
        if delivery.alias:
            headers.append(("X-User-Alias", unscoped(delivery.alias)))
        if self._keys:
            # The id is signed, and with it the tenant: no header can be swapped for another's.
            id_, timestamp = f"{delivery.tenant}_{key}", str(int(self._clock()))
            signed = f"{id_}.{timestamp}.".encode() + delivery.body
            headers += [
                ("webhook-id", id_),
                ("webhook-timestamp", timestamp),
                ("webhook-signature", " ".join(_signature(signed, one) for one in self._keys)),
            ]
        return [(name.encode(), value.encode()) for name, value in headers]

    def _no_answer(self, exc: Exception) -> BackendUnavailable:
        # The transport calls every lost connection a ConnectTimeout; what happened is its cause.
        cause = exc.__cause__ or exc
        text = " ".join(str(cause).split())[:200]  # one line of the log
        reason = f"{self.url}: {text or type(cause).__name__}"
        if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return NotConnected(reason)
        if isinstance(exc, TimeoutError):
            return BackendUnavailable(f"{self.url}: no answer within {self._timeout:g} s")
        return BackendUnavailable(reason)

    def _failure(self, response: httpx.Response, answer: bytes) -> BackendError:
        status = response.status_code
        if status in _REFUSALS:
            return BackendRefused(f"{self.url}: {status}", status=status, answer=answer)
        if response.is_redirect:
            to = " ".join(response.headers.get("location", "").split())[:200]
            return BackendUnavailable(
                f"{self.url}: {status}, it redirects to {to!a}: set its URL to where that leads",
                status=status,
                answer=answer,
            )
        wait = retry_after(response.headers.get("retry-after"), self._clock())
        return BackendUnavailable(
            f"{self.url}: {status}", status=status, answer=answer, retry_after=wait
        )


async def _read(response: httpx.Response, answer: bytearray) -> None:
    """Read the answer to its end if that is near; else its connection goes."""
    try:
        async for chunk in response.stream:  # type: ignore[union-attr]  # async transport
            answer += chunk
            if len(answer) > _ANSWER_BYTES:
                break
    finally:
        await response.aclose()


def _signature(signed: bytes, key: bytes) -> str:
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, a number or an HTTP date (RFC 9110, 10.2.3).

    At most an hour; None if it is absent or means nothing.
    """
    if value is None:
        return None
    try:
        wait = float(value) if value.strip().isdecimal() else _until(value, now)
    except (ValueError, OverflowError):
        return None
    return min(max(wait, 0.0), LONGEST_RETRY_AFTER)


def _until(date: str, now: float) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - now
