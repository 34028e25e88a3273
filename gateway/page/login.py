"""Who may look at the page, and that an order comes from it and from no other site's.

With ADMIN_API_KEY a form asks for it and sets a cookie, signed with that key: every router that
has the key knows it, and another key ends all logins. Without, this machine may look, as at all of
/router/*. Each action carries a token that belongs to the login (OWASP, "Cross-Site Request Forgery
Prevention", signed double-submit).
"""

import hashlib
import secrets
from typing import Any

from itsdangerous import BadData, Signer, TimestampSigner
from starlette.requests import Request

from gateway.api.access import Access
from gateway.errors import BadSignature, NotAllowed

COOKIE = "gateway_page"
SECONDS = 12 * 3600  # a login lasts a working day
_MOST_LEFT = 10_000
_HOW: dict[str, Any] = {"key_derivation": "hmac", "digest_method": hashlib.sha256}
_LOCAL_LOGIN = "this machine"


class PageAccess:
    def __init__(self, access: Access) -> None:
        self._access = access
        # The oldest first, as Signer wants them. Without a key the tokens end with the process.
        keys = [*reversed(access.admin_keys)] or [secrets.token_hex(32)]
        self._signer = TimestampSigner(keys, salt="page login", **_HOW)
        self._tokens = Signer(keys, salt="page token", **_HOW)
        self._left: dict[str, None] = {}  # logins that ended before their time; here only

    @property
    def has_key(self) -> bool:
        """False: nobody logs in, this machine alone is served."""
        return bool(self._access.admin_keys)

    def login(self, request: Request) -> str:
        """Return what distinguishes this login from others.

        Raise BadSignature if the caller must log in, NotAllowed if that would not help.
        """
        if not self.has_key:
            self._access.check_page(request)
            return _LOCAL_LOGIN
        cookie = request.cookies.get(COOKIE, "")
        try:
            # What was signed: the cookie around it can be written in more than one way.
            login = self._signer.unsign(cookie, max_age=SECONDS).decode()
        except BadData as exc:
            raise BadSignature("the page wants ADMIN_API_KEY") from exc
        if login in self._left:
            raise BadSignature("this login is over")
        return login

    def log_in(self, key: str) -> str:
        """A new login, for the cookie. Raise BadSignature if key is not ADMIN_API_KEY."""
        self._access.check_admin_key(key)
        return self._signer.sign(secrets.token_urlsafe(16)).decode()

    def log_out(self, login: str) -> None:
        """End a login; other routers take its cookie until its time is over."""
        self._left[login] = None
        if len(self._left) > _MOST_LEFT:
            del self._left[next(iter(self._left))]

    def token(self, login: str) -> str:
        """What an action of this login must carry."""
        return self._tokens.get_signature(login).decode()

    def check_token(self, login: str, token: str) -> None:
        """Return if the order comes from our page; raise NotAllowed."""
        if not self._tokens.verify_signature(login, token.encode("utf-8", "replace")):
            raise NotAllowed("the action has no token of this login: load the page again")


def check_site(request: Request) -> None:
    """Return if no other site's page sent the order, by its head; raise NotAllowed."""
    # Browsers without this header are held off by the token and by SameSite=Strict.
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise NotAllowed("another site sent this")
