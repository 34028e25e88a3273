"""A webhook's body → InboundMessage. The only place that knows WAHA's JSON.

Source: WAHA docs "Events", "Receive messages", "Chat ids" of July 2026, and the engines' source at
2026.2.1 and 2026.4.1. Its traps, each with an example in tests/payloads:

- the person is in the message id ("{fromMe}_{chatId}_{bareId}[_{participant}]"), not in `from`,
  which is our own number in own messages on WEBJS and WPP;
- `body`, `to`, `participant`, `id`, `timestamp`, `me` may be null or absent, numbers fractional,
  ids objects;
- the same person comes by phone in one event and by LID in the next, and `_data`, where both may
  are, is no contract: it is read as optional, whatever its shape;
- NOWEB and GOWS write `@c.us` behind the digits of what they do not know (`…@hosted.lid`, `…@bot`):
  the raw data show what it was;
- a message comes before its content: see content.py.
"""

import functools
import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gateway.domain.model import (
    HASHED_SESSION,
    MESSAGE_EVENTS,
    SESSION_NAME,
    Chat,
    Content,
    DedupKey,
    InboundMessage,
    Moment,
    UnreadableReason,
    scoped,
)
from gateway.errors import BadBody
from gateway.waha import content

Json = dict[str, Any]

# A participant is known by its @: ids made by hand ("…_test_1") have underscores of their own.
# Each part ends where the next begins, or a long id of @ would take for ever.
_WAHA_ID = re.compile(r"(true|false)_([^_@]+@[^_@]+)_(.+?)(?:_[^_@]+@[^_@]+)?", re.DOTALL)
_LONGEST_ID = 128  # characters; a longer one is no person's
_PERSON = re.compile(r"([0-9]{5,20})(?::[0-9]+)?@(c\.us|s\.whatsapp\.net|hosted|lid|hosted\.lid)")
_LID_SERVERS = frozenset({"lid", "hosted.lid"})
_SESSION = re.compile(SESSION_NAME)
_STORABLE_ID = re.compile(r"[A-Za-z0-9_.:@=-]{1,128}")
_SUFFIXES = {
    "g.us": Chat.GROUP,
    "newsletter": Chat.NEWSLETTER,
    "broadcast": Chat.BROADCAST,
}
# Where the chat is named (WAHA docs "Events"): in a message's id, or in a field of its own.
_BY_MESSAGE_ID = ("message", "poll.vote", "event.response")
_BY_CHAT_ID = ("presence.update", "chat.archive", "call.", "label.chat.")
_OF_NOBODY = frozenset(
    ["session.status", "state.change", "engine.event", "label.upsert", "label.deleted"]
)
# WhatsApp's own numbers, its assistant, and bots, the last also as phones and under what NOWEB and
# GOWS make of `…@bot`.
_BOTS = frozenset(["867051314767696", "13135550002"])
_NOBODY = re.compile(
    r"[0-9]{1,4}(?::[0-9]+)?@(?:c\.us|s\.whatsapp\.net|hosted)|[^@]*@(?:bot|meta\.ai)"
)
# From here on a number means milliseconds: as seconds it would be the year 5138.
_MILLISECONDS_FROM = 1e11
_YEAR_2000, _YEAR_2100 = 946_684_800.0, 4_102_444_800.0


def encoded(envelope: Mapping[str, Any]) -> bytes:
    """envelope as the JSON that parse() reads."""
    try:
        return orjson.dumps(envelope)
    except TypeError:  # half an emoji
        return json.dumps(envelope).encode()


