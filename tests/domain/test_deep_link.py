"""Which texts name a tenant, and which do not."""

import time

import pytest

from gateway.domain import deep_link
from gateway.domain.model import TenantId

MARKS = "\u200e\u200f\u202a\u202b\u202c\u2066\u2069\ufeff\u00ad"


def parse(text: str, *, must_open: bool = False, prefix: str = "start_realty") -> int | None:
    return deep_link.parse(text, prefix=prefix, must_open=must_open)


@pytest.mark.parametrize(
    ("text", "tenant"),
    [
        ("start_realty_2", 2),
        ("START_Realty_2", 2),
        ("start_realty_02", 2),
        ("start_realty_2147483647", 2147483647),
        ("  \n start_realty_7 \n\nHello", 7),
        ("start_realty_2.", 2),
        ("start_realty_2, please", 2),
        ("start_realty_2👋🏽", 2),
        ("start_realty_۲", 2),  # Persian
        ("start_realty_٤٢", 42),  # Arabic
        ("start_realty_४", 4),  # Devanagari
        (f"{MARKS}start{MARKS}_realty_{MARKS}4{MARKS}2{MARKS}", 42),
        ("start_realty_abc", None),
        ("startrealty2", None),
        ("start_realty2", None),
        ("start_realty_", None),
        ("start_realty_0", None),
        ("start_realty_-1", None),
        ("start_realty_2x", None),
        ("start_realty_2_3", None),
        ("start_realty_2147483648", None),
        ("start_realty_99999999999", None),
        ("start_realty_" + "9" * 5000, None),
        ("xstart_realty_2", None),
        ("restart_realty_2", None),
        ("_start_realty_2", None),
        ("start realty 2", None),
        ("", None),
        ("hello", None),
        # What may be a longer number is no link of a shorter one.
        ("start_realty_1,234", None),
        ("start_realty_2.5", None),
        ("start_realty_1'234", None),
        ("start_realty_1’234", None),
        ("start_realty_1ʼ234", None),
        ("start_realty_1\u00a0234", None),
        ("start_realty_1\u202f234", None),
        ("start_realty_1\u2009234", None),
        ("start_realty_1\u200b\u202f\u200b234", None),
        ("start_realty_1٬234", None),
        ("start_realty_1٫5", None),
        ("start_realty_۱٬۲۳۴", None),
        ("start_realty_1،234", None),
        ("start_realty_1，234", None),
        ("start_realty_1·5", None),
        ("start_realty_2-3", None),
        ("start_realty_2–3", None),
        ("start_realty_2/3", None),
        ("start_realty_10:30", None),
        ("start_realty_2²", None),
        ("start_realty_2½", None),
        ("start_realty_²2", None),
        ("start_realty_2%2C234", None),
        ("start_realty_1%E2%80%8B234", 1234),
        ("start_realty_1%A0234", None),
        ("start_realty_1,%32", None),
        ("start_realty_1..234", None),
        ("start_realty_1…234", None),
        ("start_realty_1’’234", None),
        ("start_realty_1″5", None),
        ("start_realty_1,*234*", None),
        ("*start_realty_1*,*234*", None),
        ("start_realty_1´234", None),
        ("start_realty_1¨234", None),
        ("start_realty_1\u00a0\u00a0234", None),
        ("start_realty_1\u00a0,234", None),
        ("start_realty_1\u2005234", None),
        ("start_realty_1\u205f234", None),
        ("start_realty_1\x7f234", None),
        ("start_realty_1\x1f234", None),
        ("start_realty_1\ufffd234", None),
        ("start_realty_1️⃣2️⃣", 12),
        ("start_realty_1\u0332\u20e3 2", 1),
        ("start_realty_1̲2̲3̲", 123),
        ("start_realty_2(3 rooms)", 2),
        ("start_realty_2\u30003", 2),
        ("_*start_realty_2*_", 2),
        ("start_realty_2, 3 rooms", 2),
        ("start_realty_2 3 rooms", 2),
        ("start_realty_2\n3 rooms", 2),
        ("start_realty_2\u00a0rooms", 2),
        ("start_realty_2 (3 rooms)", 2),
        ("start_realty_2 😀3", 2),
        ("start_realty_2…", 2),
        # Emphasis, and signs that nobody sees.
        ("_start_realty_2_", 2),
        ("*start_realty_2*", 2),
        ("~start_realty_2~", 2),
        ("`start_realty_2`", 2),
        ("```start_realty_2```", 2),
        ("*_start_realty_2_*", 2),
        ("*start_realty_2* hello", 2),
        ("*start_realty_2 hello*", 2),
        ("_start_realty_2 hello_", 2),
        ("_start_realty_2_.", 2),
        ("_start_realty_2_3_", None),
        ("_start_realty_1_,234", None),
        ("x_start_realty_2_", None),
        ("_start_realty_2_x", None),
        ("\u3164start_realty_2", 2),
        ("\uffa0start_realty_2", 2),
        ("\u115f\u1160start_realty_2", 2),
        ("\u034f\u17b4\ufe0fstart_realty_2\U000e0020", 2),
        ("ｓｔａｒｔ＿ｒｅａｌｔｙ＿２", 2),
        ("start%5Frealty%5f2", 2),
        ("start_realty_②", 2),
        ("𝐬𝐭𝐚𝐫𝐭_realty_𝟐", 2),
        # All that the message says, though it is quoted or listed.
        ('"start_realty_2"', 2),
        ("“start_realty_2”.", 2),
        ("«start_realty_2»", 2),
        ("> start_realty_2", 2),
        ("- start_realty_2", 2),
        ("• start_realty_2", 2),
        ("* start_realty_2", 2),
        ("1. start_realty_2", 2),
        ("> *start_realty_2*", 2),
    ],
)
@pytest.mark.parametrize("must_open", [True, False])
def test_a_text_that_is_a_link_or_none(text: str, tenant: int | None, must_open: bool) -> None:
    assert parse(text, must_open=must_open) == tenant


