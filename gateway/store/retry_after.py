"""How long WAHA is asked to wait before it sends again what was refused."""

import time

from gateway.errors import StoreUnavailable

_LONG_TROUBLE_SECONDS = 10.0
# WAHA obeys Retry-After, and tries 15 times: they then last 5 minutes instead of 30 seconds.
_SHORT_SECONDS, _LONG_SECONDS = 2, 20


class RetryAfter:
    """Grows with the trouble: each refusal is made here, and over() says that one went through."""

    def __init__(self) -> None:
        self._since: float | None = None

    def unavailable(self, reason: str) -> StoreUnavailable:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        long = now - self._since > _LONG_TROUBLE_SECONDS
        return StoreUnavailable(reason, retry_after=_LONG_SECONDS if long else _SHORT_SECONDS)

    def over(self) -> None:
        self._since = None