def parse(
    body: bytes,
    headers: Mapping[str, str],
    *,
    home_session: str,
    own_ids: frozenset[str],
    now: float,
    latest: float | None = None,
) -> InboundMessage:
    """What body says; raise BadBody when it is no WAHA event. Of doubled keys the last counts.

    headers: those of the request with lower-case names; X-Webhook-* and Content-Type go on to the
    backend. A body without `session` counts for home_session. own_ids: of the gateway's own
    numbers, for `me` is null at times. now: Unix seconds. latest: what was sent after it is from
    the future; now, where our clock is not known to be behind.
    """
    event, session, envelope = _envelope(body, home_session)
    payload = _dict(envelope.get("payload"))
    message_id = _message_id(event, payload)
    id_match = _WAHA_ID.fullmatch(message_id) if message_id else None
    bare_id = id_match[3] if id_match else message_id
    own = _is_own(payload, id_match)
    me = _dict(envelope.get("me"))
    shown = frozenset(one for name in ("id", "lid") if (one := person(me.get(name))))
    ours = own_ids if shown <= own_ids else own_ids | shown
    chat_id = _as_it_was(_chat_id(event, payload, id_match[2] if id_match else None, own), payload)
    chat, user = _chat(chat_id, ours)
    phone, lid = _both_ids(user, payload, own, ours) if user else (None, None)

    holds = content.content_of(payload) if event in MESSAGE_EVENTS else Content.SENT
    raised_at, sent_at = seconds(envelope.get("timestamp")), seconds(payload.get("timestamp"))
    latest = now if latest is None else max(now, latest)
    digest, twins = _dedup_key(event, session, own, bare_id, holds, envelope, headers)
    return InboundMessage(
        event=event,
        session=session,
        chat=chat,
        phone=scoped(session, phone, home_session) if phone else None,
        lid=scoped(session, lid, home_session) if lid else None,
        own=own,
        text=content.text_of(payload) if _may_bind(payload) else "",
        content=holds,
        sent=_sent(sent_at, raised_at, now, latest),
        sent_is_readable=sent_at is not None or payload.get("timestamp") is None,
        stamped_at=sent_at,
        event_time=now if raised_at is None else raised_at,
        arrived=now,
        dedup_key=DedupKey(digest[:16], twins) if digest else None,
        idempotency_key=digest.hex()[:32] if digest else secrets.token_hex(16),
        message_id=_storable(bare_id) if bare_id else None,
        session_status=status(payload.get("status")) if event == "session.status" else None,
        own_ids=shown,
        odd_part=_odd_part(event, envelope, chat_id, chat, sent_at),
        unreadable=_why_unreadable(event, chat_id, chat, own, holds),
        headers=_to_forward(headers),
        body=body,
    )


def _envelope(body: bytes, home_session: str) -> tuple[str, str, Json]:
    """The event's name, its session, and the whole."""
    envelope = _load(body)
    if not isinstance(envelope, dict):
        raise BadBody(f"the body is a JSON {_kind(envelope)}, WAHA sends an object")
    event = envelope.get("event")
    if not isinstance(event, str) or not event:
        raise BadBody(f'`event` must be a text such as "message", it is {_shown(event)}')
    return event, _session(envelope, home_session), envelope


def _to_forward(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, value)
        for name, value in headers.items()
        if (name == "content-type" or name.startswith("x-webhook-"))
        # What is not plain text could not be sent on, and would hold up the user for good.
        and value.isascii()
        and value.isprintable()
    )


def _is_own(payload: Json, id_match: re.Match[str] | None) -> bool:
    """Whether our own number sent it."""
    if payload.get("fromMe") in (True, "true") or bool(id_match and id_match[1] == "true"):
        return True
    data = _dict(payload.get("_data"))
    raw = _dict(data.get("key")).get("fromMe"), _dict(data.get("Info")).get("IsFromMe")
    return payload.get("fromMe") is None and True in raw


def _may_bind(payload: Json) -> bool:
    """Whether a link in it counts: it is new, and who sent it is said in a way that we know."""
    known = payload.get("fromMe") in (None, True, False, "true", "false")
    return known and not content.is_edit(payload)


def _session(envelope: Json, home_session: str) -> str:
    """The session's name as it is stored: its own, or a hash of what could not be used."""
    name = envelope.get("session")
    if name is None:
        return home_session
    if not isinstance(name, str) or not name:
        raise BadBody(f"`session` must be a text, it is {_shown(name)}")
    return name if _SESSION.fullmatch(name) else f"{HASHED_SESSION}{_digest(name).hex()[:32]}"


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
    if event == "message.revoked":
        return _id_in(_dict(payload.get("after"))) or _id_in(_dict(payload.get("before")))
    if event.startswith("poll.vote"):
        return _id_in(_dict(payload.get("vote")))
    found = _id_in(payload)
    if found is None and event in MESSAGE_EVENTS:
        data = _dict(payload.get("_data"))
        info = _dict(data.get("Info"))
        return (
            _composed(info.get("IsFromMe"), info.get("Chat"), info.get("ID"))
            or _id_in({"id": data.get("key")})
            or _id_in(data)
        )
    return found


def _has_waha_id(event: str, payload: Json) -> bool:
    """Whether the id is where WAHA's docs have it; we may find it elsewhere all the same."""
    found = _id_in(payload) if event in MESSAGE_EVENTS else _message_id(event, payload)
    return found is not None and _WAHA_ID.fullmatch(found) is not None


