"""The literal version: the mappings file read and rewritten for each message, a client made for
each forward. No order, no retry, and what is in flight at a crash is lost.

TARGET=http://127.0.0.1:9000/hook PORT=9001 DATA=/tmp/x python bench/peers/literal.py
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request

TARGET = os.environ["TARGET"]
MAPPINGS = Path(os.environ["DATA"]) / "router_mappings.json"

app = FastAPI()


@app.post("/webhook/waha")
async def route(request: Request) -> dict[str, Any]:
    body = await request.json()
    payload = body["payload"]
    user = payload["from"].partition("@")[0]
    mappings = json.loads(MAPPINGS.read_text()) if MAPPINGS.exists() else {}
    if link := re.match(r"start_realty_(\d+)", payload["body"]):
        mappings[user] = int(link[1])
        MAPPINGS.write_text(json.dumps(mappings, indent=2))
    if user not in mappings:
        return {"status": "unknown_user"}
    headers = {"X-Tenant-ID": str(mappings[user])}
    async with httpx.AsyncClient(timeout=120) as client:
        await client.post(TARGET, json=body, headers=headers)
    return {"status": "routed"}


if __name__ == "__main__":
    port = int(os.environ["PORT"])
    uvicorn.run(
        app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="error"
    )
