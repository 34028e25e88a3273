"""Every error of ours, one tree; the type says what happens next.

GatewayError
├── StartRefused            the process ends with this one line: settings, damaged files, lock
├── BadBody                 400: the webhook's body cannot be used
│   └── BodyTooSlow         … because it does not come to an end
├── BadSignature            401: key or signature missing or wrong
│   └── BadKey              … a key that is wrong: a guess, perhaps
├── NotAllowed              403: nothing is open to this caller
├── BodyTooLarge            413
├── BodyEncoded             415: compressed, say
├── TooLongForQr            422: a link that no QR code holds
├── TooManyGuesses          429: wrong keys from one address
├── NotLockable             422: a user cannot be locked to that tenant
├── StoreUnavailable        503: nothing was promised, WAHA sends it again
├── NoBackUp                409: no back-up can be written now, or of this store at all
├── WahaError               409: WAHA did not do what we asked; no webhook's answer hangs on it
│   ├── WahaRefused         asking again is of no use
│   └── WahaUnavailable     asking again later is
│       └── WahaSilent      … though it may have done it
└── BackendError
    ├── BackendUnavailable  tried again after a backoff
    │   └── NotConnected    … and no connection could be made at all
    └── BackendRefused      dead letter at once
"""


class GatewayError(Exception):
    """The root. The message names thing and value, and no secret."""


class StartRefused(GatewayError):
    pass


class BadBody(GatewayError):
    pass


class BodyTooSlow(BadBody):
    pass


class BadSignature(GatewayError):
    pass


class BadKey(BadSignature):
    pass


class NotAllowed(GatewayError):
    pass


class BodyTooLarge(GatewayError):
    pass


class BodyEncoded(GatewayError):
    pass


class TooLongForQr(GatewayError):
    pass


class NoBackUp(GatewayError):
    pass


class TooManyGuesses(GatewayError):
    pass


class NotLockable(GatewayError):
    """why: "no_tenant", "inactive" or "own_number"."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class StoreUnavailable(GatewayError):
    """retry_after: after how many seconds WAHA shall send it again."""

    def __init__(self, message: str, *, retry_after: int = 2) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WahaError(GatewayError):
    """status: WAHA's, None if it did not answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class WahaRefused(WahaError):
    pass


class WahaUnavailable(WahaError):
    pass


class WahaSilent(WahaUnavailable):
    pass


class BackendError(GatewayError):
    """status is the backend's HTTP status, None without an answer; answer its first bytes."""

    def __init__(self, message: str, *, status: int | None = None, answer: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.answer = answer


class BackendUnavailable(BackendError):
    """retry_after: seconds the backend asked us to wait, if it did."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        answer: bytes = b"",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, status=status, answer=answer)
        self.retry_after = retry_after


class NotConnected(BackendUnavailable):
    pass


class BackendRefused(BackendError):
    pass