def id_of(payload: Json) -> str | None:
    """A message's id in WAHA's form, whatever the form in which the engine has it; None without."""
    return _message_id("message", payload)


def _id_in(holder: Json) -> str | None:
    """The id of a message, a text or an object by engine, in WAHA's form where it is whole.

    On WPP a revoked message is the key itself: {id, fromMe, remoteJid}.
    """
    found = holder.get("id")
    if isinstance(found, str) and found:
        return _composed(holder.get("fromMe"), holder.get("remoteJid"), found) or found
    key = _dict(found)
    if isinstance(whole := key.get("_serialized"), str) and whole:
        return whole
    chat = key.get("remote", key.get("remoteJid"))
    bare = key.get("id")
    return _composed(key.get("fromMe"), _dict(chat).get("_serialized", chat), bare) or (
        bare if isinstance(bare, str) and bare else None
    )


def _composed(own: Any, chat: Any, bare_id: Any) -> str | None:
    """WAHA's own form of an id, from its parts as engines have them."""
    if not (isinstance(chat, str) and "@" in chat and isinstance(bare_id, str) and bare_id):
        return None
    return f"{'true' if own is True else 'false'}_{chat}_{bare_id}"


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


def _as_it_was(chat_id: Any, payload: Json) -> Any:
    """chat_id, or the engine's own form of it where WAHA has written @c.us behind the digits."""
    if not isinstance(chat_id, str) or not chat_id.endswith("@c.us"):
        return chat_id
    data = _dict(payload.get("_data"))
    digits = _before_at(chat_id)
    for raw in (
        _dict(data.get("key")).get("remoteJid"),
        _dict(data.get("Info")).get("Chat"),
        data.get("Chat"),
        data.get("From"),
    ):
        if isinstance(raw, str) and "@" in raw and _before_at(raw) == digits:
            return raw
    return chat_id


def _before_at(chat_id: str) -> str:
    return chat_id.partition("@")[0].partition(":")[0]


def _chat(chat_id: Any, ours: frozenset[str]) -> tuple[Chat, str | None]:
    if not isinstance(chat_id, str):
        return Chat.NOBODY, None
    if user := person(chat_id):
        return (Chat.OWN_NUMBER, None) if user in ours else (Chat.PERSON, user)
    if chat_id == "status@broadcast":
        return Chat.STATUS, None
    return _SUFFIXES.get(chat_id.rpartition("@")[2], Chat.NOBODY), None


def person(chat_id: Any) -> str | None:
    """ "971501234567:3@s.whatsapp.net" → "971501234567"; "158764321000005@hosted.lid" →
    "158764321000005@lid". None for a group, a channel, a bot."""
    if not isinstance(chat_id, str) or len(chat_id) > _LONGEST_ID:
        return None
    return _person(chat_id)


@functools.lru_cache(maxsize=4096)  # each event names the gateway's own ids
def _person(chat_id: str) -> str | None:
    found = _PERSON.fullmatch(chat_id)
    if not found or found[1] in _BOTS:
        return None
    return f"{found[1]}@lid" if found[2] in _LID_SERVERS else found[1]


def _is_nobody(chat_id: Any) -> bool:
    """Whether it is known to be no person, such as WhatsApp itself or a bot."""
    if not isinstance(chat_id, str):
        return False
    return _NOBODY.fullmatch(chat_id) is not None or _before_at(chat_id) in _BOTS


def _both_ids(
    user: str, payload: Json, own: bool, ours: frozenset[str]
) -> tuple[str | None, str | None]:
    """Phone and LID of the person in the chat, as far as the event shows them."""
    phone, lid = (None, user) if user.endswith("@lid") else (user, None)
    other = next((one for one in _other_ids(user, payload, own) if one not in ours), None)
    if other is None:
        return phone, lid
    if other.endswith("@lid"):
        return phone, lid or other
    return phone or other, lid


