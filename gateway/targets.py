"""Which backend each tenant has, and one gate for each URL.

An Address is a URL with the secrets of a tenant, a Backend posts to an Address, a Target is what
all who have one URL share: its gate. Where tenants.json lists tenants, what waits for another one
stays where it is: a slip in the file must not send it to the common backend.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from gateway.backend import Backend
from gateway.gate import SEVERAL_TENANTS, Gate
from gateway.model import EVERYBODY, Address, Among, TenantId
from gateway.tenants import Tenants

_SEVERAL_FAILURES = 5


@dataclass(slots=True, eq=False)
class Target:
    """One URL. last_success: Unix seconds; before all time if there was none.

    formerly: gates behind which its tenants' messages waited when they had another URL.
    """

    url: str
    gate: Gate
    last_success: float = -1.0
    failures: int = 0  # in a row, refusals aside; the gate may well be open
    last_failure: str = ""
    formerly: list[Gate] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        """It answers, perhaps, but took nothing lately."""
        return self.failures >= _SEVERAL_FAILURES

    def seconds_closed(self, since: float, now: float) -> float:
        """How long messages had to wait between the two, in monotonic seconds."""
        return sum(gate.seconds_closed(since, now) for gate in (self.gate, *self.formerly))


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
        self._listed: frozenset[TenantId] | None = None  # None: every number is a tenant
        self._targets = {shared.url: self.shared}
        self._backends: dict[Address, Backend] = {}
        # Until some gate or the tenants change: all who are open, and those who share a backend.
        self._open: tuple[Among, Among] | None = None

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

    def open(self, *, but_own: bool = False) -> Among:
        """The tenants whose gate is open; but_own: without those who have their own backend."""
        self._follow()
        if self._open is None:
            closed = self.shared.gate.closed
            if self._listed is None:
                sharing = everybody = Among(others=not closed)
            else:
                shared = () if closed else (t for t in self._listed if t not in self._own)
                sharing = Among(frozenset(shared), others=False)
                own = {t for t, address in self._own.items()
                       if not self._targets[address.url].gate.closed}  # fmt: skip
                everybody = Among(sharing.named | own, others=False)
            self._open = everybody, sharing
        return self._open[but_own]

    def closed(self) -> list[Target]:
        self._follow()
        return [target for target in self._targets.values() if target.gate.closed]

    def failing(self) -> list[Target]:
        """Those that answer, but took nothing lately."""
        self._follow()
        return [one for one in self._targets.values() if one.has_failed]

    def tenants_of(self, target: Target) -> Among:
        self._follow()
        if self._listed is None:
            return EVERYBODY
        here = (t for t in self._listed if self._own.get(t, self._shared_address).url == target.url)
        return Among(frozenset(here), others=False)

    async def close(self) -> None:
        await self._transport.aclose()

    def _follow(self) -> None:
        """Take up what has changed about the tenants."""
        if self._version == self._tenants.version:
            return
        self._version = self._tenants.version
        listed, own_before = self._tenants.listed, self._own
        self._listed = None if listed is None else frozenset(listed)
        self._own = {t: one.address for t, one in (listed or {}).items() if one.address}
        urls = Counter(address.url for address in self._own.values())
        before = self._targets
        self._targets = {self.shared.url: self.shared} | {
            url: before.get(url) or self._target(url) for url in urls
        }
        for tenant, address in self._own.items():
            was = own_before.get(tenant, self._shared_address).url
            if address.url not in before and was in before:
                formerly = self._targets[address.url].formerly
                formerly += [one for one in (before[was].gate,) if one not in formerly]
        for target in self._targets.values():
            one = target is not self.shared and urls[target.url] == 1
            target.gate.several_tenants = 1 if one else SEVERAL_TENANTS
        self._backends.clear()
        self._open = None

    def _target(self, url: str) -> Target:
        def changed(_: bool) -> None:
            self._open = None
            self.changed(target)

        target = Target(url, Gate(changed))
        return target
