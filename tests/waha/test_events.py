"""WAHA's bodies: whose they are, and what they can do. payloads/ has one of each kind."""

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.model import NEVER, SESSION_NAME, Bind, Chat, Lock, LockPolicy, Moment
from gateway.domain.routing import decide, reason_to_ignore
from gateway.errors import BadBody
from gateway.waha import events
from tests.messages import ALI, LID, NOW, SARA, example, message, parse, tenant, webhook

# example: user, alias, reason to ignore with FORWARD_EVENTS=*, with the default, tenant it binds to
EXAMPLES: dict[int, tuple[str | None, str | None, str | None, str | None, int | None]] = {
    1: ("971501234501", None, None, None, None),
    2: ("971501234502", "158764321000002@lid", None, None, None),
    3: ("971501234503", "158764321000003@lid", None, None, None),
    4: ("971501234504", None, None, None, 7),
    5: ("971501234505", "158764321000005@lid", None, None, 12),
    6: ("971501234505", "158764321000005@lid", None, None, None),
    7: ("158764321000007@lid", None, None, None, None),
    8: ("971501234508", "158764321000008@lid", None, None, None),
    9: ("158764321000009@lid", None, None, None, 9),
    10: (None, None, "group", "group", None),
    11: (None, None, "group", "group", None),
    12: (None, None, "status", "status", None),
    13: (None, None, "newsletter", "newsletter", None),
    14: ("971501234501", None, None, "from_me", None),
    15: ("971501234502", None, None, "from_me", None),
    16: ("971501234503", None, None, "from_me", None),
    17: ("971501234517", None, None, None, None),
    18: ("971501234518", None, None, None, None),
    19: ("971501234519", None, None, None, None),
    20: ("971501234508", "158764321000008@lid", None, None, None),
    21: ("971501234521", None, None, None, 7),
    22: ("971501234501", None, None, "event_not_forwarded", None),
    23: ("971501234502", None, None, "event_not_forwarded", None),
    24: ("971501234501", None, None, "event_not_forwarded", None),
    25: ("971501234502", None, None, "event_not_forwarded", None),
    26: ("971501234502", None, None, "event_not_forwarded", None),
    27: ("971501234502", None, None, "event_not_forwarded", None),
    28: ("971501234502", None, None, "event_not_forwarded", None),
    29: ("971501234502", None, None, "event_not_forwarded", None),
    30: (None, None, "no_user", "event_not_forwarded", None),
    31: ("971501234531", None, None, None, 7),
    32: ("971501234504", None, None, None, 8),
    33: ("971501234533", None, None, None, 5),
    34: ("971501234533", "158764321000033@lid", None, None, 5),
    35: ("971501234535", None, None, None, None),
    36: ("971501234535", None, None, None, None),
    37: ("971501234537", None, None, None, None),
    38: ("971501234538", None, None, None, None),
    39: ("971501234539", None, None, None, None),
    40: ("971501234540", None, None, None, None),
    61: ("971501000061", None, None, None, 7),
    62: ("971501000062", None, None, None, None),
    63: ("971501000063", None, "no_content", "no_content", None),
    64: ("971501000063", None, None, None, 12),
    65: ("971501000065", None, None, None, None),
    66: ("971501000061", None, None, "event_not_forwarded", None),
    67: ("971501000069", "158764321000069@lid", None, "event_not_forwarded", None),
    68: ("971501000068", "158764321000068@lid", None, None, 7),
    70: ("971501000070", None, None, None, None),
    71: ("971501000071", "158764321000071@lid", None, None, None),
    75: (None, None, "no_user", "event_not_forwarded", None),
    76: ("971501000076", None, None, "event_not_forwarded", None),
}


