"""link: a tenant's link, and its QR code as a file."""

import argparse
import sys

from gateway.domain.model import LARGEST_TENANT, TenantId
from gateway.errors import TooLongForQr
from gateway.settings import Settings
from gateway.tenants import qr
from gateway.tenants.links import Links
from gateway.tenants.registry import FILE_NAME, Tenants


def link(settings: Settings, options: argparse.Namespace) -> int:
    """Show options.tenant's link, and draw it into options.qr; the exit status."""
    if not 1 <= options.tenant <= LARGEST_TENANT:
        print(f"{options.tenant} is no tenant: a number of 1-{LARGEST_TENANT}", file=sys.stderr)
        return 2
    number = TenantId(options.tenant)
    links = Links(Tenants(settings.data_dir / FILE_NAME), settings)
    try:
        found = links.of(number, options.text)
    except UnicodeEncodeError:
        print("--text: is not UTF-8", file=sys.stderr)
        return 2
    if found is None:
        print(f"tenant {number} is not in {FILE_NAME}", file=sys.stderr)
        return 1
    if not found.active:
        print(f"tenant {number} is not active: the link locks nobody", file=sys.stderr)
    if options.qr:
        draw = {".svg": qr.svg, ".png": qr.png}.get(options.qr.suffix.lower())
        if draw is None or not (32 <= options.size <= 4096 and 0 <= options.margin <= 50):
            print(
                f"{options.qr}: a name that ends with .svg or .png, --size 32-4096, --margin 0-50",
                file=sys.stderr,
            )
            return 2
        try:
            options.qr.write_bytes(draw(found.url, size=options.size, margin=options.margin))
        except (TooLongForQr, OSError) as exc:
            print(f"{options.qr}: {exc}", file=sys.stderr)
            return 1
    print(found.url)
    return 0
