"""The router as a process of its own: started, called, killed, started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from gateway.settings import Settings

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, str(ROOT / "whatsapp_router.py"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment(**settings: str) -> dict[str, str]:
    """This one, without settings of the router's but those given; whatever runs on this machine
    gets no message of a test."""
    neutral = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
    nobody = {
        "WAHA_API_URL": "http://127.0.0.1:9/api",
        "BACKEND_API_URL": "http://127.0.0.1:9",
    }
    return (
        neutral
        | {"PYTHONUTF8": "1"}
        | nobody
        | {name.upper(): text for name, text in settings.items()}
    )


class Router:
    """Runs in folder, so that no .env of ours counts; its log is folder/router.log."""

    def __init__(self, folder: Path, command: Sequence[str] = COMMAND, **settings: str) -> None:
        self._command = command
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder / "router.log"
        self.env = environment(port=str(self.port), **settings)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Router":
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        for _ in range(400):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/health")
                return self
            assert self._process.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.025)
        raise AssertionError(f"no answer within 10 s: {self.log.read_text('utf-8')}")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line beside the running router."""
        return subprocess.run(
            [*self._command, *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=30,
            check=False,
        )

    def post(self, body: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{self.url}/webhook/waha", content=body, headers=named, timeout=30)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def megabytes(self) -> float:
        """What it holds of the memory now (Linux)."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text("utf-8")
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def wait(self) -> int:
        """The exit status."""
        assert self._process is not None
        return self._process.wait(40)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self.signal(signal.SIGTERM)
            self.wait()


@contextlib.contextmanager
def running(folder: Path, **settings: str) -> Iterator[Router]:
    router = Router(folder, **settings)
    try:
        yield router.start()
    finally:
        router.stop()