@pytest.mark.parametrize("number", EXAMPLES)
def test_every_example_gives_its_user_and_what_it_can_do(number: int) -> None:
    user, alias, reason, default_reason, binds = EXAMPLES[number]
    inbound = parse(example(number))

    assert (inbound.phone or inbound.lid) == user
    assert (inbound.lid if inbound.phone else None) == alias
    assert reason_to_ignore(inbound, frozenset({"*"})) == reason
    assert reason_to_ignore(inbound, frozenset({"message"})) == default_reason
    if reason is None:
        decision = decide(
            inbound, Lock(None, NEVER), policy=LockPolicy.LAST_LINK, prefix="start_realty"
        )
        assert (decision.tenant if isinstance(decision, Bind) else None) == binds


def test_twins_have_one_key_and_are_one_message() -> None:
    assert parse(example(35)).dedup_key == parse(example(36)).dedup_key
    assert parse(example(33)).dedup_key == parse(example(34)).dedup_key
    assert parse(example(33)).idempotency_key == parse(example(34)).idempotency_key


@pytest.mark.parametrize(
    "how",
    [
        {"bare_id": "3EB0OTHER"},
        {"bare_id": "3EB0", "own": True},
        {"bare_id": "3EB0", "session": "sales"},
        {"bare_id": "3EB0", "event": "message.edited"},
    ],
)
def test_different_messages_have_different_keys(how: dict[str, Any]) -> None:
    assert message(bare_id="3EB0").dedup_key != message(**how).dedup_key


def test_an_id_with_underscores_is_one_id_and_a_participant_is_none_of_it() -> None:
    first, second = (parse(webhook(bare_id=f"test_{number}")) for number in (1, 2))
    assert (first.message_id, second.message_id) == ("test_1", "test_2")
    assert first.dedup_key != second.dedup_key
    in_status = parse(webhook(bare_id="3A77_971501234512@c.us"))
    assert in_status.message_id == "3A77"


def test_events_that_are_no_messages_are_distinguished_by_envelope_and_name() -> None:
    body = json.loads(webhook(event="message.ack"))
    again = parse(json.dumps(body).encode())
    body["event"] = "message.reaction"
    assert parse(webhook(event="message.ack")).dedup_key != again.dedup_key
    assert parse(json.dumps(body).encode()).dedup_key != again.dedup_key


def test_without_ids_the_request_id_shows_copies_and_else_nothing_does() -> None:
    body = b'{"event":"message","payload":{"from":"971501234567@c.us","body":"hi"}}'
    first = parse(body, x_webhook_request_id="3b2ozlbljmwtg6fr5")
    assert first.dedup_key == parse(body, x_webhook_request_id="3b2ozlbljmwtg6fr5").dedup_key
    assert first.dedup_key != parse(body, x_webhook_request_id="another").dedup_key
    assert parse(body).dedup_key is None
    assert parse(body).idempotency_key != parse(body).idempotency_key


def test_a_body_typed_for_curl_is_understood() -> None:
    inbound = parse(b'{"event":"message","payload":{"from":"971501234567@c.us","body":"hi"}}')
    assert (inbound.phone, inbound.text, inbound.session) == (ALI, "hi", "default")
    own = parse(
        b'{"event":"message.any","payload":{"id":"x","fromMe":true,"from":"971557357753@c.us",'
        b'"to":"971501234567@c.us"}}'
    )
    assert (own.phone, own.own) == (ALI, True)


def test_users_of_another_session_are_other_users() -> None:
    inbound = message(session="sales", other_id=LID)
    assert (inbound.phone, inbound.lid) == (f"sales/{ALI}", f"sales/{LID}")


