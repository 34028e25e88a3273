"""The plain relay: FastAPI and httpx on aiohttp's transport; no lock, no store, no order.

TARGET=http://127.0.0.1:9000/hook PORT=9001 python bench/peers/plain_relay.py
"""

import contextlib
import os
from collections.abc import AsyncIterator

import httpx
import httpx_aiohttp
import uvicorn
from fastapi import FastAPI, Request

TARGET = os.environ["TARGET"]


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=256, keepalive_expiry=4)
    transport = httpx_aiohttp.AiohttpTransport(limits=limits)
    async with httpx.AsyncClient(transport=transport, timeout=120) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/webhook/waha")
async def relay(request: Request) -> dict[str, str]:
    body = await request.body()
    payload = (await request.json())["payload"]
    headers = {"Content-Type": "application/json", "X-Tenant-ID": "2", "X-User-ID": payload["from"]}
    await app.state.client.post(TARGET, content=body, headers=headers)
    return {"status": "routed"}


if __name__ == "__main__":
    port = int(os.environ["PORT"])
    uvicorn.run(
        app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="error"
    )
