"""examples/: what users copy takes what the router sends, and nothing else."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi.testclient import TestClient

from examples import backend as example
from gateway.delivery.backend import Backend, transport
from gateway.errors import BackendUnavailable
from tests.delivery.test_backend import OLDER, SECRET, delivery
from tests.e2e.router import ROOT
from tests.messages import webhook
from tests.programs import program

URL = "http://backend.test/api/webhook/waha"


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(example, "SECRETS", [SECRET])
    yield
    example.done.clear()


def router_with(*secrets: str, at: float | None = None) -> Backend:
    way = httpx.ASGITransport(example.app)
    now = time.time() if at is None else at
    return Backend(URL, timeout=5, secrets=secrets, transport=way, clock=lambda: now)


async def test_it_takes_what_the_router_signs_also_while_it_rotates() -> None:
    await router_with(SECRET).post(delivery(body=webhook("hello")))
    await router_with(OLDER, SECRET).post(delivery(body=webhook("hello"), idempotency_key="k2"))
    assert list(example.done) == ["0f" * 16, "k2"]


@pytest.mark.parametrize("secrets", [(), (OLDER,)])
async def test_it_takes_nothing_unsigned_or_signed_by_others(secrets: tuple[str, ...]) -> None:
    with pytest.raises(BackendUnavailable, match="401"):
        await router_with(*secrets).post(delivery(body=webhook("hello")))
    assert not example.done


async def test_it_takes_no_old_signature() -> None:
    with pytest.raises(BackendUnavailable, match="401"):
        await router_with(SECRET, at=time.time() - 400).post(delivery(body=webhook("hello")))


def test_it_takes_no_tenant_that_is_not_the_signed_one() -> None:
    import hashlib
    import hmac

    body, now = webhook("hello"), str(int(time.time()))
    signed = hmac.new(b"0123456789abcdef01234567", f"2_k.{now}.".encode() + body, hashlib.sha256)
    headers = {
        "webhook-id": "2_k",
        "webhook-timestamp": now,
        "webhook-signature": "v1," + base64.b64encode(signed.digest()).decode(),
        "Idempotency-Key": "k",
        "X-User-ID": "971501234567",
    }
    client = TestClient(example.app)
    path = "/api/webhook/waha"
    got = client.post(path, content=body, headers=headers | {"X-Tenant-ID": "3"})
    assert got.status_code == 401
    got = client.post(path, content=body, headers=headers | {"X-Tenant-ID": "2"})
    assert got.json() == {"status": "done"}
    got = client.post(path, content=body, headers=headers | {"X-Tenant-ID": "2"})
    assert got.json() == {"status": "already done"}


@pytest.fixture(scope="module")
def express(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of examples/express, installed and started as the documents tell."""
    folder = tmp_path_factory.mktemp("express")
    for name in ("server.js", "package.json"):
        shutil.copy(ROOT / "examples" / "express" / name, folder)
    npm = [program("npm"), "install", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(npm, cwd=folder, check=True, timeout=120)
    env = os.environ | {"PORT": "0", "BACKEND_SIGNING_SECRET": f"{OLDER},{SECRET}"}
    log = folder / "log"
    with log.open("wb") as out:
        node = subprocess.Popen([program("node"), "server.js"], cwd=folder, env=env, stdout=out)
    try:
        for _ in range(400):
            if found := re.search(r"listening on (\d+)", log.read_text("utf-8")):
                break
            time.sleep(0.025)
        assert found
        yield f"http://127.0.0.1:{found[1]}/api/webhook/waha"
    finally:
        node.terminate()
        node.wait(10)


async def test_express_takes_what_is_signed_once_and_nothing_else(express: str) -> None:
    one = delivery(body=webhook("سلام 👋"), idempotency_key="k1")
    forged = {
        "X-Tenant-ID": "3",
        "Idempotency-Key": "k2",
        "webhook-id": "2_k2",
        "webhook-timestamp": str(int(time.time())),
        "webhook-signature": "v1,AAAA",
    }
    async with transport(1) as way:

        async def post(*secrets: str, at: float) -> None:
            backend = Backend(express, timeout=5, secrets=secrets, transport=way, clock=lambda: at)
            await backend.post(one)

        now = time.time()
        await post(SECRET, at=now)
        await post(OLDER, SECRET, at=now)  # the same once more
        with pytest.raises(BackendUnavailable, match="401"):
            await post(at=now)
        with pytest.raises(BackendUnavailable, match="401"):
            await post(SECRET, at=now - 400)
    async with httpx.AsyncClient() as client:
        refused = await client.post(express, content=b"{}", headers=forged)
    assert refused.status_code == 401
    assert refused.json()["detail"] == "webhook-signature does not match"


def test_the_workflow_for_n8n_reads_what_the_router_sends() -> None:
    flow = json.loads((ROOT / "examples" / "n8n" / "workflow.json").read_text("utf-8"))
    nodes = {node["name"]: node for node in flow["nodes"]}
    hook = nodes["From the gateway"]["parameters"]
    assert (hook["httpMethod"], hook["path"], hook["responseMode"]) == (
        "POST",
        "waha",
        "responseNode",
    )
    read = json.dumps(nodes["Whose, who, what"])
    for header in ("x-tenant-id", "x-user-id", "idempotency-key"):
        assert f"$json.headers['{header}']" in read
    name, reached = "From the gateway", []
    while name in flow["connections"]:
        name = flow["connections"][name]["main"][0][0]["node"]
        reached.append(nodes[name]["type"])
    assert reached[-1] == "n8n-nodes-base.respondToWebhook", "it answers when the work is done"
