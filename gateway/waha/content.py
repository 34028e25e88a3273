"""What an event of a message holds: something that a person sent, or not (yet).

Engines raise `message` also for what nobody wrote: notices of WhatsApp (encryption, calls, pins),
and placeholders of messages that cannot be decrypted yet, whose content comes later under the same
id. `_data` distinguishes them, by WhatsApp Web's `type` (WEBJS, WPP) or by the name of the protobuf
field that is set (NOWEB `message`, GOWS `Message`).

Sources: WAHA docs "Receive messages", its engines' source at 2026.4.1, WhatsApp Web's MsgType as
whatsapp-web.js 1.34 lists it (src/util/Constants.js), WAProto of Baileys 7.
"""

from collections.abc import Iterator
from typing import Any

from gateway.domain.model import Content

Json = dict[str, Any]

# WhatsApp Web's types of what a person sends. `chat` is missing: its content is its text.
_SENT_TYPES = frozenset(
    [
        "audio",
        "buttons_response",
        "contact_card",
        "contact_card_multi",
        "document",
        "event_creation",
        "gif",
        "groups_v4_invite",
        "image",
        "interactive",
        "interactive_response",
        "list",
        "list_response",
        "live_location",
        "location",
        "multi_vcard",
        "native_flow",
        "order",
        "poll_creation",
        "product",
        "ptt",
        "ptv",
        "sticker",
        "sticker-pack",
        "template_button_reply",
        "vcard",
        "video",
    ]
)
# Of what WhatsApp itself puts into a chat: a text in it is WhatsApp's.
_NOTICE_TYPES = frozenset(
    [
        "biz_content_placeholder",
        "broadcast_notification",
        "call",
        "call_log",
        "debug",
        "debug_placeholder",
        "e2e_notification",
        "enc_comment",
        "enc_reaction",
        "gp2",
        "keep_in_chat",
        "newsletter_notification",
        "notification",
        "notification_template",
        "pin_message",
        "pinned_message",
        "pin_in_chat",
        "protocol",
        "revoked",
        "scheduled_call",
        "scheduled_call_creation",
        "scheduled_call_edit",
        "status_notification",
    ]
)
# Edits by which a text comes once more, under another id.
_EDIT_TYPES = frozenset(["message_edit", "edited"])
_WAITING_TYPES = frozenset(["chat", "cipher", "ciphertext", "unknown", "oversized"])
_PLACE_OR_CARD = frozenset(
    ["contact_card", "contact_card_multi", "live_location", "location", "multi_vcard", "vcard"]
)

# Fields of the protobuf message that a person's content is in.
_SENT_FIELDS = frozenset(
    [
        "audioMessage",
        "buttonsMessage",
        "buttonsResponseMessage",
        "contactMessage",
        "contactsArrayMessage",
        "conversation",
        "documentMessage",
        "eventMessage",
        "extendedTextMessage",
        "groupInviteMessage",
        "imageMessage",
        "interactiveMessage",
        "interactiveResponseMessage",
        "invoiceMessage",
        "listMessage",
        "listResponseMessage",
        "liveLocationMessage",
        "locationMessage",
        "orderMessage",
        "pollCreationMessage",
        "pollCreationMessageV2",
        "pollCreationMessageV3",
        "pollCreationMessageV4",
        "pollCreationMessageV5",
        "productMessage",
        "ptvMessage",
        "stickerMessage",
        "stickerPackMessage",
        "templateButtonReplyMessage",
        "videoMessage",
    ]
)
_EDIT_FIELDS = frozenset(["editedMessage", "protocolMessage", "secretEncryptedMessage"])
_NOTICE_FIELDS = _EDIT_FIELDS | frozenset(
    [
        "bcallMessage",
        "call",
        "callLogMesssage",  # so in WhatsApp's protobuf
        "callLogMessage",
        "encCommentMessage",
        "encEventResponseMessage",
        "encReactionMessage",
        "groupStatusMentionMessage",
        "initialSecurityNotificationSettingSync",
        "keepInChatMessage",
        "messageHistoryBundle",
        "messageHistoryNotice",
        "newsletterFollowerInviteMessage",
        "pinInChatMessage",
        "requestPhoneNumberMessage",
        "scheduledCallCreationMessage",
        "scheduledCallEditMessage",
        "statusMentionMessage",
        "statusNotificationMessage",
        "stickerSyncRmrMessage",
    ]
)
# They come along with content, or alone with the keys that decrypt later content.
_COMPANIONS = frozenset(
    [
        "fastRatchetKeySenderKeyDistributionMessage",
        "messageContextInfo",
        "placeholderMessage",
        "senderKeyDistributionMessage",
    ]
)
_DEEPEST = 6  # messages wrapped in one another: disappearing, once to be seen, with a caption …
_CIPHERTEXT_STUB = 2  # WAMessageStubType.CIPHERTEXT