@pytest.mark.parametrize(
    ("how", "phone", "lid"),
    [
        ({"other_id": LID}, ALI, LID),
        ({"user": LID, "other_id": ALI}, ALI, LID),
        ({"user": LID, "other_id": f"{ALI}:45@s.whatsapp.net"}, ALI, LID),
        ({"user": f"{ALI}:45@s.whatsapp.net"}, ALI, None),
        ({"other_id": "971501234599"}, ALI, None),  # a phone beside a phone says nothing
        ({"user": LID, "other_id": "971501230000"}, None, LID),  # me.id
        ({"user": LID, "other_id": "971557357753"}, None, LID),  # GATEWAY_PHONE
        ({"other_id": "230000000000001@lid"}, ALI, None),  # me.lid
        ({"user": LID, "other_id": "12@s.whatsapp.net"}, None, LID),
        ({"user": LID, "_data": {"key": {"senderPn": f"{ALI}@s.whatsapp.net"}}}, ALI, LID),
        ({"user": LID, "_data": {"Info": {"SenderAlt": f"{ALI}@s.whatsapp.net"}}}, ALI, LID),
        ({"user": LID, "_data": {"Info": {"RecipientAlt": f"{ALI}@s.whatsapp.net"}}}, None, LID),
        (
            {
                "user": LID,
                "own": True,
                "_data": {"Info": {"RecipientAlt": f"{ALI}@s.whatsapp.net"}},
            },
            ALI,
            LID,
        ),
        ({"user": LID, "own": True, "_data": {"key": {"senderPn": f"{ALI}@c.us"}}}, None, LID),
        ({"user": LID, "_data": "gone"}, None, LID),
        # An ack on GOWS is the receipt, and a call names who began it.
        ({"user": LID, "_data": {"SenderAlt": f"{ALI}@s.whatsapp.net"}}, ALI, LID),
        ({"user": LID, "own": True, "_data": {"SenderAlt": f"{ALI}@c.us"}}, ALI, LID),
        ({"user": LID, "_data": {"IsFromMe": True, "RecipientAlt": f"{ALI}@c.us"}}, ALI, LID),
        ({"user": LID, "_data": {"IsFromMe": True, "SenderAlt": f"{SARA}@c.us"}}, None, LID),
        ({"user": LID, "_data": {"CallCreator": LID, "CallCreatorAlt": f"{ALI}@c.us"}}, ALI, LID),
        # Beside somebody else's id.
        ({"user": LID, "_data": {"Chat": "1@g.us", "Sender": LID, "SenderAlt": ALI}}, None, LID),
        (
            {
                "user": LID,
                "_data": {"CallCreator": f"{SARA}@c.us", "CallCreatorAlt": f"{ALI}@c.us"},
            },
            None,
            LID,
        ),
        # The chat goes by phone, what is raw by LID.
        ({"_data": {"Info": {"Sender": LID, "SenderAlt": f"{ALI}@s.whatsapp.net"}}}, ALI, LID),
        ({"user": f"{ALI}@hosted"}, ALI, None),
        ({"user": f"{ALI}:99@hosted"}, ALI, None),
        ({"user": "158764321000005@hosted.lid"}, None, LID),
        # NOWEB and GOWS have written @c.us behind what they did not know.
        (
            {
                "user": "158764321000005@c.us",
                "_data": {"key": {"remoteJid": "158764321000005@hosted.lid"}},
            },
            None,
            LID,
        ),
        (
            {
                "user": "158764321000005@c.us",
                "_data": {
                    "Info": {
                        "Chat": "158764321000005:99@hosted.lid",
                        "Sender": LID,
                        "SenderAlt": f"{ALI}:99@hosted",
                    }
                },
            },
            ALI,
            LID,
        ),
        (
            {"user": f"{ALI}@c.us", "_data": {"key": {"remoteJid": f"{ALI}@s.whatsapp.net"}}},
            ALI,
            None,
        ),
        ({"user": LID, "_data": {"key": ["gone"], "Info": 7}}, None, LID),
    ],
)
def test_which_ids_a_message_shows(how: dict[str, Any], phone: str | None, lid: str | None) -> None:
    inbound = message(**how)
    assert (inbound.phone, inbound.lid) == (phone, lid)


