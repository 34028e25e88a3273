"""Which backend each tenant has, one gate for each URL, and whose messages may be sent now.

An Address is a URL with the secrets of a tenant, a Backend posts to an Address, a Target is what
all who have one URL share: its gate, and a bound of what is in flight. Where tenants.json lists
tenants, what waits for another one stays where it is: a slip in the file must not send it to the
common backend.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import httpx

from gateway.delivery.backend import Backend
from gateway.delivery.circuit_breaker import SEVERAL_TENANTS, Gate
from gateway.domain.model import EVERYBODY, Address, Among, TenantId
from gateway.tenants.registry import Tenants

_LOOKED_AT = 256  # full targets, when room was made


@dataclass(slots=True, eq=False)
class Target:
    """One URL. in_flight: attempts under way, probes included. tenants: of one that is not the
    common backend.
    """

    url: str
    gate: Gate
    in_flight: int = 0
    tenants: frozenset[TenantId] = frozenset()


class Targets:
    """timeout: seconds for one attempt.

    Own backends together get half of max_in_flight, so that the common one keeps the rest. One of
    them gets max_in_flight_per_tenant, and no more than it leaves free: what several slow ones have
    taken does not stop the next one.

    changed is called with a target whose gate has closed or opened; serve with those for whom
    messages may be claimed from now on, a set that changes, and the tenants of whom that is new,
    None if it may be of any.
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
        self.changed: Callable[[Target], None] = lambda _: None
        self.serve: Callable[[Among, Collection[TenantId] | None], None] = lambda *_: None
        self.serving = Among(set())
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
        # Gates behind which tenants' messages waited when they had another URL.
        self._formerly: dict[TenantId, list[Gate]] = {}
        self._closed: dict[Target, None] = {}
        self._full: dict[Target, None] = {}  # no room for another attempt, the longest first
        self._unlisted: set[TenantId] = set()  # something waits, and the file lacks them
        self._follow()
        self._formerly.clear()  # nobody had another URL before
        tenants.changed = self._follow

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
            self._set_served([tenant], served=False)
        elif not self.has_room(target):
            self._mark_full(target)
        elif not target.gate.closed:
            return target
        return None

    def has_room(self, target: Target) -> bool:
        """Whether one more attempt at target may begin."""
        if target is self.shared:
            return True
        left = self._own_slots - self._own_in_flight
        return left > 0 and (target.in_flight == 0 or target.in_flight < min(self._cap, left))

    def begins(self, target: Target) -> None:
        """An attempt at target, a probe too."""
        target.in_flight += 1
        if target is not self.shared:
            self._own_in_flight += 1
            if not self.has_room(target):
                self._mark_full(target)

    def ends(self, target: Target) -> None:
        """An attempt at target that began."""
        target.in_flight -= 1
        if target is not self.shared:
            self._own_in_flight -= 1
        self.make_room()

    def make_room(self) -> None:
        """Let those go on for whom there is room again, as many as there is room for."""
        left = self._own_slots - self._own_in_flight
        for target in list(itertools.islice(self._full, _LOOKED_AT)):
            if left <= 0:
                return
            if self.has_room(target):
                left -= 1
                del self._full[target]
                if not target.gate.closed:
                    self._set_served(target.tenants, served=True)

    def seconds_closed(self, tenant: TenantId, target: Target, since: float, now: float) -> float:
        """How long tenant's messages had to wait between the two, in monotonic seconds."""
        gates = {id(gate): gate for gate in (target.gate, *self._formerly.get(tenant, ()))}
        return math.fsum(gate.seconds_closed(since, now) for gate in gates.values())

    def closed(self) -> list[Target]:
        """Those whose gate is closed."""
        return list(self._closed)

    def is_closed(self, target: Target) -> bool:
        """False, too, if no tenant has that URL any more."""
        return target in self._closed

    def tenants_of(self, target: Target) -> Among:
        if target is not self.shared:
            return Among(target.tenants, others=False)
        listed = self._tenants.listed
        if listed is None:
            return EVERYBODY
        return Among(frozenset(t for t in listed if t not in self._own), others=False)

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
            target.gate.several_tenants = 1 if len(those) == 1 else SEVERAL_TENANTS
            self._own |= dict.fromkeys(those, target)
        for tenant in {*self._own, *own_before}:
            was = own_before.get(tenant, self.shared)
            if was is not self._own.get(tenant, self.shared):
                self._formerly.setdefault(tenant, []).append(was.gate)
        self._closed = {one: None for one in self._targets.values() if one.gate.closed}
        self._full = {one: None for one in self._targets.values() if not self.has_room(one)}
        self._unlisted.clear()
        self._backends.clear()
        self._serve_anew()

    def _serve_anew(self) -> None:
        """Say of everybody whether they are served; seldom, for it looks at all."""
        others = not self.shared.gate.closed
        apart = {
            tenant for tenant, target in self._own.items() if self._is_served(target) != others
        }
        if others:
            apart |= self._unlisted
        self.serving = Among(apart, others=others)
        self.serve(self.serving, None)

    def _is_served(self, target: Target) -> bool:
        return not target.gate.closed and target not in self._full

    def _set_served(self, tenants: Iterable[TenantId], *, served: bool) -> None:
        """From now on deliveries of these tenants may be claimed, or may not."""
        tenants, named = list(tenants), self.serving.named
        assert isinstance(named, set)
        if served != self.serving.others:
            named.update(tenants)
        else:
            named.difference_update(tenants)
        self.serve(self.serving, tenants)

    def _mark_full(self, target: Target) -> None:
        # One that no tenant has any more is nothing to us.
        if target not in self._full and self._targets.get(target.url) is target:
            self._full[target] = None
            self._set_served(target.tenants, served=False)

    def _target(self, url: str) -> Target:
        def changed(closed: bool) -> None:
            if self._targets.get(url) is target:  # else nobody has that URL any more
                if closed:
                    self._closed[target] = None
                else:
                    self._closed.pop(target, None)
                if target is self.shared:
                    self._serve_anew()
                else:
                    self._set_served(target.tenants, served=self._is_served(target))
            self.changed(target)

        target = Target(url, Gate(changed))
        return target
