"""A stand-in for WAHA, to see without WhatsApp what the router asks of it.

    .venv/bin/python examples/waha.py --lid 158764321000007=971501234507

It listens on port 3000, knows the phones of the LIDs it is given, and prints each text that it is
asked to send. It answers as WAHA's own code of 2026.4.1 does, its unkind parts included:

- the session `default` alone; of another name 422, or 404 from 2026.6.1 on (--many-sessions);
- a session's config is in memory: a restart of WAHA forgets it, webhooks and all (restart());
- PUT on a session checks events and URLs, drops what it does not know, takes three seconds, and
  answers STARTING;
- 422 for a session that is not WORKING comes after 10 to 15 seconds;
- a list of messages has ten unless asked for more, the newest first; within one second they stand
  in the order in which they came; a query that it cannot read is 400;
- media are downloaded by a list unless told not to, and deleted after 180 seconds;
- what sendText answers differs by engine.
"""

import argparse
import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

OWN = {"id": "971557357753@c.us", "lid": "230000000000001@lid", "pushName": "Office"}
# Names that 2026.4.1 knows; newer ones are refused by it.
EVENTS = frozenset(
    [
        "session.status",
        "message",
        "message.any",
        "message.reaction",
        "message.ack",
        "message.ack.group",
        "message.waiting",
        "message.edited",
        "message.revoked",
        "chat.archive",
        "group.v2.join",
        "group.v2.leave",
        "group.v2.participants",
        "group.v2.update",
        "presence.update",
        "poll.vote",
        "poll.vote.failed",
        "event.response",
        "event.response.failed",
        "label.upsert",
        "label.deleted",
        "label.chat.added",
        "label.chat.deleted",
        "call.received",
        "call.accepted",
        "call.rejected",
        "engine.event",
        "group.join",
        "group.leave",
        "state.change",
        "*",
    ]
)
_BOOLEANS = frozenset(["true", "True", "1", "false", "False", "0"])
_ACKS = frozenset(["ERROR", "PENDING", "SERVER", "DEVICE", "READ", "PLAYED"])
_POLICIES = frozenset(["constant", "linear", "exponential"])
_FILE_SECONDS = 180.0  # WHATSAPP_FILES_LIFETIME


