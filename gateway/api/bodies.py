"""A request's body: whole, soon, and no larger than allowed."""

import asyncio
from collections import Counter
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import Receive

from gateway.errors import BadBody, BodyEncoded, BodyTooLarge, BodyTooSlow, StoreUnavailable

_SECONDS = 10.0  # WAHA sends a body at once; who trickles is not WAHA
MAX_UNVERIFIED_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes a body may have, and the setting that says so, if one does."""

    most: int
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.setting}={self.most}" if self.setting else f"{self.most} bytes"


class Unverified:
    """A budget of memory for the bodies that are still arriving from callers who are not known yet:
    a signature is checked over the whole body. One address may take half of it."""

    def __init__(self, most: int = MAX_UNVERIFIED_BYTES) -> None:
        self._most = most
        self._total = 0
        self._taken: Counter[str] = Counter()  # bytes, by address

    def take(self, address: str, size: int) -> None:
        """Raise StoreUnavailable if there is no room for size bytes more."""
        full = self._total + size > self._most
        if full or self._taken[address] + size > self._most / 2:
            raise StoreUnavailable(
                "bodies that are not verified yet take all the memory that is meant for them"
            )
        self._total += size
        self._taken[address] += size

    def give_back(self, address: str, size: int) -> None:
        self._total -= size
        self._taken[address] -= size
        if not self._taken[address]:
            del self._taken[address]


async def read(
    connection: HTTPConnection, receive: Receive, limit: Limit, unverified: Unverified | None = None
) -> bytes:
    """The body's own bytes, within limit; raise BadBody, BodyTooSlow or BodyTooLarge.

    unverified: what is read counts there until it is read; StoreUnavailable if there is no room.
    """
    check_announced(connection, limit)
    address = connection.client.host if connection.client else ""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise BadBody("the caller hung up in the middle of the body")
                chunk = message.get("body", b"")
                check_size(size + len(chunk), limit)
                if unverified:
                    unverified.take(address, len(chunk))
                chunks.append(chunk)
                size += len(chunk)
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError as exc:
        raise BodyTooSlow(f"the body did not end within {_SECONDS:g} s") from exc
    finally:
        if unverified:
            unverified.give_back(address, size)


def check_encoding(connection: HTTPConnection) -> None:
    """Raise BodyEncoded if the body is compressed: nothing here unpacks it, and WAHA sends none."""
    encoding = connection.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyEncoded(
            f"the body is encoded (Content-Encoding: {encoding[:40]!a}): send it as it is; a proxy"
            " in front must not compress requests"
        )


def check_announced(connection: HTTPConnection, limit: Limit) -> None:
    """Raise BodyTooLarge if the body will be larger, by what the head says."""
    check_size(_announced(connection), limit)


def may_exceed(connection: HTTPConnection, limit: Limit) -> bool:
    """Whether the body may be larger, by what the head says."""
    return "transfer-encoding" in connection.headers or _announced(connection) > limit.most


def check_size(size: int, limit: Limit) -> None:
    """Raise BodyTooLarge if size is more than limit allows."""
    if size > limit.most:
        raise BodyTooLarge(f"the body is larger than {limit}")


def _announced(connection: HTTPConnection) -> int:
    # Not all of it: int() refuses 5,000 digits, and 19 are too many already.
    announced = connection.headers.get("content-length", "").lstrip("0")[:19]
    return int(announced) if announced.isdecimal() else 0
