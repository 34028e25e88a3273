"""The link that a tenant hands out: which text, to which number."""

from dataclasses import dataclass

from gateway.domain import deep_link
from gateway.domain.model import TenantId
from gateway.settings import Settings
from gateway.tenants.registry import Tenants


@dataclass(frozen=True, slots=True)
class Link:
    """url: the wa.me address. active: whether it locks anybody."""

    url: str
    text: str
    phone: str
    name: str
    active: bool


class Links:
    def __init__(self, tenants: Tenants, settings: Settings) -> None:
        self._tenants = tenants
        self._prefix = settings.deep_link_prefix
        self._gateway_phone = settings.gateway_phone

    def of(self, number: TenantId, note: str = "") -> Link | None:
        """None: there is no such tenant. note follows the link, on a line of its own."""
        tenant = self._tenants.get(number)
        if tenant is None:
            return None
        phone = tenant.gateway_phone or self._gateway_phone
        text = deep_link.text_of(number, prefix=self._prefix, note=note)
        url = deep_link.address(text, phone=phone)
        return Link(url, text, phone, tenant.name, tenant.active)
