"""A WAHA session's config → the same with this router's webhook in it, as it should be.

Source: WAHA docs of July 2026, "Sessions" (config, ignore) and "Events" (webhooks, retries, HMAC);
that a host name with an underscore is refused was measured with WAHA 2026.2.1.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gateway.domain.model import MESSAGE_EVENTS

Json = dict[str, Any]

RETRIES: Json = {"policy": "constant", "delaySeconds": 5, "attempts": 720}  # an hour
_ENOUGH_SECONDS = 600  # of retries: a machine's restart, a deployment gone wrong
_IGNORED = ("status", "groups", "channels", "broadcast")  # what no tenant gets anyhow


@dataclass(frozen=True, slots=True)
class Wanted:
    """hmac_key signs; else api_key, where there is one, is sent as X-Api-Key."""

    url: str
    events: tuple[str, ...]
    hmac_key: str = ""
    api_key: str = ""


def events_for(forwarded: Iterable[str]) -> tuple[str, ...]:
    """What to subscribe so that FORWARD_EVENTS can be served, and sessions be followed."""
    names = set(forwarded)
    if "*" in names:
        return ("*",)
    # message.any holds what message does; both would bring each message twice.
    messages = {"message.any"} if "message.any" in names else {"message"}
    others = sorted(names - MESSAGE_EVENTS - {"session.status"})
    return (*messages, *others, "session.status")


def repaired(config: Json, wanted: Wanted) -> Json:
    """config with exactly one webhook to wanted.url, as it should be; all else stays."""
    new = copy.deepcopy(config)
    ignore = new.get("ignore")
    new["ignore"] = (ignore if isinstance(ignore, dict) else {}) | dict.fromkeys(_IGNORED, True)
    ours, others = _split(new, wanted.url)
    webhook = ours[0] if ours else {}
    if retry_seconds(webhook) < retry_seconds({"retries": RETRIES}):
        webhook["retries"] = RETRIES
    webhook |= {"url": wanted.url, "events": list(wanted.events)}
    headers = [one for one in _headers(webhook) if str(one.get("name", "")).lower() != "x-api-key"]
    webhook.pop("hmac", None)
    if wanted.hmac_key:
        webhook["hmac"] = {"key": wanted.hmac_key}
    elif wanted.api_key:
        headers.append({"name": "X-Api-Key", "value": wanted.api_key})
    webhook["customHeaders"] = headers
    if not headers:
        del webhook["customHeaders"]
    new["webhooks"] = [*others, webhook]
    return new


def is_configured(config: Json, wanted: Wanted) -> bool:
    """Whether nothing needs to be repaired."""
    ignore = config.get("ignore")
    ignored = isinstance(ignore, dict) and all(ignore.get(name) is True for name in _IGNORED)
    return ignored and not faults(config, wanted)


def why_nothing_comes(config: Json, *, path: str, hmac_key: str, api_key: str) -> str | None:
    """Why no message reaches a router at path by what the session's own config says; None if one
    does. A webhook that WHATSAPP_HOOK_URL sets for all sessions does not show here.

    hmac_key and api_key: the ones that the router asks for; empty: none.
    """
    reason = "its config has no webhook to us"
    listed = config.get("webhooks")
    for webhook in listed if isinstance(listed, list) else []:
        if not isinstance(webhook, dict) or not _leads_to(webhook, path):
            continue
        listed_events = webhook.get("events")
        events = set(map(str, listed_events)) if isinstance(listed_events, list) else set()
        hmac = webhook.get("hmac")
        if not events & {*MESSAGE_EVENTS, "*"}:
            reason = "the webhook to us is without the event message"
        elif hmac_key and (hmac.get("key") if isinstance(hmac, dict) else None) != hmac_key:
            reason = "the webhook to us is not signed with WEBHOOK_HMAC_KEY"
        elif not hmac_key and api_key and not _sends_key(webhook, api_key):
            reason = "the webhook to us does not send WAHA_API_KEY as X-Api-Key"
        else:
            return None
    return reason


def _leads_to(webhook: Json, path: str) -> bool:
    try:
        return urlsplit(str(webhook.get("url"))).path.rstrip("/") == path
    except ValueError:
        return False


def _sends_key(webhook: Json, api_key: str) -> bool:
    return api_key in [
        one.get("value")
        for one in _headers(webhook)
        if str(one.get("name", "")).lower() == "x-api-key"
    ]


def faults(config: Json, wanted: Wanted) -> list[str]:
    """What is wrong with the webhook that the session has; nothing if it is as it should be."""
    ours, _ = _split(config, wanted.url)
    if not ours:
        return [f"no webhook to {wanted.url}"]
    found = ["the webhook is in it twice: each event comes twice"] if len(ours) > 1 else []
    webhook = ours[0]
    listed = webhook.get("events")
    events = set(map(str, listed)) if isinstance(listed, list) else set()
    if "*" not in events and (missing := set(wanted.events) - events - {"message"}):
        found.append(f"it lacks the events {', '.join(sorted(missing))}")
    if "*" not in events and not events & MESSAGE_EVENTS:
        found.append("it lacks the event message")
    if events >= MESSAGE_EVENTS:
        found.append("message and message.any are both in it: each message comes twice")
    hmac = webhook.get("hmac")
    key = hmac.get("key") if isinstance(hmac, dict) else None
    if wanted.api_key and not wanted.hmac_key and not _sends_key(webhook, wanted.api_key):
        found.append("it does not send WAHA_API_KEY as X-Api-Key")
    if wanted.hmac_key and key != wanted.hmac_key:
        found.append("its HMAC key is not WEBHOOK_HMAC_KEY" if key else "it is not signed")
    if (seconds := retry_seconds(webhook)) < _ENOUGH_SECONDS:
        found.append(
            f"WAHA gives an event up after {seconds:.0f} s; {_ENOUGH_SECONDS} s are little enough"
        )
    return found


def retry_seconds(webhook: Json) -> float:
    """For how long WAHA repeats an event, by the webhook's `retries` (default 15 times 2 s)."""
    retries = webhook.get("retries")
    if not isinstance(retries, dict):
        retries = {}
    attempts, delay = retries.get("attempts", 15), retries.get("delaySeconds", 2)
    if not isinstance(attempts, int) or not isinstance(delay, int | float):
        return 0.0
    attempts, delay = min(attempts, 10**6), min(delay, 10**6)
    match retries.get("policy"):
        case "linear":
            return float(delay) * attempts * (attempts + 1) / 2
        case "exponential":
            return float(delay) * (2.0 ** (min(attempts, 60) + 1) - 2)
    return float(delay) * attempts


def why_not(url: str) -> str | None:
    """Why WAHA would refuse the URL or never reach it; None if it would not."""
    try:
        address = urlsplit(url)
        usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", url):
        return f"{url!a} is no http:// or https:// address"
    assert address.hostname
    if "_" in address.hostname:
        return (
            f"the host name {address.hostname} holds an underscore, which WAHA refuses: give the"
            " router another name (a service or an alias of docker compose)"
        )
    return None


def _split(config: Json, url: str) -> tuple[list[Json], list[Any]]:
    """The webhooks to url, and the others, whatever they are."""
    listed = config.get("webhooks")
    webhooks: list[Any] = listed if isinstance(listed, list) else []

    def ours(one: Any) -> bool:
        return isinstance(one, dict) and str(one.get("url", "")).rstrip("/") == url.rstrip("/")

    return [one for one in webhooks if ours(one)], [one for one in webhooks if not ours(one)]


def _headers(webhook: Json) -> list[Json]:
    headers = webhook.get("customHeaders")
    return [one for one in headers if isinstance(one, dict)] if isinstance(headers, list) else []
