"""Serving: uvicorn with the app's lifespan around it."""

import asyncio
import contextlib
import gc
import socket
import sys
from types import FrameType
from typing import Literal

import uvicorn
from fastapi import FastAPI

from gateway.errors import StartRefused
from gateway.settings import Settings

# WAHA uses its connections again; the side that may not repeat a request must not be the one that
# closes an idle one.
_KEEP_ALIVE_SECONDS = 75
_ANSWERS_SECONDS = 10  # for webhooks that are being answered when the end comes


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
            # What there is now stays. Each full collection went through it, for 50 to 100 ms.
            gc.collect()
            gc.freeze()
            # Python's 700 collects several times for each batch of messages.
            gc.set_threshold(10_000)
            await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # the end is ours, not a second death by the signal
        self._loop.call_soon_threadsafe(self._app.state.worker.stop_claiming)


def serve(settings: Settings, app: FastAPI) -> int:
    """Serve until SIGINT or SIGTERM; 1 if the start failed or the store cannot be trusted."""
    _check_port(settings.host, settings.port)
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
    return 0 if server.started and app.state.suspect is None else 1


def _check_port(host: str, port: int) -> None:
    """Raise StartRefused where another program listens, before anything else is begun."""
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as exc:
                raise StartRefused(
                    f"PORT={port}: cannot be had on {host} ({exc.strerror}): stop what listens"
                    " there, or set PORT"
                ) from exc


def _protocol() -> type[asyncio.Protocol] | Literal["h11"]:
    if sys.platform == "win32":
        return "h11"  # it has bounds of its own
    from gateway.api.protocol import BoundedProtocol

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
