"""A walk through the product: make demo.

Starts the router on a temporary folder and examples/backend.py behind it, posts webhooks as WAHA
would, and shows what was answered beside what the backend received.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gateway.cli.say import compose  # noqa: E402  # the folder is known only now
from gateway.settings import Settings  # noqa: E402

ALI, SARA, OMAR = "971501234567", "971501234568", "971501234569"
GROUP = "120363040000000011@g.us"
SCENES = [
    ("Ali opens the link of agent 2", ALI, "start_realty_2"),
    ("he goes on writing", ALI, "Is the flat in Marina still free?"),
    ("Sara comes by the link of agent 7", SARA, "start_realty_7 Hello, I saw your ad 👋"),
    ("both write again", ALI, "How much is it?"),
    ("", SARA, "مرحبا، أريد السعر"),
    ("Omar has no link", OMAR, "Hello?"),
    ("somebody posts a link in a group", GROUP, "start_realty_2"),
    ("Ali quotes another agent's link: it moves nobody", ALI, "My friend sent start_realty_9"),
    ("Ali opens the link of agent 9: that moves him", ALI, "start_realty_9"),
]


def main() -> None:
    router_port, backend_port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory(prefix="gateway-demo-") as folder:
        backend = _start(
            "backend",
            ["-m", "uvicorn", "examples.backend:app", "--port", str(backend_port)],
            {"PYTHONPATH": str(ROOT)},
            Path(folder),
        )
        router = _start(
            "router",
            [str(ROOT / "whatsapp_router.py")],
            {
                "PORT": str(router_port),
                "BACKEND_API_URL": f"http://127.0.0.1:{backend_port}",
                "LOG_LEVEL": "WARNING",
            },
            Path(folder),
        )
        try:
            _wait_for(f"http://127.0.0.1:{backend_port}/openapi.json")
            _wait_for(f"http://127.0.0.1:{router_port}/health")
            _play(f"http://127.0.0.1:{router_port}", Path(folder) / "backend.log")
            locks = (Path(folder) / "data" / "router_mappings.json").read_text().strip()
            print(f"\nrouter_mappings.json, in a folder of the demo's own: {locks}")
        finally:
            for process in (router, backend):
                process.terminate()
            for process in (router, backend):
                process.wait(30)


def _play(router: str, backend_log: Path) -> None:
    for title, user, text in SCENES:
        if title:
            print(f"\n── {title}")
        print(f"   WAHA posts        {user}: {text}")
        body = compose(user, text, session="default", now=time.time())
        answer = httpx.post(f"{router}/webhook/waha", content=body)
        print(f"   router answers    {answer.status_code} {answer.text}")
        received = _received(backend_log, text) if '"routed"' in answer.text else None
        print(f"   backend receives  {received or '(nothing)'}")


def _received(backend_log: Path, text: str) -> str:
    """What the backend logged about text: its line with the tenant, once it is there."""
    for _ in range(500):
        log = backend_log.read_text("utf-8")
        if found := re.search(rf"(🔀 .*)\n   (\d+: {re.escape(text)})\n", log):
            return f"{found[1]}: {found[2]}"
        time.sleep(0.01)
    raise SystemExit(f"the backend did not receive {text!r} within 5 s")


def _start(
    name: str, command: list[str], env: dict[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    """Runs in folder and without the settings of your environment: the demo is always the same."""
    neutral = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
    with (folder / f"{name}.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=neutral | {"PYTHONUTF8": "1"} | env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            httpx.get(url)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"{url} does not answer within 10 s")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
