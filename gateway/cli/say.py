"""say: a message as WAHA would post it, to try the router by hand."""

import json
import secrets
import sys
import time

import httpx

from gateway.domain import phone_numbers
from gateway.settings import WEBHOOK_PATH, Settings, split
from gateway.waha import signature


def say(settings: Settings, phone: str, text: str, session: str | None) -> int:
    """Compose a webhook as WAHA does, sign it, post it to the running router, show the answer."""
    user = phone_numbers.person(phone, gateway_phone=settings.gateway_phone)
    if user is None:
        print(f"{phone!r} is no user: digits with the country code, or …@lid", file=sys.stderr)
        return 2
    body = compose(user, text, session=session or settings.waha_session, now=time.time())
    headers = [("Content-Type", "application/json"), ("User-Agent", "say")]
    if keys := split(settings.webhook_hmac_key):
        headers.append(("X-Webhook-Hmac", signature.sign(body, keys[0].encode())))
        headers.append(("X-Webhook-Hmac-Algorithm", signature.ALGORITHM))
    elif key := settings.waha_api_key.get_secret_value():
        headers.append(("X-Api-Key", key))
    url = f"{settings.local_url}{WEBHOOK_PATH}"
    try:
        answer = httpx.post(
            url,
            content=body,
            headers=[(name.encode(), value.encode()) for name, value in headers],
            timeout=30,
            trust_env=False,
        )
    except httpx.HTTPError as exc:
        print(f"{url}: {exc}: is the router running?", file=sys.stderr)
        return 1
    print(answer.text)
    return 0 if answer.is_success else 1


def compose(user: str, text: str, *, session: str, now: float) -> bytes:
    """The body of a `message` event, as the NOWEB engine writes it. user: digits or a chat id."""
    chat = user if "@" in user else f"{user}@c.us"
    bare_id = secrets.token_hex(16).upper()
    envelope = {
        "id": f"evt_{secrets.token_hex(13)}",
        "timestamp": int(now * 1000),
        "event": "message",
        "session": session,
        "metadata": {},
        "me": None,
        "payload": {
            "id": f"false_{chat}_{bare_id}",
            "timestamp": int(now),
            "from": chat,
            "fromMe": False,
            "source": "app",
            "body": text,
            "hasMedia": False,
            "media": None,
        },
        "engine": "NOWEB",
        "environment": {"version": "say", "engine": "NOWEB", "tier": "CORE"},
    }
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "replace"
    )