@pytest.mark.parametrize(
    ("timestamp", "second", "readable"),
    [
        (NOW - 5, int(NOW) - 5, True),
        (NOW - 4.5, int(NOW) - 5, True),
        ((NOW - 5) * 1000, int(NOW) - 5, True),  # poll votes come in milliseconds
        (NOW + 5, int(NOW), True),
        (None, int(NOW), True),
        ("1782892860", int(NOW), False),
        ("2026-07-01T08:15:00Z", int(NOW), False),
        ("", int(NOW), False),
        ({"low": 1782892860, "high": 0, "unsigned": True}, int(NOW), False),
        ([1782892860], int(NOW), False),
        (True, int(NOW), False),
        (0, int(NOW), False),
        (-1, int(NOW), False),
        (NOW * 10, int(NOW), False),
        (1e300, int(NOW), False),
        (10**400, int(NOW), False),
    ],
)
def test_a_time_is_taken_as_it_comes_or_counts_as_now(
    timestamp: object, second: int, readable: bool
) -> None:
    inbound = parse(webhook(timestamp=timestamp))
    assert (inbound.sent.second, inbound.sent_is_readable) == (second, readable)
    link = parse(webhook("start_realty_2", timestamp=timestamp))
    at_nine = Lock(tenant(9), Moment(int(NOW) - 100, NOW - 100))
    moved = decide(link, at_nine, policy=LockPolicy.LAST_LINK, prefix="start_realty")
    assert isinstance(moved, Bind) == readable
    free = decide(link, Lock(None, NEVER), policy=LockPolicy.LAST_LINK, prefix="start_realty")
    assert free == Bind(tenant(2))  # nothing to lose


def test_a_time_is_from_the_future_only_if_our_clock_is_not_known_to_be_behind() -> None:
    behind = events.parse(
        webhook(sent=NOW + 600), {}, home_session="default", own_ids=frozenset(),
        now=NOW, latest=NOW + 601,
    )  # fmt: skip
    assert behind.sent == Moment(int(NOW) + 600, NOW + 600)
    assert message(sent=NOW + 600).sent == Moment(int(NOW), NOW)


def test_the_fraction_comes_from_the_envelope() -> None:
    assert message(sent=NOW - 5, raised=NOW - 3.5).sent == Moment(int(NOW) - 5, NOW - 3.5)
    assert message(sent=NOW - 5, raised=NOW + 3.5).sent == Moment(int(NOW) - 5, NOW)
    assert message(raised=NOW - 3.5).event_time == NOW - 3.5


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\x00", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"event":NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"event":"message","payload":' + b"1" * 5000 + b"}", "not JSON"),
        (b"[]", "array"),
        (b'"message"', "text"),
        (b"7", "number"),
        (b"null", "null"),
        (b"{}", "`event`"),
        (b'{"event":7}', "`event`"),
        (b'{"event":' + b"[" * 980 + b"]" * 980 + b"}", "a JSON array"),
        (b'{"event":"m","session":' + b"[" * 980 + b"]" * 980 + b"}", "a JSON array"),
        (b'{"event":""}', "`event`"),
        (b'{"event":"message","session":7}', "`session`"),
        (b'{"event":"message","session":""}', "`session`"),
    ],
)
def test_what_is_no_event_is_refused_by_name(body: bytes, names: str) -> None:
    with pytest.raises(BadBody, match=names):
        parse(body)


def test_half_an_emoji_is_routed_all_the_same() -> None:
    body = webhook("cut \\ud83d off").replace(b"\\\\ud83d", b"\\ud83d")
    assert b"\\ud83d" in body
    assert parse(body).phone == ALI
    assert parse(body).body == body


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("office_1", "office_1"),
        ("office.1", "office.1"),
        ("My Office 1", "My Office 1"),
        ("a" * 64, "a" * 64),
        ("a" * 65, "hash-"),
        ("a/b", "hash-"),
        (" office", "hash-"),
        ("مكتب", "hash-"),
        ("{x}", "hash-"),
        ("\u0000", "hash-"),
        ("\ud83d", "hash-"),
    ],
)
def test_a_session_is_stored_by_its_name_or_a_hash_of_it(name: str, stored: str) -> None:
    inbound = parse(json.dumps(json.loads(webhook()) | {"session": name}).encode())
    assert inbound.session.startswith(stored)
    assert inbound.phone == f"{inbound.session}/{ALI}"
    assert re.fullmatch(SESSION_NAME, inbound.session)