def _other_ids(user: str, payload: Json, own: bool) -> Iterator[str]:
    """What the engine's raw data show beside user: LID or phone of the same person.

    Each is beside the id that it belongs to: that of somebody else says nothing of user.
    """
    data = _dict(payload.get("_data"))
    key, info = _dict(data.get("key")), _dict(data.get("Info"))
    pairs = [(key.get("remoteJid"), key.get("remoteJidAlt"))]  # NOWEB
    if own:
        pairs.append((info.get("Chat"), info.get("RecipientAlt")))  # GOWS
    else:
        pairs.append((key.get("remoteJid"), key.get("senderPn")))
        pairs.append((info.get("Sender"), info.get("SenderAlt")))
    # GOWS: an ack is the receipt, whose sender is who read it; a call names who began it.
    receipt = "RecipientAlt" if data.get("IsFromMe") is True else "SenderAlt"
    pairs.append((data.get("Chat"), data.get(receipt)))
    pairs.append((data.get("CallCreator"), data.get("CallCreatorAlt")))
    for beside, other in pairs:
        one, two = person(beside), person(other)
        if two and one in (user, None):
            yield two
        elif one and two == user:
            yield one


def text_of(body: bytes) -> str:
    """What the person wrote, for people to read: half an emoji is a question mark. Empty if there
    is nothing, or body is no WAHA event."""
    try:
        envelope = _load(body)
    except BadBody:
        return ""
    payload = _dict(envelope.get("payload")) if isinstance(envelope, dict) else {}
    return content.text_of(payload).encode("utf-8", "replace").decode()


def _sent(sent_at: float | None, raised_at: float | None, now: float, latest: float) -> Moment:
    """When the person sent it. Absent or later than latest counts as now."""
    second = int(now) if sent_at is None or sent_at > latest else int(sent_at)
    return Moment(second, now if raised_at is None or raised_at > latest else raised_at)


def status(value: Any) -> str | None:
    """A session's status; None if value is none."""
    return value if isinstance(value, str) and re.fullmatch("[A-Z_]{1,40}", value) else None


def _odd_part(
    event: str,
    envelope: Json,
    chat_id: Any,
    chat: Chat,
    sent_at: float | None,
) -> str | None:
    """The first part of a WAHA event that is not as WAHA's docs have it.

    A body typed for curl is none of WAHA's: that names its engine, GOWS 2026.4 in `environment`
    only. Events without a person of their own are looked at only where we read something in them.
    """
    if "engine" not in envelope and "engine" not in _dict(envelope.get("environment")):
        return None
    payload = envelope.get("payload")
    if not isinstance(payload, dict):
        return "payload"
    if event == "session.status":
        return None if status(payload.get("status")) else "status"
    if event.startswith(_BY_MESSAGE_ID) and not _has_waha_id(event, payload):
        return "id"
    if event.startswith((*_BY_MESSAGE_ID, *_BY_CHAT_ID)) and chat is Chat.NOBODY:
        return None if _is_nobody(chat_id) else "chat"
    if event in MESSAGE_EVENTS:
        if not isinstance(payload.get("fromMe"), bool):
            return "fromMe"
        if not isinstance(payload.get("body"), str | None):
            return "body"
        if sent_at is None:
            return "timestamp"
    return None


def _why_unreadable(
    event: str, chat_id: Any, chat: Chat, own: bool, holds: Content
) -> UnreadableReason | None:
    if own or event not in MESSAGE_EVENTS:
        return None
    if chat is Chat.NOBODY and not _is_nobody(chat_id):
        return UnreadableReason.NO_CHAT
    if chat is Chat.PERSON and holds is Content.PLACEHOLDER:
        return UnreadableReason.NOT_DECRYPTED
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


def _dedup_key(
    event: str,
    session: str,
    own: bool,
    bare_id: str | None,
    holds: Content,
    envelope: Json,
    headers: Mapping[str, str],
) -> tuple[bytes | None, bool]:
    """SHA-256 of what distinguishes this event from others, and whether it may come as twins.

    WAHA gives `message` and `message.any` of one message the same or different envelope ids,
    depending on engine and version; WhatsApp's own bare id is the same in both, at every retry,
    and after a restart. A message of an unknown kind may yet come as one that can be read.
    """
    if event in MESSAGE_EVENTS and bare_id:
        name = f"{holds.value} message" if holds is Content.UNKNOWN else "message"
        return _digest(name, session, "true" if own else "false", bare_id), True
    envelope_id = envelope.get("id")
    if isinstance(envelope_id, str) and envelope_id:
        name = "message" if event in MESSAGE_EVENTS else event
        return _digest("event", session, name, envelope_id), False
    if request_id := headers.get("x-webhook-request-id"):
        return _digest("request", session, event, request_id), False
    return None, False


def _digest(*texts: str) -> bytes:
    # surrogatepass: an id may hold a lone surrogate, and must not crash us.
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


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
