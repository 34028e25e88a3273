"""What an event of a message holds, by engine: what a person sent, a notice, a placeholder."""

from typing import Any

import pytest

from gateway.domain.model import Content
from gateway.domain.routing import reason_to_ignore
from gateway.waha import content
from tests.messages import ALI, example, parse, webhook

NOTHING: list[dict[str, Any]] = [
    {"body": None},
    {"body": ""},
    {"body": " \n"},
    {"body": "\u200b\x00"},
    {},
]


def web(type_: str, **more: Any) -> dict[str, Any]:
    """The raw data of WEBJS and WPP."""
    return {"_data": {"type": type_, **more}}


def noweb(message: Any, **more: Any) -> dict[str, Any]:
    return {"_data": {"key": {}, "message": message, **more}}


def gows(message: Any) -> dict[str, Any]:
    return {"_data": {"Info": {}, "Message": message}}


@pytest.mark.parametrize("body", NOTHING)
@pytest.mark.parametrize(
    ("payload", "holds"),
    [
        ({}, Content.PLACEHOLDER),
        ({"_data": None}, Content.PLACEHOLDER),
        (web("ciphertext"), Content.PLACEHOLDER),
        (web("chat"), Content.PLACEHOLDER),
        (noweb(None, messageStubType=2), Content.PLACEHOLDER),
        (noweb(None, messageStubType="CIPHERTEXT"), Content.PLACEHOLDER),
        (noweb(None, key={"isViewOnce": True}), Content.PLACEHOLDER),
        (noweb({"messageContextInfo": {"deviceListMetadata": {"senderKeyHash": "x"}}}),
         Content.PLACEHOLDER),
        (gows(None), Content.PLACEHOLDER),
        (noweb({"extendedTextMessage": {"text": ""}}), Content.PLACEHOLDER),
        ({"media": {"url": None}}, Content.PLACEHOLDER),
        (gows({"senderKeyDistributionMessage": {"groupID": "x"}}), Content.PLACEHOLDER),
        (web("e2e_notification"), Content.NOTICE),
        (web("notification_template"), Content.NOTICE),
        (web("call_log"), Content.NOTICE),
        (web("protocol"), Content.NOTICE),
        (web("revoked"), Content.NOTICE),
        (web("pinned_message"), Content.NOTICE),
        (web("gp2"), Content.NOTICE),
        (noweb(None, messageStubType=40), Content.NOTICE),
        (noweb({"protocolMessage": {"type": "EPHEMERAL_SETTING"}}), Content.NOTICE),
        (noweb({"secretEncryptedMessage": {"encPayload": "x"}}), Content.NOTICE),
        (noweb({"editedMessage": {"message": {"protocolMessage": {"type": 14}}}}), Content.NOTICE),
        (noweb({"pinInChatMessage": {"type": 1}}), Content.NOTICE),
        (noweb({"keepInChatMessage": {"keepType": 1}}), Content.NOTICE),
        (noweb({"callLogMesssage": {"isVideo": True}}), Content.NOTICE),
        (gows({"call": {"callKey": "x"}}), Content.NOTICE),
        (gows({"encReactionMessage": {"encPayload": "x"}}), Content.NOTICE),
        (gows({"ephemeralMessage": {"message": {"pinInChatMessage": {"type": 1}}}}),
         Content.NOTICE),
        (web("something_new"), Content.UNKNOWN),
        (noweb({"reactionMessage": {"text": "x"}}), Content.UNKNOWN),
        (gows({"somethingNewMessage": {"x": 1}}), Content.UNKNOWN),
        (noweb({"templateMessage": {"hydratedTemplate": {"x": 1}}}), Content.UNKNOWN),
        (web("sticker"), Content.SENT),
        (web("vcard"), Content.SENT),
        (web("location"), Content.SENT),
        (web("poll_creation"), Content.SENT),
        (noweb({"stickerMessage": {"url": "x"}}), Content.SENT),
        (noweb({"contactMessage": {"vcard": "x"}, "messageContextInfo": {"x": 1}}), Content.SENT),
        (noweb({"viewOnceMessageV2": {"message": {"imageMessage": {"url": "x"}}}}), Content.SENT),
        (gows({"ephemeralMessage": {"message": {"locationMessage": {"x": 1}}}}), Content.SENT),
        ({"hasMedia": True}, Content.SENT),
        ({"media": {"mimetype": "image/webp", "url": None}}, Content.SENT),
        ({"location": {"latitude": "25.2"}}, Content.SENT),
        ({"vCards": ["BEGIN:VCARD"]}, Content.SENT),
    ],
)  # fmt: skip
def test_without_a_text_the_raw_data_report(
    payload: dict[str, Any], body: dict[str, Any], holds: Content
) -> None:
    assert content.content_of(payload | body) is holds


