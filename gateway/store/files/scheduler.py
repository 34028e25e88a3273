"""Fair shares: whose delivery is next, among the heads of user queues that are due.

Only a window of heads is kept here for each tenant; the rest stay in the database, and `stale()`
says of which tenant more must be fetched. So a million waiting messages cost no memory, and a
message that is delivered as it comes is never read back.
"""

import heapq
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gateway.domain.model import ALL_TENANTS, Delivery, TenantFilter, TenantId, UserId

WINDOW = 64  # heads kept per tenant
_CACHE_BYTES = 32 * 1024 * 1024  # of bodies that wait in the windows; above it they are read back

Queue = tuple[TenantId, UserId]


@dataclass(slots=True)
class Head:
    """The first delivery of a user queue. delivery is None if it must be read before it is sent."""

    id: int
    tenant: TenantId
    user: UserId
    due: float
    delivery: Delivery | None = None


@dataclass(slots=True)
class _Tenant:
    id: TenantId
    waiting: int = 0  # all its deliveries, in flight included
    in_flight: int = 0
    served: int = 0  # the turn in which it was last served
    probed: int = 0
    ready: dict[UserId, Head] = field(default_factory=dict)  # due, oldest first
    more: bool = False  # the database may hold due heads that are not in `ready`
    next_due: float = math.inf  # when heads that are not due yet may be
    place: int = 0  # which of its entries in the heap counts


