"""examples/backend.py: what users copy takes what the router sends, and nothing else."""

import base64
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi.testclient import TestClient

from examples import backend as example
from gateway.backend import Backend
from gateway.errors import BackendUnavailable
from tests.messages import webhook
from tests.test_backend import OLDER, SECRET, delivery

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
