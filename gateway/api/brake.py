"""Who guesses keys is slowed down, by address; who knows the key never waits."""

import asyncio
import ipaddress
import time
from collections.abc import Callable

from starlette.requests import HTTPConnection

from gateway.errors import BadKey, GatewayError, TooManyGuesses

GUESS_SECONDS = 0.5  # between the answers to two wrong keys from one address
_MOST_WAITING = 10  # for such an answer, from one address; more are refused at once
_MOST_ADDRESSES = 10_000  # of all others together there are no more than from one


class Brake:
    """For every wrong key, whatever asked for it: the administration, the page, a webhook.

    The key is looked at first, so that another's guesses keep nobody out who knows it. What is
    slowed down is the answer that it is wrong, and with it the next guess.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}  # when the next answer may go, by address

    async def hold(self, connection: HTTPConnection, error: GatewayError) -> GatewayError:
        """error, when its answer may go: at once unless it is BadKey. TooManyGuesses in its place
        if too many wait for theirs."""
        if not isinstance(error, BadKey):
            return error
        now, address = self._clock(), _network(connection)
        if address not in self._next and len(self._next) >= _MOST_ADDRESSES:
            self._next = {one: at for one, at in self._next.items() if at > now}
            if len(self._next) >= _MOST_ADDRESSES:
                address = "others"
        at = max(now, self._next.get(address, 0.0)) + GUESS_SECONDS
        if at > now + _MOST_WAITING * GUESS_SECONDS:
            return TooManyGuesses("too many wrong keys from this address: wait some seconds")
        self._next[address] = at
        await asyncio.sleep(at - now)
        return error


def _network(connection: HTTPConnection) -> str:
    """The caller's address; of IPv6 the network, in which he has as many as he likes."""
    peer = connection.client.host if connection.client else ""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address) and not address.ipv4_mapped:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer
