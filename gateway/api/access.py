"""Who may call. Closed by default: without keys only this machine is served."""

import hmac
from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.types import Scope

from gateway.errors import BadKey, BadSignature, NotAllowed
from gateway.settings import Settings, is_loopback, split
from gateway.waha import signature

# Starlette's TestClient calls in-process and names itself so; a socket's peer is an address.
_IN_PROCESS = "testclient"
_PROXY_HEADERS = (b"forwarded", b"x-real-ip", b"via")
_OWN_SITES = frozenset({b"none", b"same-origin"})  # of Sec-Fetch-Site
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Access:
    """The settings' keys, and what they open."""

    def __init__(self, settings: Settings) -> None:
        self._hmac_keys = [key.encode() for key in split(settings.webhook_hmac_key)]
        waha_key = settings.waha_api_key.get_secret_value()
        self._waha_keys = (waha_key,) if waha_key else ()  # WAHA has one, commas and all
        self.admin_keys = split(settings.admin_api_key)
        self._on_loopback = settings.listens_on_loopback

    @property
    def wants_signatures(self) -> bool:
        """Whether a webhook is let in by its signature alone, and so only when it is read."""
        return bool(self._hmac_keys)

    @property
    def webhook_access(self) -> str:
        """What a webhook needs to be let in, for people."""
        if self._hmac_keys:
            return "as WEBHOOK_HMAC_KEY demands"
        if self._waha_keys:
            return "none is demanded; from elsewhere WAHA_API_KEY must come as X-Api-Key"
        return "none is demanded; only this machine may call"

    def check_webhook(self, connection: HTTPConnection) -> None:
        """Return if a webhook may come from there, its signature aside; else raise."""
        if self._hmac_keys or self._from_here(connection):
            return
        if not self._waha_keys:
            raise NotAllowed(
                "no key is configured, so only this machine may call: set WEBHOOK_HMAC_KEY here and"
                f" the webhook's hmac.key in WAHA ({self._why_not(connection)})"
            )
        _check_key(connection, self._waha_keys, "WAHA_API_KEY")

    def check_signature(self, connection: HTTPConnection, body: bytes) -> None:
        """Return if body is signed as WEBHOOK_HMAC_KEY demands; else raise BadSignature."""
        if not self._hmac_keys:
            return
        signature.verify(
            body,
            _only(connection, "x-webhook-hmac"),
            _only(connection, "x-webhook-hmac-algorithm"),
            keys=self._hmac_keys,
        )

    def check_admin(self, connection: HTTPConnection) -> None:
        """Return if the caller may use /router/* and the like; else raise."""
        if self.admin_keys:
            _check_key(connection, self.admin_keys, "ADMIN_API_KEY")
        elif why_not := self._why_not(connection):
            raise NotAllowed(
                "no ADMIN_API_KEY is configured, so only this machine may call: set it, and send it"
                f" as X-Api-Key ({why_not})"
            )

    def check_admin_key(self, given: str) -> None:
        """Return if given is an ADMIN_API_KEY, typed into a form; else raise BadSignature, which is
        BadKey where something was given."""
        _compare([given.encode("utf-8", "replace")], self.admin_keys, "the key", "ADMIN_API_KEY")

    def check_page(self, connection: HTTPConnection) -> None:
        """Return if the page's own calls may come from there without a key; raise NotAllowed.

        A form of the page sends its origin along, which no other caller of this machine does.
        """
        if why_not := self._why_not(connection, own_page=True):
            raise NotAllowed(
                "no ADMIN_API_KEY is configured, so only this machine may look: set it, and log in"
                f" ({why_not})"
            )

    def _from_here(self, connection: HTTPConnection) -> bool:
        return self._why_not(connection) is None

    def _why_not(self, connection: HTTPConnection, *, own_page: bool = False) -> str | None:
        """Why the call does not count as one from this machine; None if it does.

        own_page: it may come from a page that was loaded from here.
        """
        client = connection.scope.get("client")
        peer = client[0] if client else ""
        if peer == _IN_PROCESS:
            return None
        if not self._on_loopback:
            return "HOST is not a loopback address"
        if not is_loopback(peer) or not is_loopback(_local_address(connection.scope)):
            return f"the call came from {peer or 'nowhere'}"
        hosts: list[str] = []
        origins: list[str] = []
        for name, value in connection.scope["headers"]:  # bytes: each call passes here
            if name == b"host":
                hosts.append(value.decode("latin-1"))
            elif name in _PROXY_HEADERS or name.startswith(b"x-forwarded-"):
                return f"it came through a proxy: {name.decode('latin-1')[:60]} is set"
            elif name == b"origin":
                origins.append(value.decode("latin-1"))
            elif name == b"sec-fetch-site" and value not in _OWN_SITES:
                return "a web page sent it"
        if origins and not (own_page and origins == [f"http://{host}" for host in hosts]):
            return "a web page sent it"
        if len(hosts) != 1 or _host_name(hosts[0]) not in _LOCAL_HOSTS:
            return f"its Host is {', '.join(hosts)[:60]!a}"
        # A bare nginx in front speaks 1.0 and adds nothing else.
        if connection.scope.get("http_version") != "1.1":
            return f"it speaks HTTP/{connection.scope.get('http_version')}, as proxies do"
        return None


def _check_key(connection: HTTPConnection, keys: Sequence[str], setting: str) -> None:
    given = [_only(connection, "x-api-key") or ""]
    scheme, _, token = (_only(connection, "authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        given.append(token.strip())
    # The bytes that were sent: Starlette has read them as Latin-1.
    sent = [one.encode("latin-1") for one in given]
    _compare(sent, keys, "X-Api-Key (or Authorization: Bearer)", setting)


def _compare(given: Sequence[bytes], keys: Sequence[str], what: str, setting: str) -> None:
    # Every key is compared, so that the time does not show which one fits.
    if not any([hmac.compare_digest(key.encode(), one) for key in keys for one in given]):
        kind = BadKey if any(given) else BadSignature
        raise kind(f"{what} is missing or not what {setting} says")


def _only(connection: HTTPConnection, name: str) -> str | None:
    """The header's value; it may come several times with that one value (Prometheus 3.5)."""
    values = set(connection.headers.getlist(name))
    if len(values) > 1:
        raise BadSignature(f"{name} is in the request with several values")
    return values.pop() if values else None


def _local_address(scope: Scope) -> str:
    server = scope.get("server")
    return str(server[0]) if server else ""


def _host_name(host: str) -> str:
    """ "localhost:8001" → "localhost", "[::1]:8001" → "[::1]"."""
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdecimal() else host.lower()
