"""What an operator orders, whether by a program or on the page: carried out, counted and logged."""

import logging
from dataclasses import astuple

from gateway.lids import Lids
from gateway.log import shown
from gateway.metrics import Metrics
from gateway.model import Erased, Selection, TenantId, UserId, is_lid
from gateway.store import Store

log = logging.getLogger(__name__)


class Operator:
    """Every method is durable on return, and raises StoreUnavailable as the store's own do."""

    def __init__(self, store: Store, lids: Lids, metrics: Metrics) -> None:
        self._store = store
        self._lids = lids
        self._metrics = metrics

    async def lock(self, user: UserId, tenant: TenantId) -> tuple[UserId, TenantId | None, int]:
        """As Store.lock()."""
        known, before, released = await self._store.lock(user, tenant)
        self._metrics.lock_changed("operator")
        log.info(
            "✋ An operator locked %s to Tenant %s (before: %s)",
            shown(known),
            tenant,
            before,
            extra={
                "event": "operator.locked",
                "user": shown(known),
                "tenant": tenant,
                "previous": before,
            },
        )
        return known, before, released

    async def unlock(
        self, user: UserId, *, drop_waiting: bool = False
    ) -> tuple[UserId, TenantId | None, int]:
        """As Store.unlock()."""
        known, tenant, dropped = await self._store.unlock(user, drop_waiting=drop_waiting)
        if tenant is not None or dropped:
            self._metrics.lock_changed("unlock", tenant is not None)
            log.info(
                "✋ An operator unlocked %s from Tenant %s",
                shown(known),
                tenant,
                extra={"event": "operator.unlocked", "user": shown(known), "previous": tenant},
            )
        return known, tenant, dropped

    async def move(
        self, old: TenantId, new: TenantId, *, with_waiting: bool = True
    ) -> tuple[int, int]:
        """As Store.move()."""
        users, along = await self._store.move(old, new, with_waiting=with_waiting)
        if users or along:
            self._metrics.lock_changed("tenant_move", users)
            log.info(
                "✋ An operator moved %s users and %s waiting messages of Tenant %s to Tenant %s",
                users,
                along,
                old,
                new,
                extra={"event": "operator.moved", "tenant": new, "previous": old, "users": users},
            )
        return users, along

    async def erase(self, user: UserId) -> tuple[tuple[UserId, ...], Erased]:
        """As Store.erase()."""
        ids, erased = await self._store.erase(user)
        for one in filter(is_lid, ids):
            self._lids.forget(one)
        if any(astuple(erased)):
            self._metrics.lock_changed("erasure", erased.locks)
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

    async def bury(self, which: Selection) -> int:
        """As Store.bury()."""
        count = await self._store.bury(which)
        if count:
            log.info(
                "✋ An operator deleted %s dead letters",
                count,
                extra={"event": "operator.buried", "count": count},
            )
        return count
