"""A second source of webhooks: another product with another form, routed by the same rules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.domain.model import InboundMessage
from gateway.inbound import sources
from gateway.waha import events
from tests.clients import client_of
from tests.messages import ALI, NOW


def parse_other(body: bytes, headers: Mapping[str, str], **how: Any) -> InboundMessage:
    found = json.loads(body)
    payload = {"id": found["key"], "from": f"{found['number']}@c.us", "body": found["said"]}
    envelope = {"event": "message", "payload": payload | {"timestamp": NOW}}
    return events.parse(json.dumps(envelope).encode(), headers, **how)


def test_another_source_is_routed_like_waha(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, "/webhook/other", parse_other)
    monkeypatch.setattr(sources, "PATHS", sources.PATHS | {"/webhook/other", "/webhook/other/"})
    with client_of(tmp_path) as client:
        for path, said, action in (
            ("/webhook/other", "start_realty_2", "new_session_locked"),
            ("/webhook/other/", "hello", "existing_session"),
        ):
            body = {"key": f"K{said}", "number": ALI, "said": said}
            answer = client.post(path, json=body).json()
            assert (answer["action"], answer["tenant_id"]) == (action, 2)
        assert client.post("/webhook/nobody", json={}).status_code == 404
