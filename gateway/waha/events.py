"""A webhook's body → InboundMessage. The only place that knows WAHA's JSON.

Source: WAHA docs "Events", "Receive messages", "Chat ids" of July 2026, and the engines' source at
2026.2.1. Its traps, each with an example in tests/payloads:

- the person is in the message id ("{fromMe}_{chatId}_{bareId}[_{participant}]"), not in `from`,
  which is our own number in own messages on WEBJS;
- `body`, `to`, `participant`, `id`, `timestamp`, `me` may be null or absent, numbers fractional;
- the same person comes by phone in one event and by LID in the next, and `_data`, where both may
  stand, is no contract: it is read as optional, whatever its shape.
"""

import functools
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import BadBody
from gateway.model import (
    MESSAGE_EVENTS,
    SESSION_NAME,
    Chat,
    InboundMessage,
    Moment,
    SeenKey,
    scoped,
)

Json = dict[str, Any]

# A participant is told by its @: ids made by hand ("…_test_1") have underscores of their own.
# Each part ends where the next begins, or a long id of @ would take for ever.
_WAHA_ID = re.compile(r"(true|false)_([^_@]+@[^_@]+)_(.+?)(?:_[^_@]+@[^_@]+)?", re.DOTALL)
_PERSON = re.compile(r"([0-9]{5,20})(?::[0-9]+)?@(c\.us|s\.whatsapp\.net|lid)")
_SESSION = re.compile(SESSION_NAME)
_STORABLE_ID = re.compile(r"[A-Za-z0-9_.:@=-]{1,128}")
_SUFFIXES = {
    "g.us": Chat.GROUP,
    "newsletter": Chat.NEWSLETTER,
    "broadcast": Chat.BROADCAST,
}
# Where the chat stands (WAHA docs "Events"): in a message's id, or in a field of its own.
_BY_MESSAGE_ID = ("message", "poll.vote", "event.response")
_BY_CHAT_ID = ("presence.update", "chat.archive", "call.", "label.chat.")
_OF_NOBODY = frozenset(
    ["session.status", "state.change", "engine.event", "label.upsert", "label.deleted"]
)
_NOBODY = re.compile(r"[0-9]{1,4}@c\.us|[^@]*@meta\.ai")  # WhatsApp itself, and its assistant
# From here on a number means milliseconds: as seconds it would be the year 5138.
_MILLISECONDS_FROM = 1e11
_YEAR_2000, _YEAR_2100 = 946_684_800.0, 4_102_444_800.0


def parse(
    body: bytes,
    headers: Mapping[str, str],
    *,
    home_session: str,
    gateway_phone: str,
    now: float,
    own_ids: frozenset[str] = frozenset(),
) -> InboundMessage:
    """What body says; raise BadBody when it is no WAHA event. Of doubled keys the last counts.

    headers: those of the request with lower-case names; X-Webhook-* and Content-Type go on to the
    backend. A body without `session` counts for home_session. now: Unix seconds. own_ids: of
    the gateway's own numbers as earlier events named them, for `me` is null at times.
    """
    envelope = _load(body)
    if not isinstance(envelope, dict):
        raise BadBody(f"the body is a JSON {_kind(envelope)}, WAHA sends an object")
    event = envelope.get("event")
    if not isinstance(event, str) or not event:
        raise BadBody(f'`event` must be a text such as "message", it is {_shown(event)}')
    session = envelope.get("session")
    if session is None:
        session = home_session
    if not isinstance(session, str) or not _SESSION.fullmatch(session):
        raise BadBody(f"`session` must be 1-64 of A-Z a-z 0-9 _ -, it is {_shown(session)}")

    payload = _dict(envelope.get("payload"))
    message_id = _message_id(event, payload)
    parts = _WAHA_ID.fullmatch(message_id) if message_id else None
    own = payload.get("fromMe") is True or bool(parts and parts[1] == "true")
    chat_id = _chat_id(event, payload, parts[2] if parts else None, own)
    me = _dict(envelope.get("me"))
    shown = frozenset(one for name in ("id", "lid") if (one := person(me.get(name))))
    ours = {*own_ids, *shown, gateway_phone}
    chat, user = _chat(chat_id, ours)

    phone, lid = (None, user) if user and user.endswith("@lid") else (user, None)
    if user and (other := _other_id(payload, own)) and other not in ours:
        if other.endswith("@lid"):
            lid = lid or other
        else:
            phone = phone or other

    raised_at = seconds(envelope.get("timestamp"))
    sent_at = seconds(payload.get("timestamp"))
    bare_id = parts[3] if parts else message_id
    digest, twins = _seen_key(event, session, own, bare_id, envelope, headers)
    return InboundMessage(
        event=event,
        session=session,
        chat=chat,
        phone=scoped(session, phone, home_session) if phone else None,
        lid=scoped(session, lid, home_session) if lid else None,
        own=own,
        text=_text(payload),
        sent=_sent(sent_at, raised_at, now),
        event_time=now if raised_at is None else raised_at,
        arrived=now,
        seen_key=SeenKey(digest[:16], twins) if digest else None,
        idempotency_key=digest.hex()[:32] if digest else secrets.token_hex(16),
        message_id=_storable(bare_id) if bare_id else None,
        session_status=status(payload.get("status")) if event == "session.status" else None,
        own_ids=shown,
        odd_part=_odd_part(event, envelope, parts is not None, chat_id, chat, sent_at),
        headers=tuple(
            (name, value)
            for name, value in headers.items()
            if (name == "content-type" or name.startswith("x-webhook-"))
            # What is not plain text could not be sent on, and would hold up the user for good.
            and value.isascii()
            and value.isprintable()
        ),
        body=body,
    )


