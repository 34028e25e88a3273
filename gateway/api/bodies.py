"""A request's body: whole, soon, and no larger than allowed."""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import Receive

from gateway.errors import BadBody, BodyEncoded, BodyTooLarge, BodyTooSlow

_SECONDS = 10.0  # WAHA sends a body at once; who trickles is not WAHA


async def read(connection: HTTPConnection, receive: Receive, most: int) -> bytes:
    """The body's own bytes, at most so many; raise BadBody, BodyTooSlow or BodyTooLarge."""
    # Not all of it: int() refuses 5,000 digits, and 19 are too many already.
    announced = connection.headers.get("content-length", "").lstrip("0")[:19]
    check_size(int(announced) if announced.isdecimal() else 0, most)
    try:
        async with asyncio.timeout(_SECONDS):
            return await _whole(receive, most)
    except TimeoutError as exc:
        raise BodyTooSlow(f"the body did not end within {_SECONDS:g} s") from exc


def check_encoding(connection: HTTPConnection) -> None:
    """Raise BodyEncoded if the body is compressed: nothing here unpacks it, and WAHA sends none."""
    encoding = connection.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise BodyEncoded(
            f"the body is encoded (Content-Encoding: {encoding[:40]!a}): send it as it is; a proxy"
            " in front must not compress requests"
        )


async def _whole(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise BadBody("the caller hung up in the middle of the body")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        check_size(size, most)
        if not message.get("more_body"):
            return b"".join(parts)


def check_size(size: int, most: int) -> None:
    """Raise BodyTooLarge if size is more than most bytes."""
    if size > most:
        raise BodyTooLarge(f"the body is larger than MAX_BODY_BYTES={most}")
