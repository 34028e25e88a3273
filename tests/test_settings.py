"""A wrong value stops the start and names itself."""

from pathlib import Path

import pytest

from gateway.errors import StartRefused
from gateway.model import LockPolicy
from gateway.settings import Settings, load, split


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_without_an_environment_the_defaults_hold() -> None:
    settings = load(env_file=None)
    assert (settings.host, settings.port) == ("127.0.0.1", 8001)
    assert settings.backend_url == "http://localhost:8000/api/webhook/waha"
    assert settings.forward_events == {"message"}
    assert settings.lock_policy is LockPolicy.LAST_LINK


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HOST", "", "host name"),
        ("HOST", "a b", "host name"),
        ("HOST", "a..b", "host name"),
        ("BACKEND_API_URL", "http://999.1.1.1", "must be a URL"),
        ("BACKEND_API_URL", "http://a b", "ASCII"),
        ("BACKEND_WEBHOOK_PATH", "/a?b", "? or #"),
        ("PORT", "abc", "integer"),
        ("PORT", "0", "greater than or equal to 1"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("BACKEND_API_URL", "backend:8000", "http://host"),
        ("BACKEND_API_URL", "http://", "http://host"),
        ("BACKEND_API_URL", "http://h:99999", "Port out of range"),
        ("BACKEND_WEBHOOK_PATH", "api", "begin with /"),
        ("BACKEND_WEBHOOK_PATH", "/a b", "no blanks"),
        ("BACKEND_TIMEOUT", "0", "greater than 0"),
        ("BACKEND_TIMEOUT", "two", "number"),
        ("WAHA_SESSION", "a/b", "1-64"),
        ("GATEWAY_PHONE", "+971 55 735 7753", "digits"),
        ("DEEP_LINK_PREFIX", "start realty", "1-40"),
        ("DEEP_LINK_PREFIX", "start_", "not end with _"),
        ("LOCK_POLICY", "newest", "'last_link' or 'first_link'"),
        ("FORWARD_EVENTS", "message,mesage.ack", "'mesage.ack' is no event"),
        ("FORWARD_EVENTS", "message.ack", "without messages no link locks"),
        ("FORWARD_EVENTS", "", "no event"),
        ("MAX_IN_FLIGHT", "0", "greater than or equal to 1"),
        ("MAX_IN_FLIGHT_PER_TENANT", "-1", "greater than or equal to 1"),
        ("MAX_BODY_BYTES", "10", "greater than or equal to 1024"),
        ("MAX_BACKLOG", "x", "integer"),
        ("MAX_BACKLOG_PER_TENANT", "0", "greater than or equal to 1"),
        ("MAX_DELIVERY_AGE", "nan", "greater than 0"),
        ("LOG_LEVEL", "loud", "DEBUG"),
        ("LOG_FORMAT", "xml", "text"),
        ("LOG_MASK_USERS", "perhaps", "boolean"),
    ],
)
def test_a_wrong_value_names_itself_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartRefused) as refused:
        load(env_file=None)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{name}={value!r}: ")
    assert allowed in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKEND_API_URL", "http://me:secret@backend"),
        ("BACKEND_SIGNING_SECRET", "not-a-secret"),
        ("BACKEND_SIGNING_SECRET", "whsec_c2hvcnQ="),
        ("WEBHOOK_HMAC_KEY", "new,,old"),
        ("ADMIN_API_KEY", ",older-key"),
    ],
)
def test_a_wrong_secret_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartRefused) as refused:
        load(env_file=None)
    assert str(refused.value).startswith(f"{name}=(not shown): must ")
    assert value not in str(refused.value)


def test_each_wrong_value_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "abc")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    with pytest.raises(StartRefused) as refused:
        load(env_file=None)
    assert [line.split("=")[0] for line in str(refused.value).splitlines()] == ["PORT", "LOG_LEVEL"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WAHA_API_KEY", "waha_artinsmartrealty_secure_key_2024"),
        ("ADMIN_API_KEY", "changeme"),
        ("ADMIN_API_KEY", "a-good-one,<Change-Me>"),
        ("WEBHOOK_HMAC_KEY", "my-secret-key"),
    ],
)
def test_a_published_key_opens_nothing_to_others(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert load(None).published_keys == (name,)
    monkeypatch.setenv("HOST", "0.0.0.0")
    with pytest.raises(StartRefused, match=f"^{name}: this key stands in public") as refused:
        load(None)
    assert value not in str(refused.value)
    monkeypatch.setenv(name, "vK2mSg9Qb0dYpX7t")
    assert load(None).published_keys == ()


def test_secrets_do_not_show_in_the_settings_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_HMAC_KEY", "very-secret,older-secret")
    settings = load(env_file=None)
    assert "secret" not in repr(settings).replace("SecretStr", "").replace("signing_secret", "")
    assert split(settings.webhook_hmac_key) == ("very-secret", "older-secret")


def test_a_dotenv_file_counts_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "PORT=9001\nLOG_LEVEL=DEBUG\nSOMEBODY_ELSES=1\nFORWARD_EVENTS=message,poll.vote\n"
    )
    monkeypatch.setenv("PORT", "9002")
    settings = load(str(file))
    assert (settings.port, settings.log_level) == (9002, "DEBUG")
    assert settings.forward_events == {"message", "poll.vote"}
