"""A person's id as people write it, and names as they are looked for."""

import pytest

from gateway.domain import phone_numbers


@pytest.mark.parametrize(
    ("text", "person"),
    [
        ("00971501234567", "971501234567"),
        ("۰۰۹۷۱ ۵۰ ۱۲۳ ۴۵۶۷", "971501234567"),
        ("971‑50–1234567", "971501234567"),
        ("\u200e+971501234567\u200f", "971501234567"),
        ("158764321000005@lid", "158764321000005@lid"),
        ("0012345", "12345"),
        ("001234", None),
        ("050 123 4567", "971501234567"),
        ("00050 123 4567", None),
        ("0501234567@c.us", "0501234567"),
        ("²²²²²", None),
        ("+971 (0)50 123 4567", "971501234567"),
        ("491511234567.0", None),
        ("+49 1511 234567/8", None),
        ("+7 912 345-67-89", "79123456789"),
        ("+33.6.12.34.56.78", "33612345678"),
    ],
)
def test_spellings(text: str, person: str | None) -> None:
    assert phone_numbers.person(text, gateway_phone="971557357753") == person


@pytest.mark.parametrize(
    ("text", "gateway_phone", "person"),
    [
        ("050 123 4567", "971557357753", "971501234567"),
        ("0501234567", "971557357753", "971501234567"),
        ("٠٥٠ ١٢٣ ٤٥٦٧", "971557357753", "971501234567"),
        ("0151 23456789", "4915112345678", "4915123456789"),
        ("06 1234 5678", "390612345678", "390612345678"),  # a part of the number there
        ("050 123 4567", "99912345678", None),  # of no country that is known
        ("05", "971557357753", None),
        ("050", "971557357753", None),
        ("0000501234567", "971557357753", None),
        ("+971 050 151 6001", "971557357753", "971501516001"),
        ("9710501516001", "971557357753", "971501516001"),
        ("00971 050 151 6001", "971557357753", "971501516001"),
        ("+44 07911 123456", "971557357753", "447911123456"),
        ("+39 06 1234 5678", "971557357753", "390612345678"),
        ("+971 0", "971557357753", None),
        ("+39 (0)35 123 4567", "971557357753", "390351234567"),  # else another's mobile
        ("+225 (0)7 01 23 45 67 89", "971557357753", "2250701234567" + "89"),
        ("+49 (0)1511 234567", "971557357753", "491511234567"),
        ("+43 664 1234567 / 8", "971557357753", None),
        ("+43 664 1234567/568", "971557357753", None),
        ("+43 664 1234567 (2)", "971557357753", None),
        ("050/1234567", "971557357753", "971501234567"),
        ("0971501234567", "971557357753", None),
        ("+52 1 55 1234 5678", "971557357753", "5215512345678"),  # WhatsApp's own form
        ("97150000001", "971557357753", "97150000001"),
        ("9710501516001@c.us", "971557357753", "9710501516001"),  # as WhatsApp has it
    ],
)
def test_a_number_is_read_as_it_is_dialled(
    text: str, gateway_phone: str, person: str | None
) -> None:
    """A lock on a number that no message has would do nothing."""
    assert phone_numbers.person(text, gateway_phone=gateway_phone) == person


@pytest.mark.parametrize(
    ("text", "person"),
    [
        ("971501234567@s.whatsapp.net", "971501234567"),
        ("971501234567@g.us", None),
        ("971501234567@c.us.evil", None),
        (" 158764321000005@lid ", "158764321000005@lid"),
        ("1234@lid", None),
        ("12345", "12345"),
        ("1234", None),
        ("1" * 20, "1" * 20),
        ("1" * 21, None),
        ("99912345678", "99912345678"),
        ("sara", None),
        ("", None),
        ("971501234567.0", None),
        ("+49 1511 234567 (2)", None),
    ],
)
def test_what_is_an_id_and_what_is_none(text: str, person: str | None) -> None:
    assert phone_numbers.person(text, gateway_phone="971557357753") == person


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("خانه‌های دریا", "خانه های دريا"),
        ("علی", "علي"),
        ("بُيوت النخيل", "بيوت"),
        ("Café Münch", "cafe munch"),
        ("كريم", "کریم"),
    ],
)
def test_a_name_is_found_however_it_is_typed(name: str, typed: str) -> None:
    assert phone_numbers.fold(typed) in phone_numbers.fold(name)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Marina Towers", "marina towers", True),
        ("MarinaTowers", "marina towers", True),
        ("Café", "cafe", True),
        ("STRASSE", "straße", True),
        ("علي", "علی", True),
        ("كريم", "کریم", True),
        ("موسى", "موسی", True),
        ("می‌خواهم", "میخواهم", True),
        ("Marina", "Marine", False),
        ("2", "3", False),
    ],
)
def test_names_that_are_found_by_one_another(one: str, other: str, same: bool) -> None:
    assert (phone_numbers.fold(one) == phone_numbers.fold(other)) is same
