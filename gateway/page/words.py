"""The page's words in each language: words/<language>.json, the same names in all of them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

LANGUAGES = {"en": "English", "ar": "العربية", "fa": "فارسی"}
_IDS = frozenset({"tenant", "to", "old"})  # numbers that count nothing
_FROM_RIGHT = frozenset({"ar", "fa"})
# The Gulf writes numbers in Arabic as in English.
_PERSIAN = str.maketrans("0123456789,", "۰۱۲۳۴۵۶۷۸۹٬")
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


class Words:
    """One language's."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.direction = "rtl" if language in _FROM_RIGHT else "ltr"
        self._words = _read(language)

    def __call__(self, name: str, **values: object) -> Markup:
        """The sentence of that name. values fill its braces, escaped, and each in a direction
        of its own: a URL stays readable in Arabic."""
        shown = {
            key: Markup("<bdi>{}</bdi>").format(
                self.number(one, plain=key in _IDS) if isinstance(one, int) else one
            )
            for key, one in values.items()
        }
        return Markup(self._words[name]).format_map(shown)  # noqa: S704  # our own words

    def number(self, number: int, *, plain: bool = False) -> str:
        """In the language's own digits; plain: without marks between the thousands."""
        text = str(number) if plain else f"{number:,}"
        return text.translate(_PERSIAN) if self.language == "fa" else text

    def has(self, name: str) -> bool:
        return name in self._words

    def lasting(self, seconds: float) -> Markup:
        """ "5 min", in the largest unit that fits."""
        for size, unit in _UNITS:
            if seconds >= size or unit == "second":
                return self(f"unit.{unit}", n=int(seconds // size))
        raise AssertionError("the last unit always fits")


@functools.cache
def words_of(language: str) -> Words:
    return Words(language)


def wanted(chosen: str | None, accepted: str) -> str:
    """The language that was chosen, else the first of an Accept-Language that we have."""
    if chosen in LANGUAGES:
        return chosen
    codes = (part.partition(";")[0].strip()[:2].lower() for part in accepted.split(","))
    return next((code for code in codes if code in LANGUAGES), "en")


def _read(language: str) -> Mapping[str, str]:
    path = Path(__file__).parent / "words" / f"{language}.json"
    words: dict[str, str] = json.loads(path.read_text("utf-8"))
    return words