def content_of(payload: Json) -> Content:
    """What the payload of a `message` or `message.any` holds."""
    data = _dict(payload.get("_data"))
    type_ = _type(data)
    if type_ in _NOTICE_TYPES:
        return Content.NOTICE
    if _has_content(payload) or type_ in _SENT_TYPES:
        return Content.SENT
    if stub := data.get("messageStubType"):
        return Content.PLACEHOLDER if stub in (_CIPHERTEXT_STUB, "CIPHERTEXT") else Content.NOTICE
    fields = _fields(data)
    if fields & _SENT_FIELDS:
        return Content.SENT
    if fields & _NOTICE_FIELDS or type_ in _EDIT_TYPES:
        return Content.NOTICE
    if not fields and (type_ in _WAITING_TYPES or type_ is None):
        return Content.PLACEHOLDER
    return Content.UNKNOWN


def text_of(payload: Json) -> str:
    """What the person wrote: text or caption, the only place where a deep link counts.

    On WEBJS and WPP the body of a place is its thumbnail, and on WPP that of a contact is the card.
    """
    text = payload.get("body")
    if not isinstance(text, str) or payload.get("location") or payload.get("vCards"):
        return ""
    type_ = _type(_dict(payload.get("_data")))
    return "" if type_ in _PLACE_OR_CARD or text.startswith("BEGIN:VCARD") else text


def is_edit(payload: Json) -> bool:
    """Whether the text was sent before, and is only put differently now."""
    if payload.get("editedMessageId"):
        return True
    data = _dict(payload.get("_data"))
    fields = _fields(data)
    if (
        data.get("IsEdit") is True
        or _dict(data.get("Info")).get("Edit")
        or "editedMessage" in fields
    ):
        return True  # GOWS, and what wraps the new text
    return _type(data) in _EDIT_TYPES or bool(fields & _EDIT_FIELDS and not fields & _SENT_FIELDS)


def _has_content(payload: Json) -> bool:
    body = payload.get("body")
    # Not strip(): what nobody sees is no text.
    if isinstance(body, str) and any(one.isprintable() and not one.isspace() for one in body):
        return True
    return payload.get("hasMedia") is True or any(
        isinstance(payload.get(name), dict | list) and not _is_empty(payload[name])
        for name in ("media", "location", "vCards")
    )


def _is_empty(value: Any) -> bool:
    """Nothing, or an object or list of nothing but that."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(one is None or one in ("", {}, []) for one in value)
    return value is None or value == ""


def _type(data: Json) -> str | None:
    """WhatsApp Web's name of the kind of message."""
    type_ = data.get("type")
    return type_ if isinstance(type_, str) else None


def _fields(data: Json) -> frozenset[str]:
    """The fields that are set in the protobuf message, through what it is wrapped in."""
    message = data.get("message")
    if not isinstance(message, dict):
        message = data.get("Message")
    return frozenset(_set_in(message, _DEEPEST)) - _COMPANIONS


def _set_in(message: Any, deeper: int) -> Iterator[str]:
    if not isinstance(message, dict):
        return
    for name, value in message.items():
        if _is_empty(value):
            continue
        inner = value.get("message") if isinstance(value, dict) else None
        if name in _EDIT_FIELDS or not isinstance(inner, dict):
            yield name
        elif deeper:
            yield from _set_in(inner, deeper - 1)


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
