"""The agents' backend, reduced to what it must do with a routed message: copy from here.

    uvicorn examples.backend:app --port 8000

It trusts X-Tenant-ID only if the signature covers it, and takes a message once, however often it
comes. BACKEND_SIGNING_SECRET is the router's; empty means unsigned.
"""

import base64
import hashlib
import hmac
import json
import logging
import os
import time
from collections import OrderedDict

from fastapi import FastAPI, HTTPException, Request

SECRETS = [s for s in os.environ.get("BACKEND_SIGNING_SECRET", "").split(",") if s]
for _secret in SECRETS:
    if len(base64.b64decode(_secret.removeprefix("whsec_").encode("ascii", "ignore"))) < 24:
        raise SystemExit("BACKEND_SIGNING_SECRET: must be whsec_ and 24-64 bytes in base64")
OLDEST_SECONDS = 300  # a signature older than this is a replay
REMEMBERED = 100_000  # idempotency keys; a real backend keeps them in its database

logging.basicConfig(level="INFO", format="%(message)s")
log = logging.getLogger("backend")
app = FastAPI()
done: OrderedDict[str, None] = OrderedDict()
log.info("Signatures are %s", "checked" if SECRETS else "NOT checked: set BACKEND_SIGNING_SECRET")


@app.post("/api/webhook/waha")
async def webhook(request: Request) -> dict[str, str]:
    body = await request.body()
    tenant = int(request.headers["X-Tenant-ID"])
    if SECRETS:
        check_signature(request, body, tenant)

    key = request.headers["Idempotency-Key"]
    if key in done:
        return {"status": "already done"}
    message = json.loads(body)
    log.info("🔀 Routed message for Tenant %s", tenant)
    said = message["payload"].get("body") or message["event"]
    log.info("   %s: %s", request.headers["X-User-ID"], said)
    done[key] = None
    if len(done) > REMEMBERED:
        done.popitem(last=False)
    return {"status": "done"}


def check_signature(request: Request, body: bytes, tenant: int) -> None:
    """Standard Webhooks 1.0. The signed id begins with the tenant."""
    id_ = request.headers.get("webhook-id", "")
    sent = request.headers.get("webhook-timestamp", "")
    given = request.headers.get("webhook-signature", "").encode().split()
    if not sent.isdecimal() or abs(time.time() - int(sent)) > OLDEST_SECONDS:
        raise HTTPException(401, "not signed, or too old: webhook-timestamp is missing or not now")
    for secret in SECRETS:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        digest = hmac.new(key, f"{id_}.{sent}.".encode() + body, hashlib.sha256).digest()
        expected = b"v1," + base64.b64encode(digest)
        if any(hmac.compare_digest(expected, one) for one in given):
            break
    else:
        raise HTTPException(401, "webhook-signature does not match")
    if id_.partition("_")[0] != str(tenant):
        raise HTTPException(401, "X-Tenant-ID is not the signed one")