@dataclass
class StandIn:
    """What it knows, and what it was asked. Times are seconds."""

    key: str = ""  # X-Api-Key that callers must send; empty: none
    engine: str = "NOWEB"
    many_sessions: bool = False  # as from 2026.6.1 on
    phones: dict[str, str] = field(default_factory=dict)  # LID → phone, both as digits
    statuses: dict[str, str] = field(default_factory=dict)  # of sessions; WORKING if not here
    # Of the sessions that there are; None: it was never set.
    configs: dict[str, dict[str, Any] | None] = field(default_factory=lambda: {"default": None})
    has_store: bool = True  # False: NOWEB as it is by default
    delay: float = 0.0  # before each answer
    retry_after: float = 15.0  # before it says that a session is not WORKING
    put_seconds: float = 3.0  # to stop a session for its new config, and as long to start it
    odd_answer: Callable[[], web.Response] | None = None  # in place of every other
    url: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)  # payloads, as they came in
    can_report: bool = True  # False: as WEBJS, which has no such list
    knows_order: bool = True  # False: it takes no sortOrder
    lost_media: set[str] = field(default_factory=set)  # bare ids whose media WhatsApp dropped
    listed: int = 0  # how often messages were asked for
    queries: list[dict[str, str]] = field(default_factory=list)  # with which parameters
    asked: list[tuple[str, str]] = field(default_factory=list)  # session, LID
    downloads: list[str] = field(default_factory=list)  # ids of messages whose media were fetched
    files: dict[str, float] = field(default_factory=dict)  # bare id → when its file goes
    sent: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)  # sessions that were stopped and started
    started_at: float = field(default_factory=time.time)
    server_status: int = 200  # of the calls about the server; 403: the key is narrowed
    _starting_until: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        """WAHA itself ends and begins again: a Core before 2026.6 has forgotten its configs."""
        self.started_at = time.time()
        self.files.clear()
        if not self.many_sessions:
            self.configs = dict.fromkeys(self.configs)

    # LIDs

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

    # sending

    async def send_text(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("session"):
            return _error(400, "Session name is required")
        if refusal := await self._refusal(request, body["session"]):
            return refusal
        if "chatId" not in body:
            return _crash("Cannot read properties of undefined (reading 'endsWith')", body)
        self.sent.append(body)
        print(f"to {body['chatId']} by session {body['session']}:\n{body['text']}", flush=True)
        return web.json_response(self._sent_answer(body["chatId"]), status=201)

    def _sent_answer(self, chat: str) -> dict[str, Any]:
        bare = f"3EB0{len(self.sent):016X}"
        whole = f"true_{chat}_{bare}"
        if self.engine == "NOWEB":
            jid = chat.replace("@c.us", "@s.whatsapp.net")
            key = {"remoteJid": jid, "fromMe": True, "id": bare}
            return {"key": key, "messageTimestamp": f"{time.time():.0f}", "status": "PENDING"}
        if self.engine == "WEBJS":
            id_ = {"fromMe": True, "remote": chat, "id": bare, "_serialized": whole}
            return {"id": id_, "ack": 0, "_data": {}}
        return {"id": whole, "_data": {}}

    # messages

    async def all_messages(self, request: web.Request) -> web.StreamResponse:
        """Of all chats, or of one."""
        self.listed += 1
        self.queries.append(dict(request.query))
        if refusal := await self._refusal(request, request.match_info["session"]):
            return refusal
        if not self.can_report:
            return _error(
                501, f"The method is not implemented by '{self.engine}' engine", "Not Implemented"
            )
        if not self.has_store:
            return _error(400, "Enable NOWEB store")
        query = request.query
        if faults := _faults(query):
            return _error(400, faults)
        found = [one for one in self.messages if self._fits(one, query, request.match_info["chat"])]
        # Stable: within one second as they came in, whichever way.
        up = query.get("sortOrder") == "asc" and self.knows_order
        found.sort(key=lambda one: _seconds(one) * (1 if up else -1))
        begin, limit = int(query.get("offset", 0)), int(query.get("limit", 10))
        page = found[begin:] if limit == 0 else found[begin : begin + limit]
        if query.get("downloadMedia", "true") in ("true", "True", "1"):
            page = [self._with_media(one) for one in page]
        return web.json_response(page)

    async def message(self, request: web.Request) -> web.StreamResponse:
        if refusal := await self._refusal(request, request.match_info["session"]):
            return refusal
        wanted = request.match_info["id"]
        for one in self.messages:
            if wanted in (one["id"], _bare(one)):
                fetch = request.query.get("downloadMedia", "true") in ("true", "True", "1")
                return web.json_response(self._with_media(one) if fetch else one)
        return _error(404, "Message not found", "Not Found")

    def _fits(self, one: dict[str, Any], query: Mapping[str, str], chat: str) -> bool:
        return (
            chat in ("all", one["from"])
            and float(query.get("filter.timestamp.gte", 0)) <= _seconds(one)
            and _seconds(one) <= float(query.get("filter.timestamp.lte", "inf"))
            and query.get("filter.fromMe", str(one["fromMe"]).lower()) == str(one["fromMe"]).lower()
        )

    def _with_media(self, one: dict[str, Any]) -> dict[str, Any]:
        if not one.get("hasMedia"):
            return one
        media = {
            "url": None,
            "mimetype": "image/jpeg",
            "filename": None,
            **(one.get("media") or {}),
        }
        bare = _bare(one)
        if bare in self.lost_media:
            return one | {"media": media | {"url": None, "error": {"message": "gone"}}}
        if bare not in self.files or self.files[bare] <= time.time():
            self.downloads.append(one["id"])
            self.files[bare] = time.time() + _FILE_SECONDS
        base = self.url.removesuffix("/api")
        return one | {"media": media | {"url": f"{base}/api/files/default/{bare}.jpeg"}}

    async def file(self, request: web.Request) -> web.StreamResponse:
        bare = request.match_info["name"].partition(".")[0]
        if self.files.get(bare, 0.0) <= time.time():
            error = {"code": 404, "key": "FILE_NOT_FOUND", "message": "File not found"}
            return web.json_response({"error": error}, status=404)
        return web.Response(body=b"\xff\xd8\xff", content_type="image/jpeg")

    # sessions

    async def session(self, request: web.Request) -> web.StreamResponse:
        """GET shows a session; PUT replaces its whole config and restarts it."""
        name = request.match_info["session"]
        await asyncio.sleep(self.delay)
        if self.odd_answer:
            return self.odd_answer()
        if self.key and request.headers.get("X-Api-Key") != self.key:
            return _error(401, "Unauthorized")
        if name not in self.configs:
            if self.many_sessions or name == "default":
                return _error(404, "Session not found", "Not Found")
            said = "WAHA Core support only 'default' session. You tried to access '{}'"
            return _error(422, said.format(name), "Unprocessable Entity")
        if request.method == "PUT":
            body = await request.json()
            config = body.get("config")
            if faults := _config_faults(config):
                return _error(400, faults)
            self.configs[name] = _known_fields(config)
            if self._status(name) != "STOPPED":
                await asyncio.sleep(self.put_seconds)
                self._starting_until[name] = time.time() + self.put_seconds
                self.restarts.append(name)
            hooks = len((self.configs[name] or {}).get("webhooks", []))
            print(f"session {name} restarts with {hooks} webhook(s)")
        return web.json_response(self._shown(name))

    def _status(self, name: str) -> str:
        if self._starting_until.get(name, 0.0) > time.time():
            return "STARTING"
        return self.statuses.get(name, "WORKING")

    def _shown(self, name: str) -> dict[str, Any]:
        status = self._status(name)
        stopped = status == "STOPPED"
        return {
            "name": name,
            "status": status,
            "config": self.configs[name],
            "me": OWN if status == "WORKING" else None,
            "presence": None,
            "timestamps": {"activity": None if stopped else int(time.time() * 1000)},
            # GOWS of 2026.4.1 does not name itself.
            "engine": {} if stopped or self.engine == "GOWS" else {"engine": self.engine},
        }

    async def ping(self, _: web.Request) -> web.Response:
        return web.json_response({"message": "pong"})

    async def status(self, request: web.Request) -> web.StreamResponse:
        """Since when WAHA runs."""
        if self.odd_answer:
            return self.odd_answer()
        if self.key and request.headers.get("X-Api-Key") != self.key:
            return _error(401, "Unauthorized")
        if self.server_status != 200:
            return _error(self.server_status, "Forbidden")
        up = time.time() - self.started_at
        return web.json_response(
            {"startTimestamp": int(self.started_at * 1000), "uptime": int(up * 1000)}
        )

    async def _refusal(self, request: web.Request, session: str) -> web.StreamResponse | None:
        await asyncio.sleep(self.delay)
        if self.odd_answer:
            return self.odd_answer()
        if self.key and request.headers.get("X-Api-Key") != self.key:
            return _error(401, "Unauthorized")
        if session not in self.configs:
            await asyncio.sleep(min(self.retry_after, 5.0))
            error = {"error": f'Session "{session}" does not exist', "session": session}
            return web.json_response(error, status=422)
        if (status := self._status(session)) != "WORKING":
            await asyncio.sleep(self.retry_after)
            error = {
                "error": "Session status is not as expected. Try again later",
                "session": session,
                "status": status,
            }
            return web.json_response(error | {"expected": ["WORKING"]}, status=422)
        return None

    async def start(self, port: int = 0) -> web.AppRunner:
        """Listen on a free port, or this one; whoever starts it cleans the runner up."""
        app = web.Application()
        app.router.add_get("/api/server/status", self.status)
        app.router.add_get("/api/sessions/{session}", self.session)
        app.router.add_put("/api/sessions/{session}", self.session)
        app.router.add_get("/api/{session}/lids/{lid}", self.phone_of)
        app.router.add_get("/api/{session}/chats/{chat}/messages", self.all_messages)
        app.router.add_get("/api/{session}/chats/{chat}/messages/{id}", self.message)
        app.router.add_post("/api/sendText", self.send_text)
        app.router.add_get("/api/files/{session}/{name}", self.file)
        app.router.add_get("/ping", self.ping)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/api"
        return runner


def _seconds(message: dict[str, Any]) -> float:
    return float(message["timestamp"])


def _bare(message: dict[str, Any]) -> str:
    return str(message["id"]).split("_")[2]


def _faults(query: Mapping[str, str]) -> list[str]:
    """What the checks of the list's parameters say; sortOrder is not checked."""
    found = [
        f"{name} must be a number conforming to the specified constraints"
        for name in ("limit", "offset", "filter.timestamp.gte", "filter.timestamp.lte")
        if name in query and not re.fullmatch(r"-?\d+(\.\d+)?", query[name])
    ]
    if query.get("sortBy", "timestamp") not in ("timestamp", "messageTimestamp"):
        found.append("sortBy must be one of the following values: timestamp, messageTimestamp")
    found += [
        f"{name} must be a boolean value"
        for name in ("downloadMedia", "merge")
        if query.get(name, "true") not in _BOOLEANS
    ]
    if query.get("filter.ack", "READ") not in _ACKS:
        found.append(f"filter.ack must be one of the following values: {', '.join(sorted(_ACKS))}")
    return found


def _config_faults(config: Any) -> list[str]:
    if config is None:
        return []
    found = []
    for number, webhook in enumerate(config.get("webhooks") or []):
        where = f"config.webhooks.{number}"
        url = urlsplit(str(webhook.get("url")))
        if url.scheme not in ("http", "https") or "_" in (url.hostname or "_"):
            found.append(f"{where}.url must be a URL address")
        events = webhook.get("events")
        if not isinstance(events, list):
            found.append(f"{where}.events must be an array")
        elif unknown := [one for one in events if one not in EVENTS]:
            found.append(f"{where}.each value in events must be one of the following: {unknown}")
        retries = webhook.get("retries") or {}
        if retries.get("policy", "constant") not in _POLICIES:
            found.append(f"{where}.retries.policy must be one of the following values")
        found += [
            f"{where}.retries.{name} must be a number"
            for name in ("delaySeconds", "attempts")
            if not isinstance(retries.get(name, 1), int | float)
        ]
    for name, value in (config.get("metadata") or {}).items():
        if not isinstance(value, str):
            found.append(f"config.metadata.{name} must be a string")
    return found


_FIELDS = ("metadata", "proxy", "debug", "ignore", "client", "noweb", "gows", "webjs", "webhooks")
_WEBHOOK_FIELDS = ("url", "events", "hmac", "retries", "customHeaders")


def _known_fields(config: Any) -> dict[str, Any] | None:
    """WAHA drops in silence what it does not know."""
    if config is None:
        return None
    stored = {name: config[name] for name in _FIELDS if name in config}
    if "webhooks" in stored:
        stored["webhooks"] = [
            {name: one[name] for name in _WEBHOOK_FIELDS if name in one}
            for one in stored["webhooks"]
        ]
    return stored


def _error(status: int, message: str | list[str], error: str = "") -> web.Response:
    body = {"message": message, "statusCode": status}
    return web.json_response(body | ({"error": error} if error else {}), status=status)


def _crash(message: str, body: Any) -> web.Response:
    """As AllExceptionsFilter shows what was not foreseen, the request's own body included."""
    exception = {"message": message, "name": "TypeError", "stack": f"TypeError: {message}"}
    shown = {"statusCode": 500, "exception": exception, "request": {"body": body}}
    return web.json_response(shown, status=500)


async def _serve(port: int, stand_in: StandIn) -> None:
    await stand_in.start(port)
    print(f"a stand-in for WAHA: {stand_in.url}", flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def _port_reported(port: int) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        sys.exit(f"port {port}: {exc.strerror}: stop what listens there, or give --port")


def main() -> None:
    parser = argparse.ArgumentParser(description="a stand-in for WAHA")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--key", default="", help="X-Api-Key to ask for")
    parser.add_argument("--lid", action="append", default=[], help="158764321000007=971501234507")
    parser.add_argument("--engine", default="NOWEB", choices=["NOWEB", "GOWS", "WEBJS", "WPP"])
    parser.add_argument("--many-sessions", action="store_true", help="as from 2026.6.1 on")
    options = parser.parse_args()
    phones = dict(pair.split("=", 1) for pair in options.lid)
    stand_in = StandIn(
        options.key,
        options.engine,
        options.many_sessions,
        phones,
        can_report=options.engine in ("NOWEB", "GOWS"),
    )
    with contextlib.suppress(KeyboardInterrupt), _port_reported(options.port):
        asyncio.run(_serve(options.port, stand_in))


if __name__ == "__main__":
    main()
