"""Webhook bodies for tests, and messages as the store gets them."""

import itertools
import json
from pathlib import Path
from typing import Any

from gateway.domain.model import (
    Decide,
    Decision,
    InboundMessage,
    Lock,
    LockPolicy,
    TenantId,
    UserId,
)
from gateway.domain.routing import decide
from gateway.waha import events

PAYLOADS = Path(__file__).parent / "payloads"
NOW = 1_782_900_000.0  # 1 July 2026, after all example bodies
ALI, SARA, OMAR = "971501234567", "971501234568", "971501234569"
LID = "158764321000005@lid"
_numbers = itertools.count(1)


def example(number: int) -> bytes:
    """Example body `number` as WAHA sends it: compact."""
    (path,) = PAYLOADS.glob(f"{number:02}-*.json")
    text = json.dumps(
        json.loads(path.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")
    )
    return text.encode()


def webhook(
    text: str | None = "hello",
    user: str = ALI,
    *,
    bare_id: str | None = None,
    event: str = "message",
    own: bool = False,
    sent: float | None = None,
    raised: float | None = None,
    other_id: str | None = None,
    session: str = "default",
    **payload: Any,
) -> bytes:
    """A body in WAHA's form. sent and raised: Unix seconds, NOW if not given."""
    chat = user if "@" in user else f"{user}@c.us"
    number = next(_numbers)
    bare_id = bare_id or f"3EB0{number:016X}"
    raised = (NOW if sent is None else sent) if raised is None else raised
    data: dict[str, Any] = {"key": {"remoteJid": chat, "fromMe": own, "id": bare_id}}
    if other_id:
        data["key"]["remoteJidAlt"] = other_id if "@" in other_id else f"{other_id}@s.whatsapp.net"
    envelope = {
        "id": f"evt_{number:026d}",
        "timestamp": int(raised * 1000),
        "event": event,
        "session": session,
        "me": {"id": "971501230000@c.us", "lid": "230000000000001@lid"},
        "payload": {
            "id": f"{str(own).lower()}_{chat}_{bare_id}",
            "timestamp": int(NOW if sent is None else sent),
            "from": chat,
            "fromMe": own,
            "body": text,
            "_data": data,
            **payload,
        },
        "engine": "NOWEB",
    }
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()


def parse(
    body: bytes,
    *,
    now: float = NOW,
    latest: float | None = None,
    own_ids: frozenset[str] = frozenset(),
    **headers: str,
) -> InboundMessage:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return events.parse(
        body,
        named,
        home_session="default",
        own_ids=own_ids | {"971557357753"},
        now=now,
        latest=latest,
    )


def message(
    text: str | None = "hello",
    user: str = ALI,
    *,
    now: float = NOW,
    latest: float | None = None,
    **how: Any,
) -> InboundMessage:
    """What webhook() with the same arguments is parsed to."""
    return parse(webhook(text, user, **how), now=now, latest=latest)


def by_the_rules(
    inbound: InboundMessage,
    policy: LockPolicy = LockPolicy.LAST_LINK,
    *,
    may_help: bool = False,
) -> Decide:
    """decide as the gateway hands it to the store."""

    def of_lock(lock: Lock) -> Decision:
        return decide(inbound, lock, policy=policy, prefix="start_realty", may_help=may_help)

    return of_lock


def tenant(number: int) -> TenantId:
    return TenantId(number)


def user(text: str) -> UserId:
    return UserId(text)
