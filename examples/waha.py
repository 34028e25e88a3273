"""A stand-in for WAHA, to see without WhatsApp what the router asks of it.

    .venv/bin/python examples/waha.py --lid 158764321000007=971501234507

It listens on port 3000, knows the phones of the LIDs it is told, and prints each text that it is
asked to send. It has a session `default`, whose config can be read and replaced. It answers as
WAHA's docs of July 2026 say ("Contacts", "Send messages", "Sessions"), with its refusals: 401
without the key, 422 after a while when a session is not WORKING, 400 from NOWEB without its store,
`"pn": null` for a LID it does not know, 404 for a session that is not there.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web


@dataclass
class StandIn:
    """What it knows, and what it was asked. Times are seconds."""

    key: str = ""  # X-Api-Key that callers must send; empty: none
    phones: dict[str, str] = field(default_factory=dict)  # LID → phone, both as digits
    statuses: dict[str, str] = field(default_factory=dict)  # of sessions; WORKING if not here
    configs: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    has_store: bool = True  # False: NOWEB as it is by default
    delay: float = 0.0  # before each answer
    patience: float = 15.0  # before it says that a session is not WORKING
    odd_answer: Callable[[], web.Response] | None = None  # in place of every other
    url: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)  # payloads that it has, any order
    can_tell: bool = True  # False: as WEBJS, which has no such list
    listed: int = 0  # how often they were asked for
    asked: list[tuple[str, str]] = field(default_factory=list)  # session, LID
    sent: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)  # sessions that were stopped and started

    async def phone_of(self, request: web.Request) -> web.StreamResponse:
        session, lid = request.match_info["session"], request.match_info["lid"]
        self.asked.append((session, lid))
        if refusal := await self._refusal(request, session):
            return refusal
        number = lid.removesuffix("@lid")
        if not self.has_store:
            return _error(400, "Enable NOWEB store")
        phone = self.phones.get(number)
        return web.json_response({"lid": f"{number}@lid", "pn": f"{phone}@c.us" if phone else None})

    async def send_text(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if refusal := await self._refusal(request, body["session"]):
            return refusal
        self.sent.append(body)
        print(f"to {body['chatId']} by session {body['session']}:\n{body['text']}", flush=True)
        return web.json_response({"id": f"true_{body['chatId']}_3EB0"}, status=201)

    async def all_messages(self, request: web.Request) -> web.StreamResponse:
        """Newest first, of all chats."""
        self.listed += 1
        if refusal := await self._refusal(request, request.match_info["session"]):
            return refusal
        if not self.can_tell:
            return _error(501, "Not implemented by the engine")
        query = request.query
        since = int(query.get("filter.timestamp.gte", 0))
        found = [one for one in self.messages if one["timestamp"] >= since and not one["fromMe"]]
        found.sort(key=lambda one: -one["timestamp"])
        begin = int(query.get("offset", 0))
        return web.json_response(found[begin : begin + int(query.get("limit", 10))])

    async def ping(self, _: web.Request) -> web.Response:
        return web.json_response({"message": "pong"})

    async def session(self, request: web.Request) -> web.StreamResponse:
        """GET shows a session; PUT replaces its whole config and restarts it."""
        name = request.match_info["session"]
        if self.odd_answer:
            return self.odd_answer()
        if self.key and request.headers.get("X-Api-Key") != self.key:
            return _error(401, "Unauthorized")
        if name not in self.configs:
            return _error(404, "Session not found")
        if request.method == "PUT":
            config = (await request.json())["config"]
            for webhook in config.get("webhooks", []):
                if "_" in (urlsplit(webhook["url"]).hostname or "_"):
                    return _error(400, "url must be a URL address")
            self.configs[name] = config
            self.restarts.append(name)
            print(f"session {name} restarts with {len(config.get('webhooks', []))} webhook(s)")
        status = self.statuses.get(name, "WORKING")
        return web.json_response(
            {
                "name": name,
                "status": status,
                "config": self.configs[name],
                "me": {"id": "971557357753@c.us", "pushName": "Office"},
                "engine": {"engine": "NOWEB"},
            }
        )

    async def _refusal(self, request: web.Request, session: str) -> web.StreamResponse | None:
        await asyncio.sleep(self.delay)
        if self.odd_answer:
            return self.odd_answer()
        if self.key and request.headers.get("X-Api-Key") != self.key:
            return _error(401, "Unauthorized")
        status = self.statuses.get(session, "WORKING")
        if status != "WORKING":
            await asyncio.sleep(self.patience)
            return _error(422, f"Session status is not as expected: {status}")
        return None

    async def start(self, port: int = 0) -> web.AppRunner:
        """Listen on a free port, or this one; whoever starts it cleans the runner up."""
        app = web.Application()
        app.router.add_get("/api/{session}/lids/{lid}", self.phone_of)
        app.router.add_get("/api/{session}/chats/all/messages", self.all_messages)
        app.router.add_post("/api/sendText", self.send_text)
        app.router.add_get("/ping", self.ping)
        app.router.add_get("/api/sessions/{session}", self.session)
        app.router.add_put("/api/sessions/{session}", self.session)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/api"
        return runner


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"message": message, "statusCode": status}, status=status)


async def _serve(port: int, stand_in: StandIn) -> None:
    await stand_in.start(port)
    print(f"a stand-in for WAHA: {stand_in.url}", flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def _port_told(port: int) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        sys.exit(f"port {port}: {exc.strerror}: stop what listens there, or give --port")


def main() -> None:
    parser = argparse.ArgumentParser(description="a stand-in for WAHA")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--key", default="", help="X-Api-Key to ask for")
    parser.add_argument("--lid", action="append", default=[], help="158764321000007=971501234507")
    options = parser.parse_args()
    phones = dict(pair.split("=", 1) for pair in options.lid)
    with contextlib.suppress(KeyboardInterrupt), _port_told(options.port):
        asyncio.run(_serve(options.port, StandIn(options.key, phones)))


if __name__ == "__main__":
    main()
