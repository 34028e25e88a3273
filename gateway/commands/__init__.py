"""The command line: serve, say, link, connect-waha, doctor, backup, restore, move, rebuild."""

import argparse
import asyncio
import json
import re
import secrets
import sys
import time
from pathlib import Path

import httpx
from fastapi import FastAPI

from gateway import deeplink, qr, spelling
from gateway.commands.backup import back_up, put_back
from gateway.commands.connect import connect
from gateway.commands.doctor import examine
from gateway.commands.move import move_house
from gateway.commands.serve import serve
from gateway.errors import StartRefused, TooLongForQr
from gateway.model import LARGEST_TENANT, TenantId
from gateway.settings import Settings, split
from gateway.store import moving, opening
from gateway.tenants import FILE_NAME, Tenants
from gateway.waha import signature


def main(arguments: list[str], settings: Settings, app: FastAPI) -> int:
    """Run what arguments say; the exit status."""
    options = _parser().parse_args(arguments)
    if options.command and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a C locale knows no emoji
    try:
        match options.command:
            case "say":
                return _say(settings, options.phone, " ".join(options.text), options.session)
            case "link":
                return _link(settings, options)
            case "connect-waha":
                session = options.session or settings.waha_session
                if not re.fullmatch("[A-Za-z0-9_-]{1,64}", session):
                    print(f"--session {session!a}: 1-64 of A-Z a-z 0-9 _ -", file=sys.stderr)
                    return 2
                return asyncio.run(connect(settings, options.url, session=session, yes=options.yes))
            case "doctor":
                return asyncio.run(examine(settings, options.url))
            case "move":
                if options.reopen:
                    asyncio.run(moving.reopen(options.reopen))
                    print("routers may use it again")
                    return 0
                if not (options.source and options.target):
                    print("move needs --from and --to, or --reopen", file=sys.stderr)
                    return 2
                return asyncio.run(move_house(options.source, options.target))
            case "backup":
                folder = _folder(settings, "backup")
                return asyncio.run(back_up(settings, folder, options.into, keep=options.keep))
            case "restore":
                return put_back(_folder(settings, "restore"), options.place)
            case "rebuild":
                path, count = opening.rebuild(_folder(settings, "rebuild"))
                print(f"{path}: {count} locks written from the history")
                return 0
            case _:
                return serve(settings, app)
    except StartRefused as exc:
        print(exc, file=sys.stderr)
        return 1


def _folder(settings: Settings, command: str) -> Path:
    scheme, _, folder = settings.store_place.partition(":")
    if scheme != "file":
        raise StartRefused(f"STORE_URL={scheme}:…: {command} is for the file store")
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
    link = commands.add_parser("link", help="show a tenant's link, and draw its QR code")
    link.add_argument("tenant", type=int, help="the tenant's number")
    link.add_argument("--text", default="", help="what stands behind the link, on a new line")
    link.add_argument("--qr", type=Path, metavar="FILE", help="draw it: FILE.svg or FILE.png")
    link.add_argument("--size", type=int, default=512, help="pixels of a side (512)")
    link.add_argument(
        "--margin", type=int, default=qr.QUIET_ZONE, help="modules around the code (4)"
    )
    for name, told in (
        ("connect-waha", "set up this router's webhook in a WAHA session"),
        ("doctor", "look for what is wrong, from inside and outside"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("--url", help="how WAHA reaches this router's /webhook/waha")
        if name == "connect-waha":
            command.add_argument("--session", help="the WAHA session (WAHA_SESSION)")
            command.add_argument("--yes", action="store_true", help="do not ask")
    move = commands.add_parser(
        "move", help="carry all from one store to another; stop routers first"
    )
    move.add_argument("--from", dest="source", help="as STORE_URL: file:data")
    move.add_argument("--to", dest="target", help="as STORE_URL: redis://…")
    move.add_argument("--reopen", metavar="URL", help="let routers use again what has moved away")
    save = commands.add_parser("backup", help="copy all that the router holds, while it runs")
    save.add_argument("into", type=Path, metavar="DIR", help="where, on another disk")
    save.add_argument("--keep", type=int, default=7, help="so many back-ups in DIR (7)")
    back = commands.add_parser("restore", help="put a back-up in place of what is there")
    back.add_argument("place", type=Path, metavar="DIR", help="a back-up, or where they are")
    commands.add_parser("rebuild", help="write a lost router_mappings.json from the history")
    return parser


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
    url = f"{settings.local_url}/webhook/waha"
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


def _link(settings: Settings, options: argparse.Namespace) -> int:
    if not 1 <= options.tenant <= LARGEST_TENANT:
        print(f"{options.tenant} is no tenant: a number of 1-{LARGEST_TENANT}", file=sys.stderr)
        return 2
    number = TenantId(options.tenant)
    tenant = Tenants(settings.data_dir / FILE_NAME).get(number)
    if tenant is None:
        print(f"tenant {number} is not in {FILE_NAME}", file=sys.stderr)
        return 1
    if not tenant.active:
        print(f"tenant {number} is not active: the link locks nobody", file=sys.stderr)
    try:
        options.text.encode()
    except UnicodeEncodeError:
        print("--text: is not UTF-8", file=sys.stderr)
        return 2
    text = deeplink.text_of(number, prefix=settings.deep_link_prefix, note=options.text)
    address = deeplink.address(text, phone=tenant.gateway_phone or settings.gateway_phone)
    if options.qr:
        draw = {".svg": qr.svg, ".png": qr.png}.get(options.qr.suffix.lower())
        if draw is None or not (32 <= options.size <= 4096 and 0 <= options.margin <= 50):
            print(
                f"{options.qr}: a name that ends with .svg or .png, --size 32-4096, --margin 0-50",
                file=sys.stderr,
            )
            return 2
        try:
            options.qr.write_bytes(draw(address, size=options.size, margin=options.margin))
        except (TooLongForQr, OSError) as exc:
            print(f"{options.qr}: {exc}", file=sys.stderr)
            return 1
    print(address)
    return 0


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
