"""The deep link: "start_realty_42" in what a user writes → tenant 42, and tenant 42 → its link.

https://wa.me/<number>?text=start_realty_42 only fills in the text; the user may edit it, add words
around it, mark it bold, or send it with the invisible characters that keyboards and copied links
bring along. A number that is cut short would be another tenant's, so what may be a longer number
("start_realty_1,234") is no link at all.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from unicodedata import category
from urllib.parse import quote, unquote

from gateway.domain.model import LARGEST_TENANT, TenantId

# WhatsApp's own limit for a text. What comes behind it was not typed by a person.
_LONGEST_TEXT = 65_536
_MOST_LINKS = 50  # looked at in one text
_LONGEST_RUN = 12  # of quotation marks, bullets and emphasis in front of a link

# Characters without a glyph: Unicode's property Default_Ignorable_Code_Point
# (DerivedCoreProperties.txt, Unicode 16), and format characters (Cf).
_IGNORABLE_RANGES = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5),
    (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164),
    (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip


_LAST_CODE = 0x1FFFF  # of what is looked for; further up are variation selectors and tags, above


def _ranges(*wanted: str) -> str:
    """The characters of some Unicode categories, for a regular expression's [ ]."""
    codes = (code for code in range(_LAST_CODE + 1) if category(chr(code)) in wanted)
    runs = itertools.groupby(enumerate(codes), key=lambda pair: pair[1] - pair[0])
    bounds = ([code for _, code in run] for _, run in runs)
    return "".join(f"{re.escape(chr(run[0]))}-{re.escape(chr(run[-1]))}" for run in bounds)


# Marks go as well: those that combine with digits (keycaps, underlined numbers) would cut the
# number, and NFKC sorts long runs of them in quadratic time (UAX #15, "Stream-Safe Text Format").
_UNSEEN = re.compile(
    f"[{_ranges('Cf', 'Mn', 'Me', 'Mc')}"
    + "".join(f"{chr(first)}-{chr(last)}" for first, last in _IGNORABLE_RANGES)
    + "]"
)
_LIGATURES = re.compile("[\ufdfa\ufdfb]")  # of whole sentences: NFKC makes 18 letters of one
# Between two digits each of these may belong to one number: 1,234 2.5 1'234 2-3 2/3 10:30, and
# no-break blanks. What does separate is a blank, the end of a line, and an opening bracket.
_JOINING = r"[^\w \t\r\n\v\f\u0085\u2028\u2029\u3000(\[{]"
_JOINED = re.compile(rf"(?<=\d){_JOINING}+(?=\d)")
_GOES_ON = re.compile(rf"{_JOINING}+\d|\w")
_GROUPS = "\u066c"  # Arabic thousands separator: in place of what NFKC would make a blank of
_OTHER_NUMBERS = _ranges("No")
_OTHER_NUMBER = re.compile(f"(?<=\\d)[{_OTHER_NUMBERS}]|[{_OTHER_NUMBERS}](?=\\d)")
_DIGIT = re.compile(r"\d")
_EMPHASIS = "*_~`"  # WhatsApp's help centre, "How to format your messages"
# What people put around a link that is all they send: quotation marks, "> ", bullets.
_QUOTES = r"\"'«»‹›“”‘’‛‟„‚「」『』*_~`"
_BEFORE = re.compile(rf"(?:[\s>{_QUOTES}•·◦▪‣●○–—-]|[0-9]{{1,2}}[.)]\s)*")
_AFTER = re.compile(rf"[\s{_QUOTES}]*[.!,;]?[\s{_QUOTES}]*")


def parse(text: str, *, prefix: str, must_open: bool) -> TenantId | None:
    """The tenant that text names, or None.

    must_open: only a link that the text begins with counts. Otherwise the link may be anywhere
    as a word of its own; of two different ones the text must begin with one.
    """
    text = _plain(text[:_LONGEST_TEXT]).lstrip()
    if not _mention(prefix).search(text):  # as in nearly all messages
        return None
    named: set[TenantId] = set()
    for tenant, opens in _links(text, prefix):
        if opens:
            return tenant
        named.add(tenant)
    return named.pop() if len(named) == 1 and not must_open else None


def text_of(tenant: TenantId, *, prefix: str, note: str = "") -> str:
    """What a person is to send: the link, and note behind it on a line of its own."""
    return f"{prefix}_{tenant}\n{note}" if note else f"{prefix}_{tenant}"


def address(text: str, *, phone: str) -> str:
    """The wa.me address that fills in text in a chat with phone, given in digits.

    UTF-8, percent-encoded (WhatsApp help centre, "How to use click to chat").
    """
    return f"https://wa.me/{phone}?text={quote(text, safe='')}"


@lru_cache(maxsize=16)  # a locked user's text is looked at twice
def _plain(text: str) -> str:
    """text in NFKC without what nobody sees; what NFKC would hide of a number stays visible."""
    if "%" in text:  # an address that was copied whole
        text = unquote(text, errors="replace")
    if text.isascii():
        return text
    text = _LIGATURES.sub(" ", _UNSEEN.sub("", text))
    if _DIGIT.search(text):
        text = _OTHER_NUMBER.sub("x", _JOINED.sub(_GROUPS, text))
    return unicodedata.normalize("NFKC", text)


def _links(text: str, prefix: str) -> Iterator[tuple[TenantId, bool]]:
    """Each link of text with whether the text begins with it. text has no blanks in front."""
    for number, found in enumerate(_link(prefix).finditer(text)):
        if number == _MOST_LINKS:
            return
        behind = _behind(text, found)
        if behind is None:
            continue
        tenant = int(found[2])
        if 0 < tenant <= LARGEST_TENANT:
            yield TenantId(tenant), _opens(text, found, *behind)


def _behind(text: str, found: re.Match[str]) -> tuple[str, bool] | None:
    """What follows the link and its emphasis, and whether that is closed right behind the link;
    None if the number goes on there, or a word does."""
    rest = text[found.end() :]
    marks = found[1]
    is_closed = rest[: len(marks)] == marks[::-1]
    if is_closed:
        rest = rest[len(marks) :]
    elif "_" in marks and not re.search(r"_(?!\w)", rest):
        return None  # an underscore that nothing closes belongs to the word
    return None if _GOES_ON.match(rest) else (rest, is_closed)


def _opens(text: str, found: re.Match[str], rest: str, is_closed: bool) -> bool:
    """Whether text begins with the link: emphasis aside, and quotation marks and bullets as well if
    the link is all that it says."""
    before = text[: found.start()]
    if not before and (is_closed or all(mark in rest for mark in found[1])):
        return True  # emphasis ends somewhere; a bullet does not
    if len(before) > _LONGEST_RUN or not _BEFORE.fullmatch(before + found[1]):
        return False
    return _AFTER.fullmatch(rest) is not None


@lru_cache
def _mention(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(f"{prefix}_"), re.IGNORECASE)


@lru_cache
def _link(prefix: str) -> re.Pattern[str]:
    """Emphasis, if any, and a link behind it that begins a word."""
    marks = re.escape(_EMPHASIS)
    return re.compile(
        rf"(?<![\w{marks}])([{marks}]{{0,{_LONGEST_RUN}}})(?<![^\W_]){re.escape(prefix)}_(\d{{1,10}})",
        re.IGNORECASE,
    )
