"""The command line: serve, say, link, connect-waha, doctor, recover, replay, backup, restore,
migrate, rebuild."""

import argparse
import asyncio
import re
import sys
from pathlib import Path

from gateway import VERSION
from gateway.app import create_app
from gateway.cli.backup import back_up, put_back
from gateway.cli.connect import connect
from gateway.cli.doctor import examine
from gateway.cli.link import link
from gateway.cli.migrate import migrate_stores
from gateway.cli.recover import recover
from gateway.cli.replay import replay
from gateway.cli.say import say
from gateway.cli.serve import serve
from gateway.domain.model import SESSION_NAME, SESSION_NAME_IN_WORDS
from gateway.errors import StartRefused
from gateway.settings import Settings
from gateway.store.files import opening
from gateway.store.migration import migrate
from gateway.tenants import qr


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Do what options, of parser(), say; return the exit status."""
    if options.command and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a C locale knows no emoji
    try:
        match options.command:
            case "say":
                return say(settings, options.phone, " ".join(options.text), options.session)
            case "link":
                return link(settings, options)
            case "connect-waha":
                session = options.session or settings.waha_session
                return asyncio.run(connect(settings, options.url, session=session, yes=options.yes))
            case "doctor":
                return asyncio.run(examine(settings, options.url))
            case "recover":
                work = recover(settings, session=options.session, hours=options.hours)
                return asyncio.run(work)
            case "replay":
                return asyncio.run(replay(settings, tenant=options.tenant, user=options.user))
            case "migrate":
                if options.reopen:
                    asyncio.run(migrate.reopen(options.reopen))
                    print("routers may use it again")
                    return 0
                if not (options.source and options.target):
                    print("migrate needs --from and --to, or --reopen", file=sys.stderr)
                    return 2
                return asyncio.run(migrate_stores(options.source, options.target))
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
                return serve(settings, create_app(settings))
    except StartRefused as exc:
        print(exc, file=sys.stderr)
        return 1


def _folder(settings: Settings, command: str) -> Path:
    scheme, _, folder = settings.store_place.partition(":")
    if scheme != "file":
        raise StartRefused(f"STORE_URL={scheme}:…: {command} is for the file store")
    return Path(folder)


def parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    made = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name or "whatsapp-router",
        description="Routes WAHA's webhooks to the tenants' backend. Without a command it serves on"
        " HOST:PORT. Every setting is an environment variable: see docs/reference.md.",
    )
    made.add_argument("--version", action="version", version=f"whatsapp-router {VERSION}")
    commands = made.add_subparsers(dest="command", title="commands (none: serve)")
    say = commands.add_parser("say", help="post a message to the running router, as WAHA would")
    say.add_argument("phone", help="who says it: digits, or …@lid")
    say.add_argument("text", nargs="+", help="what is said, such as start_realty_2")
    say.add_argument(
        "--session", type=_session, help="the WAHA session it comes in on (WAHA_SESSION)"
    )
    link = commands.add_parser("link", help="show a tenant's link, and draw its QR code")
    link.add_argument("tenant", type=int, help="the tenant's number")
    link.add_argument("--text", default="", help="the text behind the link, on a new line")
    link.add_argument("--qr", type=Path, metavar="FILE", help="draw it: FILE.svg or FILE.png")
    link.add_argument("--size", type=int, default=512, help="pixels of a side (512)")
    link.add_argument(
        "--margin", type=int, default=qr.QUIET_ZONE, help="modules around the code (4)"
    )
    for name, summary in (
        ("connect-waha", "set up this router's webhook in a WAHA session"),
        ("doctor", "look for what is wrong, from inside and outside"),
    ):
        command = commands.add_parser(name, help=summary)
        command.add_argument("--url", help="how WAHA reaches this router's /webhook/waha")
        if name == "connect-waha":
            command.add_argument("--session", type=_session, help="the WAHA session (WAHA_SESSION)")
            command.add_argument("--yes", action="store_true", help="do not ask")
    ask = commands.add_parser("recover", help="let the router ask WAHA for what never came")
    ask.add_argument("--hours", type=float, help="how far back (since the last message that came)")
    ask.add_argument("--session", type=_session, help="the WAHA session (WAHA_SESSION)")
    replay_command = commands.add_parser("replay", help="let the router deliver dead letters again")
    which = replay_command.add_mutually_exclusive_group(required=True)
    which.add_argument("--tenant", type=int, help="of this tenant")
    which.add_argument("--user", help="of this user")
    which.add_argument("--all", action="store_true", help="every one")
    migration = commands.add_parser(
        "migrate", help="carry all from one store to another; stop routers first"
    )
    migration.add_argument("--from", dest="source", help="as STORE_URL: file:data")
    migration.add_argument("--to", dest="target", help="as STORE_URL: redis://…")
    migration.add_argument(
        "--reopen", metavar="URL", help="let routers use again what has been migrated away"
    )
    save = commands.add_parser("backup", help="copy all that the router holds, while it runs")
    save.add_argument("into", type=Path, metavar="DIR", help="where, on another disk")
    save.add_argument("--keep", type=int, default=7, help="so many back-ups in DIR (7)")
    back = commands.add_parser("restore", help="put a back-up in place of what is there")
    back.add_argument("place", type=Path, metavar="DIR", help="a back-up, or where they are")
    commands.add_parser("rebuild", help="write a lost router_mappings.json from the history")
    return made


def _session(text: str) -> str:
    if not re.fullmatch(SESSION_NAME, text):
        raise argparse.ArgumentTypeError(f"{text!a}: must be {SESSION_NAME_IN_WORDS}")
    return text
