"""The circuit breaker of one target URL: open while the backend behind it is away.

An outage must not use up the attempts of a thousand messages, nor keep them waiting once it is
over. While it is open (half-open, in the usual words, while a probe is under way), one probe at a
time goes through. Times are handed in, in monotonic seconds.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.domain.model import TenantId, UserId

_MAX_FAILED_CONNECTIONS = 3  # in a row: nobody listens
_MAX_FAILURES = 10  # in a row, of several users and tenants: it is not about one message
_MIN_FAILED_USERS = 3
MIN_FAILED_TENANTS = 2
_MAX_REMEMBERED_SPANS = 1000  # of time open; older ones count as closed
_FIRST_PROBE_SECONDS = 1.0  # between probes, doubling
_LONGEST_PROBE_SECONDS = 30.0


class Signal(Enum):
    """What the end of an attempt shows about the backend."""

    SUCCESS = auto()
    ANSWER = auto()  # it refused the message, or asked to wait: it is there
    FAILURE = auto()  # no answer, 404, 5xx
    NO_CONNECTION = auto()


@dataclass(slots=True)
class CircuitBreaker:
    """Closed while all is well, open while the backend is away.

    on_change is called with True when it opens, with False when it closes. min_failed_tenants: the
    failures must be of so many; 1 where the URL is one tenant's own.
    """

    on_change: Callable[[bool], None]
    min_failed_tenants: int = MIN_FAILED_TENANTS
    is_open: bool = False
    _failed_connections: int = 0
    _failures: int = 0
    _failed_users: set[UserId] = field(default_factory=set)
    _failed_tenants: set[TenantId] = field(default_factory=set)
    _probe_after: float = _FIRST_PROBE_SECONDS
    _next_probe: float = 0.0
    _opened_at: float = 0.0
    _open_spans: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=_MAX_REMEMBERED_SPANS)
    )

    def record(self, signal: Signal, user: UserId, tenant: TenantId, now: float) -> None:
        """Count the end of an attempt; open or close if that is due."""
        if signal is Signal.SUCCESS or (self.is_open and signal is Signal.ANSWER):
            self.close(now)
        elif signal is Signal.NO_CONNECTION:
            self._failed_connections += 1
        else:
            self._failed_connections = 0

        if signal is Signal.FAILURE:
            self._failures += 1
            self._failed_users.add(user)
            self._failed_tenants.add(tenant)

        if not self.is_open and self._is_backend_away():
            self._open(now)

    def seconds_to_probe(self, now: float) -> float:
        """Seconds until the next probe may go; only while open."""
        return max(0.0, self._next_probe - now)

    def start_probe(self, now: float) -> None:
        """Put off the next probe: one goes now, and each waits longer than the one before."""
        self._probe_after = min(_LONGEST_PROBE_SECONDS, self._probe_after * 2)
        self._next_probe = now + self._probe_after

    def seconds_open(self, since: float, now: float) -> float:
        """Seconds for which it was open between the two."""
        spans = [*self._open_spans, (self._opened_at, now)] if self.is_open else self._open_spans
        return sum(max(0.0, end - max(begin, since)) for begin, end in spans)

    def close(self, now: float) -> None:
        """Close: the backend answered, or no message is left that could probe it."""
        self._failed_connections = self._failures = 0
        self._failed_users.clear()
        self._failed_tenants.clear()
        if self.is_open:
            self._open_spans.append((self._opened_at, now))
            self.is_open = False
            self.on_change(False)

    def _is_backend_away(self) -> bool:
        return self._failed_connections >= _MAX_FAILED_CONNECTIONS or (
            self._failures >= _MAX_FAILURES
            and len(self._failed_users) >= _MIN_FAILED_USERS
            and len(self._failed_tenants) >= self.min_failed_tenants
        )

    def _open(self, now: float) -> None:
        self.is_open = True
        self._opened_at = now
        self._probe_after = _FIRST_PROBE_SECONDS
        self._next_probe = now + _FIRST_PROBE_SECONDS
        self.on_change(True)
