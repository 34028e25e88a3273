"""Links and QR codes: what an office prints must lock to it, whatever stands behind the link."""

import io
import json
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import segno
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import deep_link
from gateway.errors import TooLongForQr
from gateway.tenants import qr
from gateway.tenants.registry import FILE_NAME
from tests.clients import client_of
from tests.messages import tenant

PHONE = "971557357753"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with client_of(tmp_path) as opened:
        yield opened


def address(number: int, note: str = "") -> str:
    text = deep_link.text_of(tenant(number), prefix="start_realty", note=note)
    return deep_link.address(text, phone=PHONE)


@pytest.mark.parametrize(
    ("note", "query"),
    [
        ("", "start_realty_2"),
        ("Hi & bye?", "start_realty_2%0AHi%20%26%20bye%3F"),
        ("مرحبا", "start_realty_2%0A%D9%85%D8%B1%D8%AD%D8%A8%D8%A7"),
        ("سلام", "start_realty_2%0A%D8%B3%D9%84%D8%A7%D9%85"),
        ("🏠 +1/2", "start_realty_2%0A%F0%9F%8F%A0%20%2B1%2F2"),
    ],
)
def test_the_address_of_a_link(note: str, query: str) -> None:
    assert address(2, note) == f"https://wa.me/971557357753?text={query}"


@given(st.integers(1, 2_147_483_647), st.text(st.characters(exclude_categories=["Cs"])))
def test_what_an_address_fills_in_locks_to_its_tenant(number: int, note: str) -> None:
    """Whatever is written behind it, another tenant's link included."""
    (text,) = parse_qs(urlsplit(address(number, note)).query, strict_parsing=True)["text"]
    for must_open in (True, False):
        assert deep_link.parse(text, prefix="start_realty", must_open=must_open) == number
    assert not note or text.endswith(note)


def modules(picture: bytes) -> list[list[bool]]:
    """A PNG of one bit a pixel, as segno writes it → rows of dark pixels."""
    width, height, depth, colour = struct.unpack(">IIBB", picture[16:26])
    assert (depth, colour) == (1, 0)
    data, place = b"", 8
    while place < len(picture):
        (length,) = struct.unpack(">I", picture[place : place + 4])
        if picture[place + 4 : place + 8] == b"IDAT":
            data += picture[place + 8 : place + 8 + length]
        place += length + 12
    raw, step = zlib.decompress(data), (width + 7) // 8 + 1
    rows: list[bytes] = []
    for row in range(height):
        kind, line = raw[row * step], raw[row * step + 1 : (row + 1) * step]
        assert kind in (0, 2)  # none, or what differs from the row above
        above = rows[-1] if kind else bytes(len(line))
        rows.append(bytes((one + two) & 0xFF for one, two in zip(line, above, strict=True)))
    return [[not row[x // 8] >> (7 - x % 8) & 1 for x in range(width)] for row in rows]


@pytest.mark.parametrize(("size", "margin"), [(512, 4), (64, 0), (1000, 10)])
def test_a_png_is_the_code_of_the_link(size: int, margin: int) -> None:
    rows = modules(qr.png(address(2), size=size, margin=margin))
    code = segno.make_qr(address(2), error="m", boost_error=False)
    side = len(code.matrix) + 2 * margin
    scale = len(rows) // side
    assert len(rows) == len(rows[0]) == side * scale <= size < side * (scale + 1)
    drawn = [row[scale // 2 :: scale] for row in rows[scale // 2 :: scale]]
    inner = [row[margin : side - margin] for row in drawn[margin : side - margin]]
    assert inner == [[bool(one) for one in row] for row in code.matrix]
    assert sum(map(sum, drawn)) == sum(map(sum, inner)), "the margin is light"


def test_an_svg_is_as_large_as_asked(tmp_path: Path) -> None:
    root = ET.fromstring(qr.svg(address(2), size=300))
    assert abs(float(root.get("width", "0")) - 300) < 0.01
    expected = io.BytesIO()
    code = segno.make_qr(address(2), error="m", boost_error=False)
    scale = 300 / code.symbol_size(border=4)[0]
    code.save(expected, kind="svg", scale=scale, border=4, light="white", nl=False)
    assert qr.svg(address(2), size=300) == expected.getvalue()


def test_what_no_code_holds_is_said() -> None:
    with pytest.raises(TooLongForQr, match="more than a QR code holds"):
        qr.svg(address(2, "ا" * 1000), size=300)


def test_the_link_of_a_tenant(client: TestClient) -> None:
    assert client.get("/router/link/2").text == (
        '{"deep_link":"https://wa.me/971557357753?text=start_realty_2","tenant_id":2,'
        '"active":true,"gateway_phone":"971557357753","text":"start_realty_2",'
        '"qr_svg":"/router/link/2/qr.svg","qr_png":"/router/link/2/qr.png"}'
    )
    found = client.get("/router/link/2", params={"text": "شقة"}).json()
    assert found["deep_link"] == address(2, "شقة")
    shown = client.get(found["qr_svg"])
    assert shown.headers["content-type"].startswith("image/svg+xml")
    assert shown.content == qr.svg(address(2, "شقة"), size=512)
    drawn = client.get(found["qr_png"], params={"text": "شقة", "size": 200, "margin": 2})
    assert drawn.headers["content-type"] == "image/png"
    assert drawn.content == qr.png(address(2, "شقة"), size=200, margin=2)


def test_a_tenants_own_number_is_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    listed = {"2": {"gateway_phone": "971501112222"}, "3": {}}
    (tmp_path / "data" / FILE_NAME).write_text(json.dumps(listed))
    with client_of(tmp_path) as client:
        shown = client.get("/router/link/2").json()
        assert shown["deep_link"] == "https://wa.me/971501112222?text=start_realty_2"
        assert PHONE in client.get("/router/link/3").json()["deep_link"]
        unknown = client.get("/router/link/4")
        assert (unknown.status_code, unknown.json()) == (
            404,
            {"detail": "tenant 4 is not in tenants.json"},
        )
        assert client.get("/router/link/4/qr.svg").status_code == 404


@pytest.mark.parametrize(
    ("path", "reported"),
    [
        ("0", "0"),
        ("2147483648", "2147483648"),
        ("x", "x"),
        ("2?text=" + "x" * 1001, "1000"),
        ("2/qr.gif", "gif"),
        ("2/qr.svg?size=31", "31"),
        ("2/qr.svg?size=4097", "4097"),
        ("2/qr.svg?margin=51", "51"),
        ("2/qr.svg?text=" + "%D8%A7" * 1000, "more than a QR code holds"),
    ],
)
def test_what_cannot_be_drawn_is_named(client: TestClient, path: str, reported: str) -> None:
    refused = client.get(f"/router/link/{path}")
    assert refused.status_code == 422
    assert reported in refused.text
