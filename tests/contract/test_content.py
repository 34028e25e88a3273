"""A message that comes before its content, over each store, through the webhook's whole way."""

import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from gateway.app import create_app
from gateway.domain.model import TenantId
from gateway.settings import Settings
from tests.messages import ALI, LID, webhook

HOOK = "/webhook/waha"
NOTHING_YET = '{"status":"ignored","reason":"no_content"}'


@pytest.fixture
def settings(store_url: str, tmp_path: Path) -> Settings:
    place, _, folder = store_url.partition(":")
    data_dir = Path(folder) if place == "file" else tmp_path / "data"
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        data_dir=data_dir,
        store_url="" if place == "file" else store_url,
        backend_api_url="http://127.0.0.1:9",
        waha_api_url="http://127.0.0.1:9/api",
        recover_hours=0,
        help_message="",
    )


def post(client: TestClient, body: bytes) -> str:
    answer = client.post(HOOK, content=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.text
    return text


@pytest.mark.parametrize("first", ["phone", "lid"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_placeholder_does_not_use_up_the_id_of_its_message(
    settings: Settings, first: str, restart: bool
) -> None:
    """Whichever id it came by, over a restart, and at another router."""
    one, other = (ALI, LID) if first == "phone" else (LID, ALI)
    now = time.time()
    placeholder = webhook(None, one, bare_id="3EB0A", sent=now, _data={"type": "ciphertext"})
    link = webhook("start_realty_7", other, bare_id="3EB0A", sent=now)
    with TestClient(create_app(settings)) as client:
        assert post(client, placeholder) == NOTHING_YET
        assert post(client, placeholder) == NOTHING_YET
        if not restart:
            assert '"action":"new_session_locked"' in post(client, link)
    with TestClient(create_app(settings)) as client:
        said = post(client, link)
        assert ('"status":"duplicate"' if not restart else '"new_session_locked"') in said
        assert post(client, placeholder) == NOTHING_YET  # late
        later = webhook("I want to sign", other, bare_id="3EB0B", sent=now + 1)
        waits = webhook("", other, bare_id="3EB0B", sent=now + 1, _data={"type": "ciphertext"})
        assert post(client, waits) == NOTHING_YET
        assert f'"tenant_id":{TenantId(7)}' in post(client, later)
        assert client.get("/router/pending").json()["waiting"] == 2


def test_notices_ask_for_no_help_and_unknown_kinds_have_keys_of_their_own(
    settings: Settings,
) -> None:
    settings = settings.model_copy(update={"help_message": "Please open your agent's link."})
    with TestClient(create_app(settings)) as client:
        notice = webhook(None, sent=time.time(), _data={"type": "e2e_notification"})
        assert post(client, notice) == NOTHING_YET
        odd = webhook("", sent=time.time(), bare_id="3EB0C", _data={"type": "something_new"})
        assert '"action":"none"' in post(client, odd)
        assert '"status":"duplicate"' in post(client, odd)
        said = post(client, webhook("hi", sent=time.time(), bare_id="3EB0C"))
        assert '"action":"sent_help_message"' in said
        unread = client.get("/router/unreadable").json()["unreadable"]
        assert unread == []
