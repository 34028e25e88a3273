"""WAHA's webhook signature: hex HMAC-SHA512 of the raw body, in X-Webhook-Hmac.

Source: WAHA docs, "Events", section "HMAC authentication". The key is the text's UTF-8 bytes.
Neither headers nor time are signed, and WAHA repeats a webhook for minutes, so there is no time
window: copies are caught by de-duplication, old links by their age.
"""

import hashlib
import hmac
from collections.abc import Sequence

from gateway.errors import BadSignature

ALGORITHM = "sha512"


def sign(body: bytes, key: bytes) -> str:
    """What WAHA would put into X-Webhook-Hmac: 128 lower-case hex digits."""
    return hmac.new(key, body, hashlib.sha512).hexdigest()


def verify(
    body: bytes, signature: str | None, algorithm: str | None, *, keys: Sequence[bytes]
) -> None:
    """Return if body was signed with one of keys; raise BadSignature if not.

    body is the request's raw bytes: JSON parsed and dumped again signs differently.
    """
    if signature is None:
        raise BadSignature("X-Webhook-Hmac is missing: set the webhook's HMAC key in WAHA")
    if algorithm is not None and algorithm.lower() != ALGORITHM:
        raise BadSignature(f"X-Webhook-Hmac-Algorithm is {algorithm[:20]!a}, not {ALGORITHM}")
    # Bytes, because compare_digest refuses str outside ASCII. Every key is compared, so that the
    # time does not show which one fits.
    given = signature.lower().encode()
    if not any([hmac.compare_digest(sign(body, key).encode(), given) for key in keys]):
        raise BadSignature(
            "X-Webhook-Hmac does not match the body: is the HMAC key in WAHA the configured one?"
        )
