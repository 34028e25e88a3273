"""The gate of one target URL: closed while the backend behind it is away.

An outage must not burn the attempts of a thousand messages, nor keep them waiting once it is over.
Closed, one probe at a time goes through. Times are handed in, in monotonic
seconds.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.domain.model import TenantId, UserId

_FEW_CONNECTIONS = 3  # in a row that could not be made: nobody listens
_MANY_FAILURES = 10  # in a row, of several users and tenants: it is not about one message
_SEVERAL_USERS, SEVERAL_TENANTS = 3, 2
_REMEMBERED = 1000  # closings; older ones count as open time
_FIRST_PROBE, _LAST_PROBE = 1.0, 30.0  # seconds between probes, doubling


class Sign(Enum):
    """What an attempt says of the backend."""

    SUCCESS = auto()
    ANSWER = auto()  # it refused the message, or asked to wait: it is there
    FAILURE = auto()  # no answer, 404, 5xx
    NO_CONNECTION = auto()


@dataclass(slots=True)
class Gate:
    """changed is called with True when the gate closes, with False when it opens.

    several_tenants: of so many the failures must be; 1 where the URL is one tenant's own.
    """

    changed: Callable[[bool], None]
    several_tenants: int = SEVERAL_TENANTS
    closed: bool = False
    _no_connection: int = 0
    _failures: int = 0
    _users: set[UserId] = field(default_factory=set)
    _tenants: set[TenantId] = field(default_factory=set)
    _probe_after: float = _FIRST_PROBE
    _next_probe: float = 0.0
    _closed_at: float = 0.0
    _closings: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def tell(self, sign: Sign, user: UserId, tenant: TenantId, now: float) -> None:
        """An attempt ended with sign."""
        if sign is Sign.SUCCESS or (self.closed and sign is Sign.ANSWER):
            self.open(now)
        elif sign is Sign.NO_CONNECTION:
            self._no_connection += 1
        else:
            self._no_connection = 0
        if sign is Sign.FAILURE:
            self._failures += 1
            self._users.add(user)
            self._tenants.add(tenant)
        if not self.closed and self._away():
            self._close(now)

    def probe_in(self, now: float) -> float:
        """Seconds until the next probe may go; only while closed."""
        return max(0.0, self._next_probe - now)

    def probing(self, now: float) -> None:
        """A probe goes now; the next one later than after the one before."""
        self._probe_after = min(_LAST_PROBE, self._probe_after * 2)
        self._next_probe = now + self._probe_after

    def seconds_closed(self, since: float, now: float) -> float:
        """How long it was closed between the two."""
        spans = [*self._closings, (self._closed_at, now)] if self.closed else self._closings
        return sum(max(0.0, end - max(begin, since)) for begin, end in spans)

    def _away(self) -> bool:
        return self._no_connection >= _FEW_CONNECTIONS or (
            self._failures >= _MANY_FAILURES
            and len(self._users) >= _SEVERAL_USERS
            and len(self._tenants) >= self.several_tenants
        )

    def _close(self, now: float) -> None:
        self.closed = True
        self._closed_at = now
        self._probe_after = _FIRST_PROBE
        self._next_probe = now + _FIRST_PROBE
        self.changed(True)

    def open(self, now: float) -> None:
        """Somebody answered, or nobody is left who could be asked for."""
        self._no_connection = self._failures = 0
        self._users.clear()
        self._tenants.clear()
        if self.closed:
            self._closings.append((self._closed_at, now))
            self.closed = False
            self.changed(False)
