"""A wrong value stops the start and names itself."""

from pathlib import Path

import pytest

from gateway.domain.model import LockPolicy
from gateway.errors import StartRefused
from gateway.settings import Settings, load, misspelt_names, split


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
        ("GATEWAY_PHONE", "0557357753", "must begin with the country code"),
        ("DATA_DIR", "~nobody-of-that-name/data", "no such home"),
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
    with pytest.raises(StartRefused, match=f"^{name}: this key is in public") as refused:
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


@pytest.mark.parametrize("name", ["ADMIN_API_KEY", "BACKEND_API_URL", "DATA_DIR", "PORT"])
@pytest.mark.parametrize("mark", ['"', "'"])
def test_a_value_in_quotes_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, mark: str
) -> None:
    """docker's --env-file keeps them; in a .env they do no harm."""
    value = {"BACKEND_API_URL": "http://backend:8000", "PORT": "8001"}.get(name, "abcdefgh")
    monkeypatch.setenv(name, f"{mark}{value}{mark}")
    with pytest.raises(StartRefused, match=name) as refused:
        load(env_file=None)
    if name == "ADMIN_API_KEY":
        assert "is in quotes" in str(refused.value)
        assert value not in str(refused.value)


def test_a_home_in_data_dir_is_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA_DIR", "~/gateway")
    assert load(env_file=None).data_dir == Path("/home/me/gateway")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("WEBHOOK_HMAC", "WEBHOOK_HMAC_KEY"),
        ("ADMIN_KEY", "ADMIN_API_KEY"),
        ("BACKEND_URL", "BACKEND_API_URL"),
        ("WAHA_URL", "WAHA_API_URL"),
        ("FORWARD_EVENT", "FORWARD_EVENTS"),
        ("LOG_MASK_USER", "LOG_MASK_USERS"),
        ("MAX_BACKLOG_PER_TENANTS", "MAX_BACKLOG_PER_TENANT"),
        ("WHATSAPP_HOOK_HMAC_KEY", None),  # WAHA's own, in an .env that both share
        ("WAHA_BASE_URL", None),
        ("WAHA_API_KEY_PLAIN", None),
        ("WAHA_DASHBOARD_PASSWORD", None),
        ("BACKEND_API_KEY", None),
        ("WAHA_SESSION_NAME", None),
        ("GATEWAY_HOST", None),
        ("POSTGRES_PASSWORD", None),
        ("HOSTNAME", None),
        ("WEBHOOK_HMAC_KEY", None),
        ("webhook_hmac_key", None),
    ],
)
def test_a_misspelt_setting_is_named_with_the_one_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, meant: str | None
) -> None:
    wanted = {name.upper(): meant} if meant else {}
    file = tmp_path / ".env"
    file.write_text(f"{name}=x\n")
    assert misspelt_names(str(file)).items() >= wanted.items()
    assert (name.upper() in misspelt_names(str(file))) == bool(meant)
    monkeypatch.setenv(name, "x")
    assert (name.upper() in misspelt_names(None)) == bool(meant)


@pytest.mark.parametrize(
    ("how", "shut"),
    [
        ({}, []),
        ({"HOST": "0.0.0.0"}, ["Every webhook gets 403", "ADMIN_API_KEY"]),
        # The shortest snippet that people have: WAHA's key alone.
        (
            {"HOST": "0.0.0.0", "WAHA_API_KEY": "k" * 32},
            ["get 401 without WAHA_API_KEY", "ADMIN_API_KEY"],
        ),
        ({"HOST": "0.0.0.0", "WEBHOOK_HMAC_KEY": "k" * 32}, ["ADMIN_API_KEY"]),
        ({"HOST": "0.0.0.0", "WEBHOOK_HMAC_KEY": "k" * 32, "ADMIN_API_KEY": "a" * 32}, []),
    ],
)
def test_what_is_shut_for_want_of_a_key_is_said(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, str], shut: list[str]
) -> None:
    for name, value in how.items():
        monkeypatch.setenv(name, value)
    said = load(env_file=None).closed_to_others
    assert len(said) == len(shut)
    assert all(part in line for part, line in zip(shut, said, strict=True))
