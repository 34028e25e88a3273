"""A person's id as people write it: "+971 50 123 4567", "00971…", "971501234567@c.us", "…@lid"."""

import re
import unicodedata

_PHONE = re.compile(r"\+?([0-9]{5,20})(?:@c\.us|@s\.whatsapp\.net)?")
_LID = re.compile(r"[0-9]{5,20}@lid")
# A spreadsheet's 491511234567.0, and two numbers in one: +49 1511 234567/8.
_NO_NUMBER = re.compile(r"\.0+$|/[0-9]{1,2}$")
_TRUNK = re.compile(r"^(\s*(?:\+|00)[0-9 ]+)\(0\)")  # +971 (0)50 …: not dialled from abroad
_SAME_LETTERS = str.maketrans("يىك", "ییک")
_SHORTEST = 5  # digits of a phone
_PUNCTUATION = re.compile(r"[\s()./‐-―-]")  # only before the @: the dot of @c.us is kept


def person(text: str) -> str | None:
    """Phone digits or …@lid; None if text is neither."""
    text = "".join(map(_plain, text)).strip()
    if _LID.fullmatch(text):
        return text
    number, at, server = text.partition("@")
    if _NO_NUMBER.search(number):
        return None
    number = _TRUNK.sub(r"\1", number)
    found = _PHONE.fullmatch(_PUNCTUATION.sub("", number) + at + server)
    if not found:
        return None
    if at:  # as WhatsApp writes it
        return found[1]
    # 00 is the prefix for calls abroad; no country's code begins with 0 (ITU-T E.164), so a number
    # that does is one without it.
    number = found[1].removeprefix("00") if len(found[1]) > _SHORTEST + 1 else found[1]
    return None if number.startswith("0") else number


def fold(text: str) -> str:
    """What is left of a name when case, accents, blanks and joiners are gone, and the letters that
    Arabic and Persian keyboards give for one another are one: for finding it."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    kept = (one for one in parts if unicodedata.category(one) not in ("Mn", "Cf", "Zs"))
    return "".join(kept).translate(_SAME_LETTERS)


def _plain(character: str) -> str:
    """Digits of any script as ours; direction marks and the like, which copied numbers bring along,
    as nothing."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return "" if unicodedata.category(character) == "Cf" else character
