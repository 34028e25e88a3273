"""A person's id as people write it: "+971 50 123 4567", "971501234567@c.us", "…@lid"."""

import re

_PHONE = re.compile(r"\+?([0-9]{5,20})(?:@c\.us|@s\.whatsapp\.net)?")
_LID = re.compile(r"[0-9]{5,20}@lid")
_PUNCTUATION = re.compile(r"[\s()./-]")  # only before the @: the dot of @c.us is kept


def person(text: str) -> str | None:
    """Phone digits or …@lid; None if text is neither."""
    text = text.strip()
    if _LID.fullmatch(text):
        return text
    number, at, server = text.partition("@")
    found = _PHONE.fullmatch(_PUNCTUATION.sub("", number) + at + server)
    return found[1] if found else None
