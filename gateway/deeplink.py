"""The deep link: "start_realty_42" in what a user writes → tenant 42, and tenant 42 → its link.

https://wa.me/<number>?text=start_realty_42 only fills in the text; the user may edit it, add words
around it, or send it with the direction marks that Arabic keyboards and copied links bring along.
"""

import re
import sys
import unicodedata
from functools import lru_cache
from urllib.parse import quote

from gateway.model import LARGEST_TENANT, TenantId

# WhatsApp's own limit for a text. What stands behind it was not typed by a person.
_LONGEST_TEXT = 65_536
_NUMBER = r"(\d{1,10})(?!\w)"  # \d on purpose: a flyer is read off on a Persian keyboard, too
_INVISIBLE = re.compile(
    "["
    + "".join(chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) == "Cf")
    + "]"
)


def parse(text: str, *, prefix: str, must_open: bool) -> TenantId | None:
    """The tenant that text names, or None.

    must_open: only a link that the text begins with counts. Otherwise the link may stand anywhere
    as a word of its own; of two different ones the text must begin with one.
    """
    text = text[:_LONGEST_TEXT]
    if not text.isascii():
        text = _INVISIBLE.sub("", text)
    link = _link(prefix)
    if (opening := link.match(text.lstrip())) and (tenant := _tenant(opening[1])):
        return tenant
    if must_open:
        return None
    named = {tenant for number in link.findall(text) if (tenant := _tenant(number))}
    return named.pop() if len(named) == 1 else None


def text_of(tenant: TenantId, *, prefix: str, note: str = "") -> str:
    """What a person is to send: the link, and note behind it on a line of its own."""
    return f"{prefix}_{tenant}\n{note}" if note else f"{prefix}_{tenant}"


def address(text: str, *, phone: str) -> str:
    """The wa.me address that fills in text in a chat with phone, given in digits.

    UTF-8, percent-encoded (WhatsApp help centre, "How to use click to chat").
    """
    return f"https://wa.me/{phone}?text={quote(text, safe='')}"


@lru_cache
def _link(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(prefix)}_{_NUMBER}", re.IGNORECASE)


def _tenant(number: str) -> TenantId | None:
    tenant = int(number)
    return TenantId(tenant) if 0 < tenant <= LARGEST_TENANT else None
