"""What an operator orders, whether by a program or on the page: carried out, counted and logged."""

import logging
from dataclasses import astuple

from gateway.domain.model import Erased, Selection, TenantId, UserId, is_lid, unscoped
from gateway.errors import NotLockable
from gateway.log import shown
from gateway.metrics import Metrics
from gateway.store import Store
from gateway.tenants.registry import Tenants
from gateway.waha.clock_skew import ClockSkew
from gateway.waha.lid_lookup import LidLookup
from gateway.waha.own_numbers import OwnNumbers

_REFUSALS = {
    "no_tenant": "is not in tenants.json: add it there first",
    "inactive": "is not active: see tenants.json",
}

log = logging.getLogger(__name__)


class Actions:
    """Every method is durable on return, and raises StoreUnavailable as the store's own do."""

    def __init__(
        self,
        store: Store,
        tenants: Tenants,
        own_numbers: OwnNumbers,
        lid_lookup: LidLookup,
        metrics: Metrics,
        skew: ClockSkew,
    ) -> None:
        self._store = store
        self._tenants = tenants
        self._own_numbers = own_numbers
        self._lid_lookup = lid_lookup
        self._metrics = metrics
        self._skew = skew

    def check_lock(self, user: UserId, tenant: TenantId) -> None:
        """Return if user may be locked to tenant; raise NotLockable."""
        if unscoped(user) in self._own_numbers.all:
            raise NotLockable(
                f"{unscoped(user)} is the gateway's own number: no user", "own_number"
            )
        self._check_tenant(tenant)

    def _check_tenant(self, tenant: TenantId) -> None:
        if refusal := self._tenants.refusal(tenant):
            raise NotLockable(f"tenant {tenant} {_REFUSALS[refusal]}", refusal)

    async def lock(self, user: UserId, tenant: TenantId) -> tuple[UserId, TenantId | None, int]:
        """As Store.lock(). Raise NotLockable."""
        self.check_lock(user, tenant)
        return await self._store.lock(user, tenant, at=self._skew.decided_at(user))

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False
    ) -> tuple[UserId, TenantId | None, int]:
        """As Store.unlock()."""
        known, tenant, dropped = await self._store.unlock(
            user, drop_waiting=drop_waiting, at=self._skew.decided_at(user)
        )
        if dropped:
            log.info(
                "✋ An operator gave up on %s waiting messages of %s",
                dropped,
                shown(known),
                extra={"event": "operator.dropped", "user": shown(known), "count": dropped},
            )
        return known, tenant, dropped

    async def move(
        self, old: TenantId, new: TenantId, *, with_waiting: bool = True
    ) -> tuple[int, int]:
        """As Store.move(). Raise NotLockable."""
        self._check_tenant(new)
        users, along = await self._store.move(
            old, new, with_waiting=with_waiting, at=self._skew.decided_at()
        )
        if users or along:
            self._metrics.lock_changed("moved", "tenant_move", users)
            log.info(
                "✋ An operator moved %s users and %s waiting messages of Tenant %s to Tenant %s",
                users,
                along,
                old,
                new,
                extra={
                    "event": "operator.tenant_moved",
                    "tenant": new,
                    "previous": old,
                    "users": users,
                },
            )
        return users, along

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        """As Store.erase()."""
        ids, erased = await self._store.erase(user)
        for one in filter(is_lid, ids):
            self._lid_lookup.forget(one)
        if any(astuple(erased)):
            log.info("✋ An operator erased a person", extra={"event": "operator.erased"})
        return ids, erased

    async def replay(self, which: Selection) -> int:
        """As Store.replay()."""
        count = await self._store.replay(which)
        if count:
            log.info(
                "✋ An operator let %s dead letters be delivered again",
                count,
                extra={"event": "operator.replayed", "count": count},
            )
        return count

    async def delete_dead_letters(self, which: Selection) -> int:
        """As Store.delete_dead_letters()."""
        count = await self._store.delete_dead_letters(which)
        if count:
            log.info(
                "✋ An operator deleted %s dead letters",
                count,
                extra={"event": "operator.deleted", "count": count},
            )
        return count
