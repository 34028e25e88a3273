"""A link as a QR code, made here: no link leaves the house for it."""

import io

import segno

from gateway.errors import TooLongForQr

QUIET_ZONE = 4  # light modules around the code that ISO/IEC 18004 asks for
_LEVEL = "m"  # 15 % of the code may be unreadable: a printed card gets worn


def svg(text: str, *, size: int, margin: int = QUIET_ZONE) -> bytes:
    """size: pixels of a side, margin included. margin: in modules. Raise TooLongForQr."""
    code = _code(text)
    out = io.BytesIO()
    scale = size / code.symbol_size(border=margin)[0]
    code.save(out, kind="svg", scale=scale, border=margin, light="white", nl=False)
    return out.getvalue()


def inline(text: str) -> str:
    """As svg(), to be put in a page's HTML: as large as its place."""
    return _code(text).svg_inline(omitsize=True, border=QUIET_ZONE, light="white")


def png(text: str, *, size: int, margin: int = QUIET_ZONE) -> bytes:
    """As svg(), but a module is a whole number of pixels: the side is size at most, or one pixel
    for each module."""
    code = _code(text)
    out = io.BytesIO()
    scale = max(1, size // code.symbol_size(border=margin)[0])
    code.save(out, kind="png", scale=scale, border=margin)
    return out.getvalue()


def _code(text: str) -> segno.QRCode:
    try:
        return segno.make_qr(text, error=_LEVEL, boost_error=False)
    except segno.DataOverflowError as exc:
        raise TooLongForQr(
            f"{len(text)} characters of link are more than a QR code holds: shorten the text"
        ) from exc