class FairScheduler:
    """Changed only after a commit: it never knows more than the disk."""

    def __init__(self, max_in_flight: int, max_in_flight_per_tenant: int) -> None:
        self._half = max_in_flight / 2
        self._cap = max_in_flight_per_tenant
        self._tenants: dict[TenantId, _Tenant] = {}
        self._in_flight: dict[int, Head] = {}
        self._busy: dict[Queue, int] = {}
        # (in flight, turn last served, due time of the oldest head, tenant, place)
        self._heap: list[tuple[int, int, float, TenantId, int]] = []
        self._hungry: set[TenantId] = set()  # empty window, and more in the database
        self._dues: list[tuple[float, TenantId]] = []  # heap of next_due, outdated ones included
        self._claimable = ALL_TENANTS  # who may be picked
        self._turn = 0
        self._cached = 0
        self.waiting = 0

    def waiting_of(self, tenant: TenantId) -> int:
        known = self._tenants.get(tenant)
        return known.waiting if known else 0

    def waiting_by_tenant(self) -> dict[TenantId, int]:
        """Of each tenant that has any, the largest first."""
        waiting = [tenant for tenant in self._tenants.values() if tenant.waiting]
        return {one.id: one.waiting for one in sorted(waiting, key=lambda one: -one.waiting)}

    def is_in_flight(self, delivery_id: int) -> bool:
        return delivery_id in self._in_flight

    def in_flight(self) -> list[int]:
        return list(self._in_flight)

    def add(self, tenant: TenantId, count: int = 1) -> None:
        """count deliveries more (or fewer) of tenant are in the database."""
        self._of(tenant).waiting += count
        self.waiting += count

    def offer(self, head: Head, now: float) -> None:
        """head is the first of its user queue now, in place of any other."""
        tenant = self._of(head.tenant)
        self._drop(tenant, head.user)
        if head.due > now:
            self._later(tenant, head.due)
        elif tenant.more or len(tenant.ready) >= WINDOW:
            tenant.more = True
        else:
            if head.delivery and self._cached + len(head.delivery.body) > _CACHE_BYTES:
                head.delivery = None
            self._cached += len(head.delivery.body) if head.delivery else 0
            tenant.ready[head.user] = head
        self._place(tenant)

    def forget(self, tenants: Iterable[TenantId]) -> None:
        """What is known of these tenants' heads no longer holds: look into the database."""
        for id_ in tenants:
            tenant = self._of(id_)
            for user in list(tenant.ready):
                self._drop(tenant, user)
            tenant.more = True
            self._place(tenant)

    def forget_all(self) -> None:
        self.forget(list(self._tenants))

    def rename(self, old: UserId, new: UserId) -> None:
        """Queues of old are queues of new from now on, those in flight too."""
        for head in self._in_flight.values():
            if head.user == old:
                self._unbusy((head.tenant, old))
                head.user = new
                self._busy[head.tenant, new] = self._busy.get((head.tenant, new), 0) + 1

    def stale(self, now: float) -> list[TenantId]:
        """Tenants whose due heads must be fetched: their window is empty and there is more."""
        while self._dues and self._dues[0][0] <= now:
            tenant = self._tenants[heapq.heappop(self._dues)[1]]
            if tenant.next_due <= now:
                tenant.next_due, tenant.more = math.inf, True
                self._place(tenant)
        return list(self._hungry)

    def fetched(
        self, tenant: TenantId, heads: list[Head], *, more: bool, next_due: float, now: float
    ) -> None:
        """All of tenant's due heads are in heads, but for those in flight, unless there is more."""
        known = self._of(tenant)
        known.more, known.next_due = False, math.inf
        if next_due < math.inf:
            self._later(known, next_due)
        for head in heads:
            if (tenant, head.user) not in self._busy:
                self.offer(head, now)
        known.more = known.more or more
        self._place(known)

    def window_of(self, tenant: TenantId) -> int:
        """How many heads to fetch so that a window's worth is not in flight."""
        return WINDOW + self._of(tenant).in_flight

    def set_claimable(self, tenants: TenantFilter, changed: Collection[TenantId] | None) -> None:
        """See base.Store."""
        self._claimable = tenants
        for id_ in self._tenants if changed is None else changed:
            if tenant := self._tenants.get(id_):
                self._place(tenant)

    def waits(self, tenants: TenantFilter) -> bool:
        """Whether any of these tenants has a delivery."""
        if not tenants.others:
            return any(self.waiting_of(tenant) for tenant in tenants.named)
        return any(one.waiting and one.id in tenants for one in self._tenants.values())

    def pick(self, limit: int) -> list[Head]:
        """Up to limit heads, in flight from now on."""
        picked: list[Head] = []
        while len(picked) < limit and self._heap:
            in_flight, _, _, id_, place = self._heap[0]
            tenant = self._tenants[id_]
            if place != tenant.place:
                heapq.heappop(self._heap)
                continue
            # The first in the heap has the fewest in flight: if it is at its cap, all are.
            if in_flight >= self._cap and len(self._in_flight) >= self._half:
                break
            heapq.heappop(self._heap)
            if head := self._take(tenant):
                picked.append(head)
        return picked

    def probe(self, tenants: TenantFilter) -> list[Head]:
        """One head, of that of these tenants which was probed longest ago."""
        some = self._tenants if tenants.others else tenants.named
        known = [tenant for id_ in some if id_ in tenants and (tenant := self._tenants.get(id_))]
        ready = [one for one in known if one.ready]
        for tenant in sorted(ready, key=lambda tenant: tenant.probed):
            if head := self._take(tenant):
                tenant.probed = self._turn
                return [head]
        return []

    def release(self, delivery_id: int) -> None:
        """A picked head is no longer in flight. What follows in its queue must be offered."""
        if head := self._in_flight.pop(delivery_id, None):
            self._unbusy((head.tenant, head.user))
            tenant = self._of(head.tenant)
            tenant.in_flight -= 1
            self._place(tenant)

    def next_due(self) -> float:
        """When stale() may have something new, Unix seconds; infinite: nothing waits for a time."""
        return self._dues[0][0] if self._dues else math.inf

    def _of(self, tenant: TenantId) -> _Tenant:
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = _Tenant(tenant)
        return known

    def _take(self, tenant: _Tenant) -> Head | None:
        self._turn += 1
        taken = None
        while tenant.ready and taken is None:
            head = tenant.ready[next(iter(tenant.ready))]
            self._drop(tenant, head.user)
            # A queue that is in flight offers its next head when that is settled.
            if (tenant.id, head.user) not in self._busy:
                taken = head
        if taken:
            self._in_flight[taken.id] = taken
            self._busy[tenant.id, taken.user] = 1
            tenant.in_flight += 1
            tenant.served = self._turn
        self._place(tenant)
        return taken

    def _drop(self, tenant: _Tenant, user: UserId) -> None:
        head = tenant.ready.pop(user, None)
        if head and head.delivery:
            self._cached -= len(head.delivery.body)

    def _unbusy(self, queue: Queue) -> None:
        left = self._busy[queue] - 1
        if left:
            self._busy[queue] = left
        else:
            del self._busy[queue]

    def _later(self, tenant: _Tenant, due: float) -> None:
        if due < tenant.next_due:
            tenant.next_due = due
            heapq.heappush(self._dues, (due, tenant.id))

    def _place(self, tenant: _Tenant) -> None:
        """Put tenant where it belongs now; its older entries in the heap no longer count."""
        tenant.place += 1
        if tenant.more and not tenant.ready:
            self._hungry.add(tenant.id)
        else:
            self._hungry.discard(tenant.id)
        if len(self._heap) > 64 + 4 * len(self._tenants):
            self._heap = [e for e in self._heap if e[4] == self._tenants[e[3]].place]
            heapq.heapify(self._heap)
        if tenant.ready and tenant.id in self._claimable:
            oldest = next(iter(tenant.ready.values())).due
            entry = (tenant.in_flight, tenant.served, oldest, tenant.id, tenant.place)
            heapq.heappush(self._heap, entry)
