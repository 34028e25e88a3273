"""connect-waha: sets up this router's webhook in a WAHA session, once it was seen and agreed to."""

import asyncio
import copy
import difflib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from gateway.errors import WahaError
from gateway.settings import WEBHOOK_PATH, Settings, is_guessable, split
from gateway.waha import webhook_config
from gateway.waha.client import Waha
from gateway.waha.webhook_config import Wanted

_START_SECONDS, _CHECK_SECONDS = 30.0, 0.5  # a session stops and starts for its new config
_WEAK_BYTES = 16  # a key shorter than that can be tried out

Ask = Callable[[str], str]


def wanted(settings: Settings, url: str | None) -> Wanted | str:
    """The webhook as it should be; a text if the URL is unknown or of no use."""
    if url is None:
        if settings.listens_everywhere:
            return (
                "say with --url how WAHA reaches this router, such as"
                " http://router:8001/webhook/waha in docker compose"
            )
        url = f"{settings.local_url}{WEBHOOK_PATH}"
    if reason := webhook_config.why_not(url):
        return reason
    keys = split(settings.webhook_hmac_key)
    return Wanted(
        url,
        webhook_config.events_for(settings.forward_events),
        keys[0] if keys else "",
        settings.waha_api_key.get_secret_value(),
    )


async def connect(
    settings: Settings, url: str | None, *, session: str, yes: bool, ask: Ask = input
) -> int:
    """Show the difference, ask, put it; the exit status."""
    want = wanted(settings, url)
    if isinstance(want, str):
        print(want, file=sys.stderr)
        return 2
    waha = Waha(settings.waha_api_url, settings.waha_api_key.get_secret_value())
    try:
        return await _connect(waha, want, settings, session, yes, ask)
    except ValueError as exc:  # NaN, or half an emoji, in the config
        print(f"what WAHA shows of session {session} cannot be sent back: {exc}", file=sys.stderr)
        return 1
    except WahaError as exc:
        print(f"{exc}\n{cure(exc)}", file=sys.stderr)
        return 1
    finally:
        await waha.close()


async def _connect(
    waha: Waha, want: Wanted, settings: Settings, session: str, yes: bool, ask: Ask
) -> int:
    config: dict[str, Any] = (await waha.session(session)).get("config") or {}
    new = webhook_config.repaired(config, want)
    for warning in _warnings(config, want, settings):
        print(f"Mind: {warning}")
    if webhook_config.is_configured(config, want):
        print(f"Session {session} has the webhook to {want.url} as it should be: nothing to do")
        return 0
    print("\n".join(_difference(config, new)))
    if not yes:
        if ask is input and not sys.stdin.isatty():
            print("Nobody to ask here: add --yes to do it", file=sys.stderr)
            return 1
        try:
            answer = ask(f"WAHA stops and starts session {session} for this. Do it? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            print("Nothing was changed")
            return 1
    await waha.set_config(session, new)
    left = webhook_config.faults((await waha.session(session)).get("config") or {}, want)
    if left:
        print(f"WAHA took it, but does not show it: {'; '.join(left)}", file=sys.stderr)
        return 1
    status = await _settled(waha, session)
    print(f"Done: session {session} sends {', '.join(want.events)} to {want.url}")
    if status != "WORKING":
        print(f"It is {status} now: {session_cure(status)}")
    return 0


async def _settled(waha: Waha, session: str) -> str:
    """The session's status once it has started again, or after START_SECONDS."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        status = str((await waha.session(session)).get("status"))
        if status != "STARTING" or time.monotonic() > deadline:
            return status
        await asyncio.sleep(_CHECK_SECONDS)


def session_cure(status: str) -> str:
    """What to do about a WAHA session that is not WORKING (WAHA docs, "Sessions")."""
    match status:
        case "STARTING":
            return "it is connecting: look again in a minute; if it stays so, restart it in WAHA"
        case "STOPPED":
            return "start it in WAHA's dashboard, or POST /api/sessions/{name}/start"
        case "FAILED":
            return "restart it in WAHA's dashboard; if it fails again, log it out and start it"
        case "SCAN_QR_CODE":
            return "scan the QR code in WAHA's dashboard with the phone that has the number"
        case "PASSKEY_REQUIRED" | "PASSKEY_CONFIRMATION_REQUIRED":
            return "sign in with the account's passkey: WAHA's dashboard shows how"
    return "see WAHA's dashboard"


def _warnings(config: dict[str, Any], want: Wanted, settings: Settings) -> list[str]:
    found = []
    if not want.hmac_key:
        found.append(
            "WEBHOOK_HMAC_KEY is empty, so webhooks are not signed: who reaches the router can"
            " post in a user's name"
            if want.api_key or settings.listens_on_loopback
            else "without WEBHOOK_HMAC_KEY or WAHA_API_KEY the router lets no webhook in"
        )
    for name, key in (("WEBHOOK_HMAC_KEY", want.hmac_key), ("WAHA_API_KEY", want.api_key)):
        if key and (len(key.encode()) < _WEAK_BYTES or is_guessable(key)):
            found.append(f"{name} is weak: take 32 random characters")
    ours, listed = urlsplit(want.url), config.get("webhooks")
    others = [
        str(one.get("url", ""))
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, dict) and str(one.get("url", "")).rstrip("/") != want.url.rstrip("/")
    ]
    for url in others:
        if _path(url) == ours.path:
            found.append(f"{url} gets the same events: if that is this router too, take it out")
    if others and not webhook_config.is_configured(config, want):
        found.append("the session's other webhooks get no more groups, channels and status either")
    found += [fault for fault in webhook_config.faults(config, want) if "twice" in fault]
    found.append(
        "WAHA's API does not show a webhook set by WHATSAPP_HOOK_URL: if that is this router as"
        " well, each event comes twice (the router drops the copy); keep one of them"
    )
    return found


def _difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Line by line, of what may change; secrets by a few digits of their hash."""
    before, after = (json.dumps(_shown(one), indent=1, ensure_ascii=False) for one in (old, new))
    return list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), "as it is", "as it should be", lineterm=""
        )
    )


def _shown(config: dict[str, Any]) -> dict[str, Any]:
    shown = copy.deepcopy({name: config.get(name) for name in ("ignore", "webhooks")})
    webhooks_ = shown["webhooks"]
    for webhook in webhooks_ if isinstance(webhooks_, list) else []:
        if not isinstance(webhook, dict):
            continue
        if webhook.get("hmac"):
            webhook["hmac"] = _mask(webhook["hmac"])
        headers = webhook.get("customHeaders")
        for header in headers if isinstance(headers, list) else []:
            if isinstance(header, dict):
                for name in header.keys() - {"name"}:
                    header[name] = _mask(header[name])
        url, query, secret = str(webhook.get("url", "")).partition("?")
        url = re.sub("//[^/@]*@", lambda found: f"//{_mask(found[0])}@", url)
        webhook["url"] = url + query + (_mask(secret) if secret else "")
    return shown


def _path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError:
        return ""


def _mask(secret: object) -> str:
    key = secret.get("key") if isinstance(secret, dict) else secret
    return f"(secret {hashlib.sha256(str(key).encode('utf-8', 'replace')).hexdigest()[:6]})"


def cure(error: WahaError) -> str:
    """What to do about what WAHA did not do."""
    match error.status:
        case 401 | 403:
            return "set WAHA_API_KEY to WAHA's key"
        case 404:
            return "create the session in WAHA's dashboard, or fix WAHA_API_URL: it ends in /api"
        case None:
            return "is WAHA running, and is WAHA_API_URL right as seen from here?"
    return "see WAHA's log"