@pytest.mark.parametrize(
    "chat",
    [
        "867051314767696@c.us",
        "867051314767696@bot",
        "13135550002@c.us",
        "13135550002@s.whatsapp.net",
        "0@c.us",
        "1234@hosted",
        "whatever@meta.ai",
    ],
)
def test_whatsapps_own_numbers_and_bots_are_nobody(chat: str) -> None:
    inbound = parse(webhook("start_realty_2", chat))
    assert (inbound.chat, inbound.phone, inbound.odd_part) == (Chat.NOBODY, None, None)
    dressed = {"key": {"remoteJid": "718584497008509@bot"}}
    inbound = parse(webhook("start_realty_2", "718584497008509@c.us", _data=dressed))
    assert (inbound.chat, inbound.phone, inbound.odd_part) == (Chat.NOBODY, None, None)


@pytest.mark.parametrize(
    ("id_", "data"),
    [
        ({"fromMe": False, "remote": f"{ALI}@c.us", "id": "3EB0A",
          "_serialized": f"false_{ALI}@c.us_3EB0A"}, {}),
        ({"fromMe": False, "remote": f"{ALI}@c.us", "id": "3EB0A"}, {}),
        ({"fromMe": False, "remote": {"server": "c.us", "_serialized": f"{ALI}@c.us"},
          "id": "3EB0A"}, {}),
        ({"fromMe": False, "remoteJid": f"{ALI}@s.whatsapp.net", "id": "3EB0A"}, {}),
        ({"id": "3EB0A"}, {}),
        (None, {"key": {"remoteJid": f"{ALI}@s.whatsapp.net", "fromMe": False, "id": "3EB0A"}}),
        (None, {"Info": {"Chat": f"{ALI}@s.whatsapp.net", "IsFromMe": False, "ID": "3EB0A"}}),
        ("", {"id": {"_serialized": f"false_{ALI}@c.us_3EB0A"}}),
        (7, {"id": f"false_{ALI}@c.us_3EB0A"}),
    ],
)  # fmt: skip
def test_an_id_is_found_whatever_its_form(id_: object, data: dict[str, Any]) -> None:
    """And twins are one message, whatever the ids of their envelopes."""
    plain = message(bare_id="3EB0A")
    for event in ("message", "message.any"):
        inbound = parse(webhook(id=id_, event=event, _data=data))
        assert (inbound.phone, inbound.message_id) == (ALI, "3EB0A")
        assert inbound.dedup_key == plain.dedup_key


def test_twins_without_an_id_are_one_by_their_envelope() -> None:
    body = json.loads(webhook(id=None, _data={}))
    first = parse(json.dumps(body).encode())
    again = parse(json.dumps(body | {"event": "message.any"}).encode())
    assert first.dedup_key == again.dedup_key is not None
    assert parse(webhook(id=None, _data={})).dedup_key != first.dedup_key


def test_an_id_that_cannot_be_stored_is_hashed() -> None:
    inbound = parse(webhook(bare_id="XX").replace(b"XX", b"a\\ud83d b\\u0000"))
    assert inbound.phone == ALI
    assert inbound.message_id is not None
    assert len(inbound.message_id) == 64


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(number=st.sampled_from(sorted(EXAMPLES)), path=st.data(), value=json_values)
def test_whatever_is_in_a_field_the_body_is_read_or_refused(
    number: int, path: st.DataObject, value: object
) -> None:
    body = json.loads(example(number))
    place = body
    while True:
        key = path.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or path.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    try:
        inbound = parse(json.dumps(body).encode())
    except BadBody:
        return
    reason_to_ignore(inbound, frozenset({"*"}))


