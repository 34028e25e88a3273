"""What the measurements share: bodies as WAHA sends them, a router of their own, the machine."""

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SINK_PORT, RELAY_PORT, ROUTER_PORT = 18090, 18091, 18092
PATH = "/webhook/waha"
TARGET = f"http://127.0.0.1:{SINK_PORT}"


def machine() -> str:
    return f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores"


def body(user: int, number: int, text: str) -> bytes:
    chat, now = f"97150{user:07}@c.us", time.time()
    envelope = {
        "id": f"evt_{number:026d}",
        "timestamp": int(now * 1000),
        "event": "message",
        "session": "default",
        "metadata": {},
        "me": {"id": "971557357753@c.us", "pushName": "Gateway"},
        "payload": {
            "id": f"false_{chat}_3EB0{number:016X}",
            "timestamp": int(now),
            "from": chat,
            "fromMe": False,
            "source": "app",
            "body": text,
            "hasMedia": False,
            "media": None,
            "_data": {"key": {"remoteJid": chat, "fromMe": False}, "pushName": "x" * 400},
        },
        "engine": "NOWEB",
        "environment": {"version": "2026.7.1", "engine": "NOWEB", "tier": "CORE"},
    }
    return json.dumps(envelope, separators=(",", ":")).encode()


def router(folder: Path, **settings: str) -> subprocess.Popen[bytes]:
    """A router on ROUTER_PORT with its data and router.log in folder; its backend is TARGET."""
    ours = {"PORT": str(ROUTER_PORT), "DATA_DIR": str(folder / "data"), "BACKEND_API_URL": TARGET}
    named = {name.upper(): value for name, value in settings.items()}
    return start(["whatsapp_router.py"], ours | named, folder / "router.log")


def start(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["taskset", "-c", "0", sys.executable, *command],
        cwd=ROOT,
        env=os.environ | env,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


async def listening(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return
    raise SystemExit(f"nothing listens on port {port}")
