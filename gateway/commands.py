"""The command line: serve, say, rebuild."""

import argparse
import asyncio
import contextlib
import gc
import json
import secrets
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Literal

import httpx
import uvicorn
from fastapi import FastAPI

from gateway import spelling
from gateway.errors import StartRefused
from gateway.settings import Settings, split
from gateway.store import opening
from gateway.waha import signature

# WAHA uses its connections again; the side that may not repeat a request must not be the one that
# closes an idle one.
_KEEP_ALIVE_SECONDS = 75
_ANSWERS_SECONDS = 10  # for webhooks that are being answered when the end comes


def main(arguments: list[str], settings: Settings, app: FastAPI) -> int:
    """Run what arguments say; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "say":
                return _say(settings, options.phone, " ".join(options.text), options.session)
            case "rebuild":
                path, count = opening.rebuild(_folder(settings))
                print(f"{path}: {count} locks written from the history")
                return 0
            case _:
                return serve(settings, app)
    except StartRefused as exc:
        print(exc, file=sys.stderr)
        return 1


def _folder(settings: Settings) -> Path:
    scheme, _, folder = settings.store_place.partition(":")
    if scheme != "file":
        raise StartRefused(f"STORE_URL={scheme}:…: rebuild is for the file store")
    return Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whatsapp_router.py", description="Routes WAHA's webhooks to the tenants' backend."
    )
    commands = parser.add_subparsers(dest="command", title="commands (none: serve)")
    say = commands.add_parser("say", help="post a message to the running router, as WAHA would")
    say.add_argument("phone", help="who says it: digits, or …@lid")
    say.add_argument("text", nargs="+", help="what is said, such as start_realty_2")
    say.add_argument("--session", help="the WAHA session it comes in on (WAHA_SESSION)")
    commands.add_parser("rebuild", help="write a lost router_mappings.json from the history")
    return parser


class _Server(uvicorn.Server):
    """uvicorn, but the app's lifespan is around it, and nothing new goes out after a signal.

    So a refused start is an exception for main() to print, not a traceback in uvicorn's log.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        async with self._app.router.lifespan_context(self._app):
            # What stands now stays. Each full collection went through it, for 50 to 100 ms.
            gc.collect()
            gc.freeze()
            await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # the end is ours, not a second death by the signal
        self._loop.call_soon_threadsafe(self._app.state.courier.stop_claiming)


def serve(settings: Settings, app: FastAPI) -> int:
    """Serve until SIGINT or SIGTERM; 1 if the start failed or the store cannot be trusted."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http=_protocol(),
        ws="none",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_ANSWERS_SECONDS,
    )
    _allow_connections()
    server = _Server(config, app)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started and app.state.distrusted is None else 1


def _protocol() -> type[asyncio.Protocol] | Literal["h11"]:
    if sys.platform == "win32":
        return "h11"  # it has bounds of its own
    from gateway.wire import BoundedProtocol

    return BoundedProtocol


def _allow_connections() -> None:
    """As many open files as the system lets us have: shells give 1,024, too few for hostile days
    (Go's runtime does the same since 1.19)."""
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _say(settings: Settings, phone: str, text: str, session: str | None) -> int:
    """Compose a webhook as WAHA does, sign it, post it to the running router, show the answer."""
    user = spelling.person(phone)
    if user is None:
        print(f"{phone!r} is no user: digits in any usual spelling, or …@lid", file=sys.stderr)
        return 2
    body = compose(user, text, session=session or settings.waha_session, now=time.time())
    headers = [("Content-Type", "application/json"), ("User-Agent", "say")]
    if keys := split(settings.webhook_hmac_key):
        headers.append(("X-Webhook-Hmac", signature.sign(body, keys[0].encode())))
        headers.append(("X-Webhook-Hmac-Algorithm", signature.ALGORITHM))
    elif key := settings.waha_api_key.get_secret_value():
        headers.append(("X-Api-Key", key))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/webhook/waha"
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
