"""Which backend each tenant has, and one gate for each URL."""

from collections.abc import Callable
from dataclasses import dataclass

import httpx

from gateway.backend import Backend
from gateway.gate import SEVERAL_TENANTS, Gate
from gateway.model import Address, Among, TenantId
from gateway.tenants import Tenants


@dataclass(slots=True, eq=False)
class Target:
    """One URL. last_success: Unix seconds; before all time if there was none."""

    url: str
    gate: Gate
    last_success: float = -1.0


class Targets:
    """timeout: seconds for one attempt. changed is called with a target whose gate has closed or
    opened."""

    def __init__(
        self,
        shared: Address,
        tenants: Tenants,
        *,
        timeout: float,
        transport: httpx.AsyncBaseTransport,
    ) -> None:
        self.changed: Callable[[Target], None] = lambda _: None
        self.shared = self._target(shared.url)
        self._shared_address = shared
        self._tenants = tenants
        self._timeout = timeout
        self._transport = transport
        self._version = -1
        self._own: dict[TenantId, Address] = {}  # of those who have one
        self._targets = {shared.url: self.shared}
        self._backends: dict[Address, Backend] = {}
        self._open: Among | None = None  # until some gate or the tenants change

    def of(self, tenant: TenantId) -> tuple[Backend, Target]:
        self._follow()
        address = self._own.get(tenant, self._shared_address)
        if address not in self._backends:
            self._backends[address] = Backend(
                address.url,
                timeout=self._timeout,
                secrets=address.secrets,
                transport=self._transport,
            )
        return self._backends[address], self._targets[address.url]

    def open(self) -> Among:
        """The tenants whose gate is open."""
        self._follow()
        if self._open is None:
            others = not self.shared.gate.closed
            self._open = Among(
                frozenset(
                    tenant
                    for tenant, address in self._own.items()
                    if self._targets[address.url].gate.closed is others
                ),
                others,
            )
        return self._open

    def closed(self) -> list[Target]:
        self._follow()
        return [target for target in self._targets.values() if target.gate.closed]

    def tenants_of(self, target: Target) -> Among:
        self._follow()
        if target is self.shared:
            elsewhere = [t for t, address in self._own.items() if address.url != target.url]
            return Among(frozenset(elsewhere), others=True)
        here = [t for t, address in self._own.items() if address.url == target.url]
        return Among(frozenset(here), others=False)

    async def close(self) -> None:
        await self._transport.aclose()

    def _follow(self) -> None:
        """Take up what has changed about the tenants."""
        if self._version == self._tenants.version:
            return
        self._version = self._tenants.version
        listed = self._tenants.listed or {}
        self._own = {t: one.address for t, one in listed.items() if one.address}
        urls = [address.url for address in self._own.values()]
        before = self._targets
        self._targets = {self.shared.url: self.shared} | {
            url: before.get(url) or self._target(url) for url in dict.fromkeys(urls)
        }
        for target in self._targets.values():
            one = target is not self.shared and urls.count(target.url) == 1
            target.gate.several_tenants = 1 if one else SEVERAL_TENANTS
        self._backends.clear()
        self._open = None

    def _target(self, url: str) -> Target:
        def changed(_: bool) -> None:
            self._open = None
            self.changed(target)

        target = Target(url, Gate(changed))
        return target
