"""Which backend each tenant has, one breaker for each URL, and whose messages may be sent now.

An Address is a URL with the secrets of a tenant, a Backend posts to an Address, a Target is what
all who have one URL share: its circuit breaker, and a bound of what is in flight. Where
tenants.json lists tenants, what waits for another one stays where it is: a slip in the file must
not send it to the common backend.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import httpx

from gateway.delivery.backend import Backend
from gateway.delivery.circuit_breaker import MIN_FAILED_TENANTS, CircuitBreaker
from gateway.domain.model import ALL_TENANTS, Address, TenantFilter, TenantId
from gateway.tenants.registry import Tenants

_LOOKED_AT = 256  # full targets, when room was made


@dataclass(slots=True, eq=False)
class Target:
    """One URL. in_flight: attempts under way, probes included. tenants: of one that is not the
    common backend.
    """

    url: str
    breaker: CircuitBreaker
    in_flight: int = 0
    tenants: frozenset[TenantId] = frozenset()


class Targets:
    """timeout: seconds for one attempt.

    Own backends together get half of max_in_flight, so that the common one keeps the rest. One of
    them gets max_in_flight_per_tenant, and no more than it leaves free: what several slow ones have
    taken does not stop the next one.

    """

    def __init__(
        self,
        shared: Address,
        tenants: Tenants,
        *,
        timeout: float,
        transport: httpx.AsyncBaseTransport,
        max_in_flight: int = 256,
        max_in_flight_per_tenant: int = 32,
    ) -> None:
        self._on_breaker_change: Callable[[Target], None] = lambda _: None
        self._on_claimable: Callable[[TenantFilter, Collection[TenantId] | None], None]
        self._on_claimable = lambda *_: None
        self.claimable = TenantFilter(set())
        self.shared = self._target(shared.url)
        self._shared_address = shared
        self._tenants = tenants
        self._timeout = timeout
        self._transport = transport
        self._own_slots = max_in_flight // 2
        self._own_in_flight = 0
        self._cap = max_in_flight_per_tenant
        self._addresses: dict[TenantId, Address] = {}  # of those who have one of their own
        self._own: dict[TenantId, Target] = {}  # of those whose URL is not the common one
        self._targets = {shared.url: self.shared}
        self._backends: dict[Address, Backend] = {}
        # Breakers behind which tenants' messages waited when they had another URL.
        self._formerly: dict[TenantId, list[CircuitBreaker]] = {}
        self._open: dict[Target, None] = {}
        self._full: dict[Target, None] = {}  # no room for another attempt, the longest first
        self._unlisted: set[TenantId] = set()  # something waits, and the file lacks them
        self._follow()
        self._formerly.clear()  # nobody had another URL before
        tenants.on_change(self._follow)

    def connect(
        self,
        *,
        on_breaker_change: Callable[[Target], None],
        on_claimable: Callable[[TenantFilter, Collection[TenantId] | None], None],
    ) -> None:
        """Call on_breaker_change with each target whose circuit breaker opens or closes, and
        on_claimable with the tenants for whom messages may be claimed, now and after each change.

        on_claimable gets a set that changes, and the tenants of whom that is new; None: of any.
        """
        self._on_breaker_change = on_breaker_change
        self._on_claimable = on_claimable
        on_claimable(self.claimable, None)

    def of(self, tenant: TenantId) -> tuple[Backend, Target] | None:
        """Where the tenant's messages go now; None: nowhere, tenants.json does not list it."""
        target = self._target_of(tenant)
        if target is None:
            return None
        address = self._addresses.get(tenant, self._shared_address)
        if address not in self._backends:
            self._backends[address] = Backend(
                address.url,
                timeout=self._timeout,
                secrets=address.secrets,
                transport=self._transport,
            )
        return self._backends[address], target

    def admit(self, tenant: TenantId) -> Target | None:
        """Where what was claimed for tenant may go now; None if it may not: then nothing more is
        claimed for it until it may."""
        target = self._target_of(tenant)
        if target is None:
            self._unlisted.add(tenant)
            self._set_claimable([tenant], claimable=False)
        elif not self.has_room(target):
            self._mark_full(target)
        elif not target.breaker.is_open:
            return target
        return None

    def has_room(self, target: Target) -> bool:
        """Whether one more attempt at target may begin."""
        if target is self.shared:
            return True
        left = self._own_slots - self._own_in_flight
        return left > 0 and (target.in_flight == 0 or target.in_flight < min(self._cap, left))

    def start_attempt(self, target: Target) -> None:
        """An attempt at target, a probe too."""
        target.in_flight += 1
        if target is not self.shared:
            self._own_in_flight += 1
            if not self.has_room(target):
                self._mark_full(target)

    def end_attempt(self, target: Target) -> None:
        """An attempt at target that began."""
        target.in_flight -= 1
        if target is not self.shared:
            self._own_in_flight -= 1
        self.admit_waiting()

    def admit_waiting(self) -> None:
        """Let those go on for whom there is room again, as many as there is room for."""
        left = self._own_slots - self._own_in_flight
        for target in list(itertools.islice(self._full, _LOOKED_AT)):
            if left <= 0:
                return
            if self.has_room(target):
                left -= 1
                del self._full[target]
                if not target.breaker.is_open:
                    self._set_claimable(target.tenants, claimable=True)

    def seconds_open(self, tenant: TenantId, target: Target, since: float, now: float) -> float:
        """How long tenant's messages had to wait between the two, in monotonic seconds."""
        breakers = {id(one): one for one in (target.breaker, *self._formerly.get(tenant, ()))}
        return math.fsum(one.seconds_open(since, now) for one in breakers.values())

    def open_targets(self) -> list[Target]:
        """Return those whose circuit breaker is open."""
        return list(self._open)

    def is_open(self, target: Target) -> bool:
        """False, too, if no tenant has that URL any more."""
        return target in self._open

    def tenants_of(self, target: Target) -> TenantFilter:
        if target is not self.shared:
            return TenantFilter(target.tenants, others=False)
        listed = self._tenants.listed
        if listed is None:
            return ALL_TENANTS
        return TenantFilter(frozenset(t for t in listed if t not in self._own), others=False)

    async def close(self) -> None:
        await self._transport.aclose()

    def _target_of(self, tenant: TenantId) -> Target | None:
        return self._own.get(tenant, self.shared) if self._tenants.get(tenant) else None

    def _follow(self) -> None:
        """Take up what has changed about the tenants."""
        own_before, before = self._own, self._targets
        listed = self._tenants.listed or {}
        self._addresses = {t: one.address for t, one in listed.items() if one.address}
        tenants: dict[str, list[TenantId]] = {}
        for tenant, address in self._addresses.items():
            if address.url != self.shared.url:
                tenants.setdefault(address.url, []).append(tenant)
        self._targets = {self.shared.url: self.shared}
        self._own = {}
        for url, those in tenants.items():
            target = self._targets[url] = before.get(url) or self._target(url)
            target.tenants = frozenset(those)
            target.breaker.min_failed_tenants = 1 if len(those) == 1 else MIN_FAILED_TENANTS
            self._own |= dict.fromkeys(those, target)
        for tenant in {*self._own, *own_before}:
            was = own_before.get(tenant, self.shared)
            if was is not self._own.get(tenant, self.shared):
                self._formerly.setdefault(tenant, []).append(was.breaker)
        self._open = {one: None for one in self._targets.values() if one.breaker.is_open}
        self._full = {one: None for one in self._targets.values() if not self.has_room(one)}
        self._unlisted.clear()
        self._backends.clear()
        self._rebuild_claimable()

    def _rebuild_claimable(self) -> None:
        """Work out anew for whom messages may be claimed; seldom, for it looks at everybody."""
        others = not self.shared.breaker.is_open
        apart = {
            tenant for tenant, target in self._own.items() if self._is_claimable(target) != others
        }
        if others:
            apart |= self._unlisted
        self.claimable = TenantFilter(apart, others=others)
        self._on_claimable(self.claimable, None)

    def _is_claimable(self, target: Target) -> bool:
        return not target.breaker.is_open and target not in self._full

    def _set_claimable(self, tenants: Iterable[TenantId], *, claimable: bool) -> None:
        """From now on deliveries of these tenants may be claimed, or may not."""
        tenants, named = list(tenants), self.claimable.named
        assert isinstance(named, set)
        if claimable != self.claimable.others:
            named.update(tenants)
        else:
            named.difference_update(tenants)
        self._on_claimable(self.claimable, tenants)

    def _mark_full(self, target: Target) -> None:
        # One that no tenant has any more is nothing to us.
        if target not in self._full and self._targets.get(target.url) is target:
            self._full[target] = None
            self._set_claimable(target.tenants, claimable=False)

    def _target(self, url: str) -> Target:
        def breaker_changed(is_open: bool) -> None:
            if self._targets.get(url) is target:  # else nobody has that URL any more
                if is_open:
                    self._open[target] = None
                else:
                    self._open.pop(target, None)
                if target is self.shared:
                    self._rebuild_claimable()
                else:
                    self._set_claimable(target.tenants, claimable=self._is_claimable(target))
            self._on_breaker_change(target)

        target = Target(url, CircuitBreaker(breaker_changed))
        return target
