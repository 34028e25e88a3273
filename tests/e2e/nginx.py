"""An nginx of a test's own."""

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.programs import program


@contextlib.contextmanager
def nginx(config: str, folder: Path) -> Iterator[None]:
    """Runs, and listens where config says, until the block ends; skips the test without one."""
    file = folder / "nginx.conf"
    file.write_text(config)
    listens = re.search(r"listen (127\.0\.0\.1:[0-9]+)", config)
    assert listens
    command = [
        program("nginx", "/usr/sbin/nginx"),
        "-e",
        "stderr",
        "-p",
        str(folder),
        "-c",
        str(file),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(400):
            assert process.poll() is None, "nginx did not start"
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://{listens[1]}/health")
                break
            time.sleep(0.025)
        yield
    finally:
        process.terminate()
        process.wait(10)
