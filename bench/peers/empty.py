"""The empty endpoint: FastAPI parses the body and answers; nothing is kept and nothing goes on.

PORT=9001 python bench/peers/empty.py
"""

import os

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI()


@app.post("/webhook/waha")
async def take(request: Request) -> dict[str, str]:
    body = await request.json()
    return {"status": "routed", "event": body["event"]}


if __name__ == "__main__":
    port = int(os.environ["PORT"])
    uvicorn.run(
        app, port=port, loop="uvloop", http="httptools", access_log=False, log_level="error"
    )
