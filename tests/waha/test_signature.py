import pytest

from gateway.errors import BadSignature
from gateway.waha import signature

# The example of WAHA's documentation, "HMAC authentication".
BODY = b'{"event":"message","session":"default","engine":"WEBJS"}'
KEY = b"my-secret-key"
SIGNATURE = (
    "208f8a55dde9e05519e898b10b89bf0d0b3b0fdf11fdbf09b6b90476301b98d8"
    "097c462b2b17a6ce93b6b47a136cf2e78a33a63f6752c2c1631777076153fa89"
)


def test_wahas_own_example_verifies() -> None:
    assert signature.sign(BODY, KEY) == SIGNATURE
    signature.verify(BODY, SIGNATURE, "sha512", keys=[KEY])
    signature.verify(BODY, SIGNATURE.upper(), None, keys=[KEY])


def test_while_rotating_either_key_fits() -> None:
    signature.verify(BODY, SIGNATURE, "sha512", keys=[b"new", KEY])
    signature.verify(BODY, SIGNATURE, "sha512", keys=[KEY, b"old"])


@pytest.mark.parametrize(
    ("body", "given", "algorithm", "key"),
    [
        (BODY, None, "sha512", KEY),
        (BODY, "", "sha512", KEY),
        (BODY, SIGNATURE[:-1], "sha512", KEY),
        (BODY + b" ", SIGNATURE, "sha512", KEY),
        (BODY, SIGNATURE, "sha512", b"another"),
        (BODY, SIGNATURE, "sha256", KEY),
        (BODY, SIGNATURE, "", KEY),
        (BODY, "\u00e9" * 128, "sha512", KEY),
        (BODY, "\U0001f512", "sha512", KEY),
    ],
)
def test_anything_else_is_refused(
    body: bytes, given: str | None, algorithm: str | None, key: bytes
) -> None:
    with pytest.raises(BadSignature):
        signature.verify(body, given, algorithm, keys=[key])
