"""What each tenant got, and when: counted in memory, written to the table tenant now and then.

A statement for each message would cost more than the figures are worth; a crash forgets the last
seconds of them.
"""

import sqlite3
from dataclasses import dataclass

from gateway.domain.model import TenantId

Tx = sqlite3.Connection


@dataclass(slots=True)
class Count:
    """Of one tenant. Times are Unix seconds."""

    delivered: int = 0
    first_seen: float | None = None
    last_seen: float | None = None


class Counts:
    def __init__(self, tx: Tx) -> None:
        rows = tx.execute("SELECT id, delivered, first_seen, last_seen FROM tenant")
        self.all = {tenant: Count(*counts) for tenant, *counts in rows}
        self._changed: set[TenantId] = set()
        self._being_written: set[TenantId] = set()

    def seen(self, tenant: TenantId, at: float) -> None:
        """A message was accepted for tenant."""
        count = self._of(tenant)
        if count.first_seen is None:
            count.first_seen = at
        count.last_seen = at

    def delivered(self, tenant: TenantId) -> None:
        self._of(tenant).delivered += 1

    def write(self, tx: Tx) -> None:
        """What has changed; the same again, and more, until written() is called."""
        self._being_written |= self._changed
        self._changed.clear()
        tx.executemany(
            "INSERT OR REPLACE INTO tenant VALUES (?, ?, ?, ?)",
            [
                (tenant, count.delivered, count.first_seen, count.last_seen)
                for tenant in self._being_written
                for count in (self.all[tenant],)
            ],
        )

    def written(self) -> None:
        """What write() wrote is durable."""
        self._being_written.clear()

    def _of(self, tenant: TenantId) -> Count:
        self._changed.add(tenant)
        return self.all.setdefault(tenant, Count())
