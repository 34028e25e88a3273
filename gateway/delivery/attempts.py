"""How the attempts of each tenant went, of late: whether a failure counts against the message
itself, and when a backoff may end before its time.

By tenant, not by target: one URL serves many tenants, and the fault of one must cost its messages
nothing because another's get through. Times are handed in, in Unix seconds.
"""

from collections import OrderedDict
from dataclasses import dataclass

from gateway.domain.model import TenantId

_MANY_FAILURES = 5  # in a row: that is worth a line in /ready
_MOST_TENANTS = 10_000  # whose attempts are remembered; one forgotten counts as new
_SPACING_SECONDS = 1.0  # backoffs of a tenant are ended no more often


@dataclass(slots=True)
class Record:
    """Of one tenant. failures: in a row, refusals aside."""

    tenant: TenantId
    last_success: float = -1.0  # before all time
    failures: int = 0
    reason: str = ""  # of the last failure
    asked_until: float = 0.0  # when the latest Retry-After is over
    waits: bool = False  # something may wait for a backoff that a success should end
    ended_at: float = -1.0  # when backoffs were ended early last


class Attempts:
    def __init__(self) -> None:
        self._records: OrderedDict[TenantId, Record] = OrderedDict()  # the one used last at the end
        self._asked_until: dict[TenantId, float] = {}  # by a backend that was there

    def succeeded(self, tenant: TenantId, now: float) -> bool:
        """Note it. Whether other messages of the tenant, which wait for a backoff, are due now: it
        works again, and did not ask for time."""
        record = self._of(tenant)
        record.last_success, record.failures = now, 0
        if not record.waits or now < record.asked_until or now - record.ended_at < _SPACING_SECONDS:
            return False
        record.ended_at, record.waits = now, False
        return True

    def failed(
        self,
        tenant: TenantId,
        now: float,
        reason: str,
        *,
        retry_after: float | None,
        was_there: bool = False,
    ) -> None:
        """Note it. retry_after: for how many seconds the backend asked, if it did. was_there: it
        asked this tenant, and was not away itself."""
        record = self._of(tenant)
        record.failures += 1
        record.waits = True
        record.reason = reason
        record.asked_until = max(record.asked_until, now + (retry_after or 0.0))
        if was_there and retry_after:
            self._asked_until[tenant] = max(self._asked_until.get(tenant, 0.0), record.asked_until)

    def any_got_through(self, tenant: TenantId, since: float) -> bool:
        """Whether another message of the tenant did since then."""
        record = self._records.get(tenant)
        return record is not None and record.last_success > since

    def asked_to_wait(self, now: float) -> frozenset[TenantId]:
        """Return tenants for whom a Retry-After still holds, though the circuit breaker closes: the
        backend was there when it asked."""
        self._asked_until = {one: at for one, at in self._asked_until.items() if at > now}
        return frozenset(self._asked_until)

    def failing(self) -> list[Record]:
        """Tenants whose last attempts all failed, the worst first."""
        many = [one for one in self._records.values() if one.failures >= _MANY_FAILURES]
        return sorted(many, key=lambda one: -one.failures)

    def _of(self, tenant: TenantId) -> Record:
        record = self._records.get(tenant)
        if record is None:
            if len(self._records) >= _MOST_TENANTS:
                self._records.popitem(last=False)
            record = self._records[tenant] = Record(tenant)
        self._records.move_to_end(tenant)
        return record