def _load(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses a lone surrogate ("\ud83d" without its other half), which WAHA can send when a
    # text was cut inside an emoji, and which must be routed all the same; and a byte order mark.
    try:
        # Not json.loads(body), which would take UTF-16 too: RFC 8259 knows UTF-8 only.
        text = body.decode("utf-8-sig", "surrogatepass")
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise BadBody(f"the body is not JSON: {str(exc)[:100]!a}") from exc


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _message_id(event: str, payload: Json) -> str | None:
    """The id that names the chat, and the message if it is one."""
    holder = payload
    if event == "message.revoked":
        holder = _dict(payload.get("after"))
        if not isinstance(holder.get("id"), str):
            holder = _dict(payload.get("before"))
    elif event.startswith("poll.vote"):
        holder = _dict(payload.get("vote"))
    found = holder.get("id")
    return found if isinstance(found, str) and found else None


def _chat_id(event: str, payload: Json, in_message_id: str | None, own: bool) -> Any:
    if event in _OF_NOBODY:
        return None
    if event in ("presence.update", "chat.archive"):
        return payload.get("id")
    if event.startswith("call."):
        return "@g.us" if payload.get("isGroup") else payload.get("from")
    if event.startswith("label.chat."):
        return payload.get("chatId")
    if event.startswith("group."):
        return "@g.us"
    if in_message_id is None and event.startswith("message"):
        # Not an id of WAHA's making: somebody tries us out with curl.
        return payload.get("to") if own and payload.get("to") else payload.get("from")
    return in_message_id


def _chat(chat_id: Any, ours: set[str]) -> tuple[Chat, str | None]:
    if not isinstance(chat_id, str):
        return Chat.NOBODY, None
    if user := person(chat_id):
        return (Chat.OWN_NUMBER, None) if user in ours else (Chat.PERSON, user)
    if chat_id == "status@broadcast":
        return Chat.STATUS, None
    return _SUFFIXES.get(chat_id.rpartition("@")[2], Chat.NOBODY), None


def person(chat_id: Any) -> str | None:
    """ "971501234567:3@s.whatsapp.net" → "971501234567"; "158764321000005@lid" stays as it is."""
    return _person(chat_id) if isinstance(chat_id, str) else None


@functools.lru_cache(maxsize=4096)  # each event names the gateway's own ids
def _person(chat_id: str) -> str | None:
    if not (found := _PERSON.fullmatch(chat_id)):
        return None
    return f"{found[1]}@lid" if found[2] == "lid" else found[1]


def _other_id(payload: Json, own: bool) -> str | None:
    """The person's other id, LID or phone, if the engine's raw data show one."""
    data = _dict(payload.get("_data"))
    key, info = _dict(data.get("key")), _dict(data.get("Info"))
    candidates = [key.get("remoteJidAlt")]
    candidates += (
        [info.get("RecipientAlt")] if own else [key.get("senderPn"), info.get("SenderAlt")]
    )
    return next((found for one in candidates if (found := person(one))), None)


def text_of(body: bytes) -> str:
    """What the person wrote, for people to read: half an emoji is a question mark. Empty if there
    is nothing, or body is no WAHA event."""
    try:
        envelope = _load(body)
    except BadBody:
        return ""
    payload = _dict(envelope.get("payload")) if isinstance(envelope, dict) else {}
    return _text(payload).encode("utf-8", "replace").decode()


def _text(payload: Json) -> str:
    """What the person wrote: text or caption. On WEBJS the body of a location is its thumbnail."""
    if payload.get("location") or payload.get("vCards"):
        return ""
    text = payload.get("body")
    return text if isinstance(text, str) else ""


def _sent(sent_at: float | None, raised_at: float | None, now: float) -> Moment:
    """When the person sent it. Absent or in the future counts as now."""
    second = int(now) if sent_at is None or sent_at > now else int(sent_at)
    return Moment(second, now if raised_at is None or raised_at > now else raised_at)


def status(value: Any) -> str | None:
    """A session's status; None if value is none."""
    return value if isinstance(value, str) and re.fullmatch("[A-Z_]{1,40}", value) else None


def _odd_part(
    event: str,
    envelope: Json,
    has_waha_id: bool,
    chat_id: Any,
    chat: Chat,
    sent_at: float | None,
) -> str | None:
    """The first part of a WAHA event that is not as WAHA's docs have it.

    A body typed for curl is none of WAHA's: that names its engine. Events without a person of
    their own are looked at only where we read something in them.
    """
    if "engine" not in envelope:
        return None
    payload = envelope.get("payload")
    if not isinstance(payload, dict):
        return "payload"
    if event == "session.status":
        return None if status(payload.get("status")) else "status"
    if event.startswith(_BY_MESSAGE_ID) and not has_waha_id:
        return "id"
    if event.startswith((*_BY_MESSAGE_ID, *_BY_CHAT_ID)) and chat is Chat.NOBODY:
        nobody = isinstance(chat_id, str) and _NOBODY.fullmatch(chat_id)
        return None if nobody else "chat"
    if event in MESSAGE_EVENTS:
        if not isinstance(payload.get("fromMe"), bool):
            return "fromMe"
        if not isinstance(payload.get("body"), str | None):
            return "body"
        if sent_at is None:
            return "timestamp"
    return None


def seconds(value: Any) -> float | None:
    """A Unix time in seconds or milliseconds → seconds; None unless within 2000-2100."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        time = float(value)
    except OverflowError:
        return None
    if not math.isfinite(time):
        return None
    if time >= _MILLISECONDS_FROM:
        time /= 1000
    return time if _YEAR_2000 <= time <= _YEAR_2100 else None


def _seen_key(
    event: str,
    session: str,
    own: bool,
    bare_id: str | None,
    envelope: Json,
    headers: Mapping[str, str],
) -> tuple[bytes | None, bool]:
    """SHA-256 of what tells this event from others, and whether it may come as twins.

    WAHA gives `message` and `message.any` of one message the same or different envelope ids,
    depending on engine and version; WhatsApp's own bare id is the same in both, at every retry,
    and after a restart.
    """
    if event in MESSAGE_EVENTS and bare_id:
        return _digest("message", session, "true" if own else "false", bare_id), True
    envelope_id = envelope.get("id")
    if isinstance(envelope_id, str) and envelope_id:
        return _digest("event", session, event, envelope_id), False
    if request_id := headers.get("x-webhook-request-id"):
        return _digest("request", session, event, request_id), False
    return None, False


def _digest(*parts: str) -> bytes:
    # surrogatepass: an id may hold a lone surrogate, and must not crash us.
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


def _storable(value: str) -> str:
    return value if _STORABLE_ID.fullmatch(value) else _digest(value).hex()


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    # No str() of what may be nested a thousand deep.
    return f"{value[:60]!a}" if isinstance(value, str) else f"a JSON {_kind(value)}"