@pytest.mark.parametrize(
    ("text", "anywhere", "opening"),
    [
        ("Hello start_realty_2", 2, None),
        ("I saw https://wa.me/971557357753?text=start_realty_9 today", 9, None),
        ("start_realty_2 and start_realty_3", 2, 2),  # of two, the one it begins with
        ("hi start_realty_2 or start_realty_3", None, None),
        ("hi start_realty_2 or START_REALTY_02", 2, None),
        ("start_realty_0 start_realty_2", 2, None),
        ("hi (start_realty_5)!", 5, None),
        ("https://wa.me/971557357753?text=start%5Frealty%5F9%20Hello", 9, None),
        ("https://wa.me/971557357753?text=start_realty_9%20Hello", 9, None),
        ("hi _start_realty_5_ there", 5, None),
        ('"start_realty_9" is what she sent me', 9, None),
        ("> start_realty_9\nwhat is that?", 9, None),
        ("> start_realty_9\n???", 9, None),
        ("> start_realty_9 🤔", 9, None),
        ('"start_realty_9" ???', 9, None),
        ("- start_realty_9 👎", 9, None),
        ('"start_realty_9"!', 9, 9),
        ("- start_realty_9 is on the flyer", 9, None),
        ("*start_realty_9 is not closed", 9, None),
        ("• start_realty_2\n• start_realty_3", None, None),
        ("\u200f\u202astart_realty_7\u202c \n\nHello 👋", 7, 7),
        ("x" * 65_530 + " start_realty_2", None, None),  # no person typed that
    ],
)
def test_where_a_link_may_stand(text: str, anywhere: int | None, opening: int | None) -> None:
    assert parse(text) == anywhere
    assert parse(text, must_open=True) == opening


def test_the_prefix_is_a_setting_and_no_pattern() -> None:
    assert parse("join.us_4", prefix="join.us") == 4
    assert parse("joinxus_4", prefix="join.us") is None


@pytest.mark.parametrize(
    "text",
    [
        "x start_realty_7 a" + "\u0301" * 32_000 + "\u0316" * 32_000,
        "x" + "\u0301\u0316" * 32_000,
        "\ufdfa" * 65_000 + "start_realty_2",
        "start_realty_2" + "\u00a0," * 32_000,
        "start_realty_2," * 4_000,
        "_start_realty_2 " * 4_000,
        "*_~`" * 16_000 + "start_realty_2",
        "1" * 65_000,
        "%E2%80%8B" * 7_000 + "start_realty_2",
        "²1" * 32_000,
    ],
    ids=range(10),
)
def test_no_text_takes_long(text: str) -> None:
    """Seconds of it would stop the whole router; here a hundredth is usual."""
    began = time.process_time()
    parse(text)
    assert time.process_time() - began < 1.0


def test_what_a_person_is_to_send_and_the_address_that_fills_it_in() -> None:
    assert deep_link.text_of(TenantId(42), prefix="start_realty") == "start_realty_42"
    text = deep_link.text_of(TenantId(42), prefix="start_realty", note="Flat 7/b & more")
    assert text == "start_realty_42\nFlat 7/b & more"
    address = "https://wa.me/971557357753?text=start_realty_42%0AFlat%207%2Fb%20%26%20more"
    assert deep_link.address(text, phone="971557357753") == address