@pytest.mark.parametrize(
    ("payload", "holds"),
    [
        ({}, Content.SENT),
        (web("chat"), Content.SENT),
        (web("ciphertext"), Content.SENT),  # it is decrypted, whatever the type says
        (web("something_new"), Content.SENT),
        (noweb({"protocolMessage": {"type": 14}}), Content.SENT),
        (web("e2e_notification"), Content.NOTICE),
        (web("notification_template"), Content.NOTICE),
    ],
)
def test_a_text_is_a_persons_unless_whatsapp_wrote_it(
    payload: dict[str, Any], holds: Content
) -> None:
    assert content.content_of(payload | {"body": "hello"}) is holds


@pytest.mark.parametrize(
    "payload",
    [
        web("vcard"),
        web("multi_vcard"),
        web("location"),
        web("message_edit"),
        noweb({"protocolMessage": {"type": 14}}),
        noweb({"editedMessage": {"message": {"conversation": "x"}}}),
        {"vCards": ["BEGIN:VCARD"]},
        {"editedMessageId": "3EB0"},
        {"_data": {"Info": {"Edit": "1"}, "Message": {"conversation": "x"}}},
        {"_data": {"IsEdit": True, "Message": {"conversation": "x"}}},
        {"fromMe": "perhaps"},
        {"fromMe": {"a": 1}},
    ],
)
def test_a_link_in_a_card_a_place_or_an_edit_does_not_count(payload: dict[str, Any]) -> None:
    assert parse(webhook("start_realty_2", **payload)).text == ""
    assert parse(webhook("BEGIN:VCARD\nFN:start_realty_2\nEND:VCARD")).text == ""


def test_a_placeholder_leaves_its_id_to_the_message_behind_it() -> None:
    placeholder, decrypted = parse(example(63)), parse(example(64))
    assert placeholder.message_id == decrypted.message_id
    assert reason_to_ignore(placeholder, frozenset({"*"})) == "no_content"
    assert reason_to_ignore(decrypted, frozenset({"message"})) is None
    unknown = parse(webhook("", ALI, bare_id="3EB0", _data={"type": "something_new"}))
    later = parse(webhook("hello", ALI, bare_id="3EB0"))
    assert unknown.dedup_key != later.dedup_key
    assert unknown.idempotency_key != later.idempotency_key


def test_deep_nesting_costs_nothing() -> None:
    wrapped: dict[str, Any] = {"conversation": "x"}
    for _ in range(500):
        wrapped = {"ephemeralMessage": {"message": wrapped}}
    assert content.content_of(noweb(wrapped)) is Content.PLACEHOLDER


@pytest.mark.parametrize("odd", [{}, {"a": 1}, [], ["chat"], 7, True, None])
@pytest.mark.parametrize("field", ["type", "message", "Message", "messageStubType"])
def test_whatever_is_in_the_raw_data_it_is_read_or_not(field: str, odd: object) -> None:
    bodies: list[object] = [None, "hello", 7, {}]
    for body in bodies:
        payload = {"body": body, "_data": {field: odd}}
        assert isinstance(content.content_of(payload), Content)
        assert isinstance(content.text_of(payload), str)
        assert isinstance(content.is_edit(payload), bool)