@given(st.binary(max_size=200))
def test_whatever_the_bytes_the_body_is_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(BadBody):
        parse(body)


def test_headers_go_on_if_they_are_wahas_and_can_be_sent() -> None:
    inbound = parse(
        webhook(),
        content_type="application/json",
        x_webhook_timestamp="1782892860417",
        x_webhook_odd="caf\u00e9",
        x_webhook_control="a\x01b",
        x_tenant_id="9",
        webhook_id="9_x",
        idempotency_key="stolen",
    )
    assert inbound.headers == (
        ("content-type", "application/json"),
        ("x-webhook-timestamp", "1782892860417"),
    )


@pytest.mark.parametrize(
    ("event", "payload", "chat", "who"),
    [
        ("call.received", {"from": f"{ALI}@c.us", "isGroup": True}, Chat.GROUP, None),
        ("call.received", {"from": f"{ALI}@c.us", "isGroup": False}, Chat.PERSON, ALI),
        ("call.received", {"id": "CCBC", "from": None}, Chat.NOBODY, None),
        ("label.chat.added", {"chatId": f"{ALI}@c.us", "id": "3"}, Chat.PERSON, ALI),
        ("label.upsert", {"id": "3", "name": "vip"}, Chat.NOBODY, None),
        ("group.v2.join", {"group": {"id": "120363@g.us"}}, Chat.GROUP, None),
        ("chat.archive", {"id": f"{ALI}@c.us", "archived": True}, Chat.PERSON, ALI),
        ("message.revoked", {"before": {"id": f"false_{ALI}@c.us_A"}}, Chat.PERSON, ALI),
        ("message.revoked", {"before": None, "after": None}, Chat.NOBODY, None),
        ("poll.vote.failed", {"vote": {"id": f"false_{ALI}@c.us_A"}}, Chat.PERSON, ALI),
        ("message.reaction", {"id": "false_120363@g.us_A_x@lid", "from": ALI}, Chat.GROUP, None),
        ("engine.event", {}, Chat.NOBODY, None),
        ("brand.new", {"id": f"false_{ALI}@c.us_A"}, Chat.PERSON, ALI),
        ("brand.new", {"from": f"{ALI}@c.us"}, Chat.NOBODY, None),
    ],
)
def test_whose_an_event_is(
    event: str, payload: dict[str, Any], chat: Chat, who: str | None
) -> None:
    inbound = parse(json.dumps({"event": event, "payload": payload}).encode())
    assert (inbound.chat, inbound.phone) == (chat, who)


def test_an_id_of_many_signs_is_read_in_a_moment() -> None:
    """It took ten seconds for 30 kB, and four times as long for each doubling."""
    for odd in ("true_a@b_x_" + "@" * 4_000_000 + "_", "true_a@b" + "_@" * 2_000_000 + "_"):
        body = json.dumps({"event": "message", "payload": {"id": odd}}).encode()
        assert parse(body).chat is not None


@pytest.mark.parametrize(
    ("payload", "own"),
    [
        ({"fromMe": True}, True),
        ({"fromMe": "true"}, True),
        ({"fromMe": 1}, True),
        ({"fromMe": None, "_data": {"key": {"fromMe": True}}}, True),
        ({"fromMe": None, "_data": {"Info": {"IsFromMe": True}}}, True),
        ({"fromMe": False}, False),
        ({"fromMe": "false"}, False),
        ({"fromMe": None}, False),
        ({"fromMe": [True]}, False),
    ],
)
def test_whose_a_message_with_a_bare_id_is(payload: dict[str, Any], own: bool) -> None:
    assert parse(webhook("start_realty_5", id="QQ10", **payload)).own is own
