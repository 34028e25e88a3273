"""What Redis answers, as the types of domain/model.py."""

from typing import Any

import orjson

from gateway.domain.model import (
    DeadLetter,
    Delivery,
    StoredMessage,
    TenantId,
    Unreadable,
    UnreadableReason,
    UserId,
)

DEAD_LETTER = ("tenant", "user", "message_id", "key", "arrived", "died_at", "attempts", "reason",
               "status", "answer", "body")  # fmt: skip
UNREADABLE = ("arrived", "session", "event", "reason", "user", "message_id", "body")


def user(text: bytes) -> UserId:
    return UserId(text.decode())


def pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def delivery(row: list[bytes]) -> Delivery:
    """row: as take() in lua/queues.lua has it."""
    (id_, tenant, user, alias, key, headers, body, attempts, poison_attempts, tried_at, age,
     event_time) = row  # fmt: skip
    return Delivery(
        id=int(id_),
        tenant=TenantId(int(tenant)),
        user=UserId(user.decode()),
        alias=UserId(alias.decode()) if alias else None,
        idempotency_key=key.decode(),
        headers=tuple((name, value) for name, value in orjson.loads(headers)),
        body=body,
        attempt=int(attempts) + 1,
        poison_attempts=int(poison_attempts),
        tried_at=float(tried_at) if tried_at else None,
        age=float(age),
        event_time=float(event_time),
    )


def dead_letter(id_: bytes, row: list[bytes], *, with_body: bool) -> DeadLetter:
    """row: the fields of DEAD_LETTER."""
    tenant, user, message_id, key, arrived, died_at, attempts, reason, status, answer, body = row
    return DeadLetter(
        id=int(id_),
        tenant=TenantId(int(tenant)),
        user=UserId(user.decode()),
        message_id=message_id.decode() or None,
        idempotency_key=key.decode(),
        arrived=float(arrived),
        died_at=float(died_at),
        attempts=int(attempts),
        reason=reason.decode(),
        status=int(status) if status else None,
        answer=answer,
        body=body if with_body else None,
    )


def stored_message(
    where: str, tenant: bytes, arrived: bytes, message_id: bytes, body: bytes
) -> StoredMessage:
    of = TenantId(int(tenant)) if tenant else None
    return StoredMessage(where, of, float(arrived), message_id.decode() or None, body)


def unreadable(id_: int, row: list[bytes]) -> Unreadable:
    """row: the fields of UNREADABLE."""
    arrived, session, event, reason, user, message_id, body = row
    return Unreadable(
        id_,
        float(arrived),
        session.decode(),
        event.decode(),
        UnreadableReason(reason.decode()),
        UserId(user.decode()) if user else None,
        message_id.decode() or None,
        body,
    )
