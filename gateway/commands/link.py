"""link: a tenant's link, and its QR code as a file."""

import argparse
import sys

from gateway import deeplink, qr
from gateway.errors import TooLongForQr
from gateway.model import LARGEST_TENANT, TenantId
from gateway.settings import Settings
from gateway.tenants import FILE_NAME, Tenants


def link(settings: Settings, options: argparse.Namespace) -> int:
    """Show options.tenant's link, and draw it into options.qr; the exit status."""
    if not 1 <= options.tenant <= LARGEST_TENANT:
        print(f"{options.tenant} is no tenant: a number of 1-{LARGEST_TENANT}", file=sys.stderr)
        return 2
    number = TenantId(options.tenant)
    tenant = Tenants(settings.data_dir / FILE_NAME).get(number)
    if tenant is None:
        print(f"tenant {number} is not in {FILE_NAME}", file=sys.stderr)
        return 1
    if not tenant.active:
        print(f"tenant {number} is not active: the link locks nobody", file=sys.stderr)
    try:
        options.text.encode()
    except UnicodeEncodeError:
        print("--text: is not UTF-8", file=sys.stderr)
        return 2
    text = deeplink.text_of(number, prefix=settings.deep_link_prefix, note=options.text)
    address = deeplink.address(text, phone=tenant.gateway_phone or settings.gateway_phone)
    if options.qr:
        draw = {".svg": qr.svg, ".png": qr.png}.get(options.qr.suffix.lower())
        if draw is None or not (32 <= options.size <= 4096 and 0 <= options.margin <= 50):
            print(
                f"{options.qr}: a name that ends with .svg or .png, --size 32-4096, --margin 0-50",
                file=sys.stderr,
            )
            return 2
        try:
            options.qr.write_bytes(draw(address, size=options.size, margin=options.margin))
        except (TooLongForQr, OSError) as exc:
            print(f"{options.qr}: {exc}", file=sys.stderr)
            return 1
    print(address)
    return 0
