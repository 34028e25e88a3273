"""A person's id as people write it: "+971 50 123 4567", "00971…", "050 123 4567",
"971501234567@c.us", "…@lid".

The numbers of each country come from Google's libphonenumber (phonenumberslite).
"""

import re
import unicodedata

import phonenumbers

_PHONE = re.compile(r"\+?([0-9]{5,20})(?:@c\.us|@s\.whatsapp\.net)?")
_LID = re.compile(r"[0-9]{5,20}@lid")
# A spreadsheet's 491511234567.0, and two numbers in one: +49 1511 234567/8.
_NO_NUMBER = re.compile(r"\.0+$|\s*/\s*[0-9]{1,3}\s*$|\([0-9]{1,2}\)\s*$")
_TRUNK = re.compile(r"^(\s*(?:\+|00)[0-9 ]+)\(0\)")  # +971 (0)50 …: not dialled from abroad
_SAME_LETTERS = str.maketrans("يىك", "ییک")
_SHORTEST = 5  # digits of a phone
_PUNCTUATION = re.compile(r"[\s()./‐-―-]")  # only before the @: the dot of @c.us is kept


def person(text: str, *, gateway_phone: str) -> str | None:
    """Phone digits with the country code, or …@lid; None if text is neither.

    gateway_phone: digits; a number without a country code ("050 123 4567") is one of its country.
    """
    text = "".join(map(_plain, text)).strip()
    if _LID.fullmatch(text):
        return text
    number, at, server = text.partition("@")
    if _NO_NUMBER.search(number):
        return None
    number = _TRUNK.sub(r"\g<1>0", number)
    found = _PHONE.fullmatch(_PUNCTUATION.sub("", number) + at + server)
    if not found:
        return None
    if at:  # as WhatsApp writes it
        return found[1]
    # 00 is the prefix for calls abroad; no country's code begins with 0 (ITU-T E.164), so a number
    # that does is one without it.
    is_abroad = found[1].startswith("00") and len(found[1]) > _SHORTEST + 1
    number = found[1][2:] if is_abroad else found[1]
    if not number.startswith("0"):
        return _without_trunk(number)
    return None if is_abroad else _national(number, gateway_phone)


def _national(number: str, gateway_phone: str) -> str | None:
    """A number as it is dialled in the gateway's own country; None if there are no such ones."""
    try:
        code = phonenumbers.parse(f"+{gateway_phone}").country_code
        region = phonenumbers.region_code_for_country_code(code or 0)
        parsed = phonenumbers.parse(number, region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(parsed):
        return None
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)[1:]


def _without_trunk(number: str) -> str | None:
    """ "9710501234567" → "971501234567": the 0 of calls within a country is dialled only there.

    In some countries it is a part of the number (Italy); None where there are no such numbers.
    """
    try:
        parsed = phonenumbers.parse(f"+{number}")
    except phonenumbers.NumberParseException:
        return number  # of no country that is known: WhatsApp knows better
    code, national = str(parsed.country_code), str(parsed.national_number)
    if not number.startswith(f"{code}0") or parsed.italian_leading_zero:
        return number
    if number == f"{code}0{national}" and phonenumbers.is_possible_number(parsed):
        return code + national
    return None


def fold(text: str) -> str:
    """What is left of a name when case, accents, blanks and joiners are gone, and the letters that
    Arabic and Persian keyboards give for one another are one: for finding it."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    letters = (one for one in decomposed if unicodedata.category(one) not in ("Mn", "Cf", "Zs"))
    return "".join(letters).translate(_SAME_LETTERS)


def _plain(character: str) -> str:
    """Digits of any script as ours; direction marks and the like, which copied numbers bring along,
    as nothing."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return "" if unicodedata.category(character) == "Cf" else character
