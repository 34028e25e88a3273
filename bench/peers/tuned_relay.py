"""The tuned relay: what a plain relay becomes when its author reads profiles. A raw ASGI endpoint,
orjson, and a prepared httpx request handed straight to aiohttp's transport; no lock, no store, no
order, no log.

TARGET=http://127.0.0.1:9000/hook PORT=9001 python bench/peers/tuned_relay.py
"""

import os
from typing import Any

import aiohttp
import httpx
import httpx_aiohttp
import orjson
import uvicorn

TARGET = httpx.URL(os.environ["TARGET"])
OK = b'{"status":"routed"}'
HEAD = [(b"content-type", b"application/json"), (b"content-length", str(len(OK)).encode())]


class Relay:
    def __init__(self) -> None:
        self._transport = httpx_aiohttp.AiohttpTransport(client=self._session)

    @staticmethod
    def _session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=256, keepalive_timeout=4)
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        payload = orjson.loads(body)["payload"]
        request = httpx.Request(
            "POST",
            TARGET,
            headers=[
                (b"Content-Type", b"application/json"),
                (b"X-Tenant-ID", b"2"),
                (b"X-User-ID", payload["from"].encode()),
            ],
            stream=httpx.ByteStream(body),
        )
        request.read()
        response = await self._transport.handle_async_request(request)
        await response.aread()
        await response.aclose()
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": OK})


if __name__ == "__main__":
    uvicorn.run(
        Relay(),
        port=int(os.environ["PORT"]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        access_log=False,
        log_level="error",
    )
