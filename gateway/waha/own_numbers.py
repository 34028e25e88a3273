"""The gateway's own numbers: to each other they are no users."""

from collections.abc import Mapping

from gateway.domain.model import Tenant, TenantId
from gateway.tenants.registry import Tenants
from gateway.waha.sessions import Sessions


class OwnNumbers:
    """Phones and LIDs: GATEWAY_PHONE, those that tenants.json names, those of WAHA's sessions."""

    def __init__(self, gateway_phone: str, tenants: Tenants, sessions: Sessions) -> None:
        self._gateway_phone = gateway_phone
        self._tenants = tenants
        self._sessions = sessions
        self._made_of: tuple[Mapping[TenantId, Tenant] | None, frozenset[str]] | None = None
        self._all = frozenset[str]()

    @property
    def all(self) -> frozenset[str]:
        # Asked for each webhook: both sources are replaced when they change.
        sources = (self._tenants.listed, self._sessions.own_ids)
        made_of = self._made_of
        if made_of is None or made_of[0] is not sources[0] or made_of[1] is not sources[1]:
            named = {one.gateway_phone for one in (sources[0] or {}).values() if one.gateway_phone}
            self._all, self._made_of = sources[1] | named | {self._gateway_phone}, sources
        return self._all
