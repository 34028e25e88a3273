"""Every environment variable: type, unit, default, meaning. Read once, from there or from .env.

A wrong value stops the start and names itself: see load().
"""

import base64
import difflib
import functools
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway.domain.model import MESSAGE_EVENTS, SESSION_NAME, SESSION_NAME_IN_WORDS, LockPolicy
from gateway.errors import StartRefused

WEBHOOK_PATH = "/webhook/waha"  # where WAHA calls
# Keys that are in public documents (the last two are WAHA's and the predecessor's examples), or
# that people write who mean to come back to it. Letters and digits only: see is_guessable.
_PUBLISHED = frozenset(
    [
        "changeme",
        "secret",
        "password",
        "admin",
        "test",
        "key",
        "apikey",
        "secretkey",
        "yoursecret",
        "yourkey",
        "yourapikey",
        "yoursecretkey",
        "mysecretkey",
        "wahaartinsmartrealtysecurekey2024",
    ]
)

HELP_MESSAGE = """\
Hello! Please open the link that your agent sent you, and send the message it contains.
مرحبًا! يرجى فتح الرابط الذي أرسله إليك وكيلك وإرسال الرسالة الموجودة فيه.
سلام! لطفاً لینکی را که مشاور شما فرستاده باز کنید و پیام آن را ارسال کنید."""

# WAHA docs 2026.8, "Events".
EVENTS_OF_NOBODY = frozenset(
    [
        "session.status",
        "state.change",
        "engine.event",
        "label.upsert",
        "label.deleted",
        "group.v2.join",
        "group.v2.leave",
        "group.v2.participants",
        "group.v2.participants.join-request",
        "group.v2.update",
        "group.join",
        "group.leave",
    ]
)
# Unknown names are refused: a typo would drop events silently.
WAHA_EVENTS = (
    MESSAGE_EVENTS
    | EVENTS_OF_NOBODY
    | frozenset(
        [
            "message.reaction",
            "message.ack",
            "message.ack.group",
            "message.waiting",
            "message.edited",
            "message.revoked",
            "chat.archive",
            "presence.update",
            "poll.vote",
            "poll.vote.failed",
            "event.response",
            "event.response.failed",
            "label.chat.added",
            "label.chat.deleted",
            "call.received",
            "call.accepted",
            "call.rejected",
        ]
    )
)


def _http_url(value: str) -> str:
    address = urlsplit(value)
    if (
        address.scheme not in ("http", "https")
        or not address.hostname
        or address.query
        or address.fragment
    ):
        raise ValueError("must be http://host[:port][/path] or https://…, without ? and #")
    if address.username is not None:
        raise ValueError("must hold no user:password@, which would be logged")
    _ = address.port  # raises ValueError when it is no port
    try:
        httpx.URL(value)
    except httpx.InvalidURL as exc:
        raise ValueError(f"must be a URL: {exc}") from exc
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("must be of ASCII characters without blanks")
    return value


def _no_slash(value: str) -> str:
    return value.rstrip("/")


def _host(value: str) -> str:
    name = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    try:
        ipaddress.ip_address(value)
    except ValueError as exc:
        if not re.fullmatch(rf"{name}(\.{name})*", value):
            raise ValueError("must be an IP address or a host name") from exc
    return value


def _path(value: str) -> str:
    if not re.fullmatch(r"/[!-~]*", value) or re.search("[?#]", value):
        raise ValueError("must begin with / and hold no blanks, ? or #")
    return value


def _digits(value: str) -> str:
    if not re.fullmatch(r"[0-9]{5,20}", value):
        raise ValueError("must be the number in 5-20 digits, without + and blanks")
    if value.startswith("0"):
        raise ValueError("must begin with the country code, as 971557357753 does, not with 0")
    return value


def _folder(value: Any) -> Any:
    """No shell puts a home in the place of ~ in an env file."""
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as exc:
        raise ValueError("must be a path; there is no such home") from exc


# Names of others' settings that look like ours, or that an .env shared with WAHA holds.
_NOT_OURS = re.compile(
    "WHATSAPP_.*|WAHA_(?:BASE|HOOK|DASHBOARD|LOG|PRINT|MEDIA|SESSION_CONFIG|NO|S3|HTTP|API_KEY_)_?.*"
)
_ALIKE = 0.9  # of difflib: a letter too many or too few


def misspelt_names(env_file: str | None = ".env") -> dict[str, str]:
    """Return the names that are set, are no settings and look like one, each with that setting: a
    letter is off, or words in it are missing (WEBHOOK_HMAC for WEBHOOK_HMAC_KEY)."""
    names = [name.upper() for name in Settings.model_fields]
    found: dict[str, str] = {}
    for given in _raw_values(env_file):
        if given in names or "_" not in given or _NOT_OURS.fullmatch(given):
            continue
        first, *words = given.split("_")
        shorter = [
            name
            for name in names
            if name.split("_")[0] == first and set(words) < set(name.split("_")[1:])
        ]
        if meant := difflib.get_close_matches(given, names, n=1, cutoff=_ALIKE) or shorter:
            found[given] = meant[0]
    return found


def _prefix(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,39}", value) or value.endswith("_"):
        raise ValueError("must be 1-40 of A-Z a-z 0-9 _ -, begin with a letter, not end with _")
    return value


def _store_url(value: str) -> str:
    if value.startswith("file:"):
        raise ValueError("leave it empty, and set DATA_DIR: all files lie in one folder")
    return value


def _session(value: str) -> str:
    if not re.fullmatch(SESSION_NAME, value):
        raise ValueError(f"must be {SESSION_NAME_IN_WORDS}")
    return value


def _events(value: Any) -> Any:
    return {name.strip() for name in value.split(",")} if isinstance(value, str) else value


def _known_events(value: frozenset[str]) -> frozenset[str]:
    if unknown := value - WAHA_EVENTS - {"*"}:
        raise ValueError(f"{sorted(unknown)[0]!r} is no event of WAHA; * is all of them")
    if not value & (MESSAGE_EVENTS | {"*"}):
        raise ValueError("must name message, message.any or *: without messages no link locks")
    return value


def _key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be of one line, without blanks at its ends")
    return value


def _secrets(value: SecretStr) -> SecretStr:
    _key(value)
    if "" in value.get_secret_value().split(",")[1:] or value.get_secret_value().startswith(","):
        raise ValueError("must be one key, or new,old while rotating")
    return value


def _signing_secrets(value: SecretStr) -> SecretStr:
    for secret in split(_secrets(value)):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:  # binascii.Error is one, too
            key = b""
        # Standard Webhooks 1.0: "between 24 bytes (192 bits) and 64 bytes (512 bits)".
        if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
            raise ValueError("must be whsec_ and 24-64 bytes in base64 (or new,old)")
    return value


def split(value: SecretStr) -> tuple[str, ...]:
    """The keys in a setting that takes `new,old` while rotating; none if it is empty."""
    return tuple(key for key in value.get_secret_value().split(",") if key)


Secrets = Annotated[SecretStr, AfterValidator(_secrets)]
SigningSecrets = Annotated[SecretStr, AfterValidator(_signing_secrets)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
BaseUrl = Annotated[HttpUrl, AfterValidator(_no_slash)]
Phone = Annotated[str, AfterValidator(_digits)]


class Settings(BaseSettings):
    """One frozen value, passed down. Only whatsapp_router.py reads the environment."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=False,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    host: Annotated[str, AfterValidator(_host)] = Field(
        "127.0.0.1", description="address to listen on"
    )
    port: int = Field(8001, ge=1, le=65535, description="port to listen on")
    data_dir: Annotated[Path, BeforeValidator(_folder)] = Field(
        Path("data"), description="folder of the mappings file, router.db and tenants.json"
    )
    store_url: Annotated[str, AfterValidator(_store_url)] = Field(
        "", description="empty: files in DATA_DIR; redis://…: a Redis that several routers share"
    )
    backend_api_url: BaseUrl = Field("http://localhost:8000", description="the agents' backend")
    backend_webhook_path: Annotated[str, AfterValidator(_path)] = Field(
        "/api/webhook/waha", description="where the backend takes webhooks"
    )
    backend_timeout: float = Field(
        120, gt=0, le=3600, description="seconds for one attempt; longer than the slowest answer"
    )
    backend_signing_secret: SigningSecrets = Field(
        SecretStr(""), description="whsec_…: signs what goes to the backend; new,old while rotating"
    )
    waha_api_url: BaseUrl = Field(
        "http://localhost:3000/api",
        description="WAHA's API: for LIDs, help, sessions, and messages that never came",
    )
    waha_api_key: Annotated[SecretStr, AfterValidator(_key)] = Field(
        SecretStr(""),
        description="sent to WAHA as X-Api-Key; lets a webhook in where it is not signed",
    )
    waha_session: Annotated[str, AfterValidator(_session)] = Field(
        "default", description="the WAHA session whose users have no prefix in the file"
    )
    webhook_hmac_key: Secrets = Field(
        SecretStr(""), description="set: every webhook must be signed; new,old while rotating"
    )
    admin_api_key: Secrets = Field(
        SecretStr(""),
        description="X-Api-Key for /router/*, /ready, /metrics, /docs; new,old while rotating",
    )
    gateway_phone: Phone = Field(
        "971557357753", description="the WhatsApp number that all tenants share"
    )
    deep_link_prefix: Annotated[str, AfterValidator(_prefix)] = Field(
        "start_realty", description="what comes before _2 in a link"
    )
    lock_policy: LockPolicy = Field(
        LockPolicy.LAST_LINK,
        description="last_link: a new link moves the user; first_link: it does not",
    )
    forward_events: Annotated[
        frozenset[str], NoDecode, BeforeValidator(_events), AfterValidator(_known_events)
    ] = Field(
        frozenset({"message"}), description="what goes to the backend: names of WAHA's events, or *"
    )
    help_message: str = Field(
        HELP_MESSAGE,
        max_length=4096,
        description="what a user without a lock is answered, by WAHA; empty: nothing",
    )
    help_cooldown: float = Field(
        604_800, ge=0, description="seconds between two help messages to one person"
    )
    help_per_minute: int = Field(20, ge=1, le=600, description="help messages in all")
    hold_seconds: float = Field(
        900, ge=0, description="how long a message without a lock waits for its link; 0: not at all"
    )
    recover_hours: float = Field(
        24,
        ge=0,
        le=48,  # what was seen is known as long
        description="how far back WAHA is asked for messages that never came; 0: not at all",
    )
    max_in_flight: int = Field(256, ge=1, le=10_000, description="messages at the backend at once")
    max_in_flight_per_tenant: int = Field(
        32, ge=1, le=10_000, description="of one tenant, once half of MAX_IN_FLIGHT is in use"
    )
    max_body_bytes: int = Field(
        8_388_608, ge=1024, le=104_857_600, description="larger webhooks get 413"
    )
    max_backlog: int = Field(1_000_000, ge=1, description="waiting messages; more get 503")
    max_backlog_per_tenant: int = Field(100_000, ge=1, description="the same for one tenant")
    max_delivery_age: float = Field(
        86_400, gt=0, description="seconds after its first attempt until a message is a dead letter"
    )
    metrics_tenants: int = Field(
        10, ge=0, le=1000, description="so many tenants with the most waiting have a series"
    )
    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR"
    )
    log_format: Annotated[str, Field(pattern="^(text|json)$")] = Field(
        "text", description="text for people, json for machines"
    )
    log_mask_users: bool = Field(False, description="true: only the last four digits in the log")

    @property
    def backend_url(self) -> str:
        return self.backend_api_url + self.backend_webhook_path

    @property
    def store_place(self) -> str:
        """The URL of the store: STORE_URL, or the files in DATA_DIR."""
        return self.store_url or f"file:{self.data_dir}"

    @property
    def listens_on_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def listens_everywhere(self) -> bool:
        return self.host in ("0.0.0.0", "::")  # noqa: S104  # only looked at

    @property
    def local_url(self) -> str:
        """Where a program on this machine reaches the router."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def closed_to_others(self) -> list[str]:
        """What is open to nobody for want of a key, and what to set; a sentence for each."""
        if self.listens_on_loopback:
            return []
        shut = []
        if not self.webhook_hmac_key.get_secret_value():
            without = (
                "Webhooks get 401 without WAHA_API_KEY as X-Api-Key, which WAHA must be set to send"
                if self.waha_api_key.get_secret_value()
                else "Every webhook gets 403"
            )
            shut.append(
                f"{without}: set WEBHOOK_HMAC_KEY here, and the same as WHATSAPP_HOOK_HMAC_KEY at"
                " WAHA (or run connect-waha)."
            )
        if not self.admin_api_key.get_secret_value():
            shut.append("/router/*, /ready and /metrics are shut: set ADMIN_API_KEY.")
        return shut

    @property
    def published_keys(self) -> tuple[str, ...]:
        """The names of the settings whose key anybody could guess."""
        return tuple(
            name.upper()
            for name, value in self
            if isinstance(value, SecretStr) and any(map(is_guessable, split(value)))
        )


def is_guessable(key: str) -> bool:
    """Whether key is in public documents."""
    return re.sub("[^a-z0-9]", "", key.lower()) in _PUBLISHED


@functools.lru_cache(maxsize=1024)  # asked for each call, of a handful of addresses
def is_loopback(host: str) -> bool:
    """127/8, ::1, the same mapped into IPv6, and the name localhost."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def load(env_file: str | None = ".env") -> Settings:
    """The settings; raise StartRefused with a line for each wrong value."""
    settings = _read(env_file)
    if lines := _quoted_lines():
        raise StartRefused("\n".join(lines))
    if settings.published_keys and not settings.listens_on_loopback:
        raise StartRefused(
            "\n".join(
                f"{name}: this key is in public documents, and HOST={settings.host} lets others"
                " call. Make one with: python3 -c 'import secrets;"
                " print(secrets.token_urlsafe(32))'"
                for name in settings.published_keys
            )
        )
    return settings


def _quoted_lines() -> list[str]:
    """A line for each setting whose value is in quotes: `docker --env-file` keeps them."""
    return [
        f"{name}: its value is in quotes, which became a part of it: take them away (docker's"
        " --env-file keeps them)"
        for name, value in os.environ.items()
        if name.lower() in Settings.model_fields
        and len(value) > 1
        and value[0] == value[-1]
        and value[0] in "'\""
    ]


def _read(env_file: str | None) -> Settings:
    try:
        return Settings(_env_file=env_file)  # type: ignore[call-arg]  # pydantic-settings' own
    except UnicodeDecodeError as exc:
        raise StartRefused(f"{env_file}: is not UTF-8 ({exc.reason} at byte {exc.start})") from None
    except ValidationError as exc:
        raw = _raw_values(env_file)
        raise StartRefused(
            "\n".join(_line(error, raw) for error in exc.errors(include_url=False))
        ) from None


def _line(error: Any, raw: dict[str, str]) -> str:
    name = str(error["loc"][0]).upper()
    field = Settings.model_fields[name.lower()]
    given = raw.get(name, "")
    # A URL may hold user:password@ or ?token=.
    secret = field.annotation is SecretStr or "@" in given or ("://" in given and "?" in given)
    shown = "(not shown)" if secret else repr(given)
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}={shown}: {reason}. It is: {field.description} (default {_default(field)})."


def _default(field: Any) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        return "empty"
    if isinstance(value, frozenset):
        return ",".join(sorted(value))
    return str(getattr(value, "value", value)) or "empty"


def _raw_values(env_file: str | None) -> dict[str, str]:
    values = dotenv_values(env_file) if env_file else {}
    merged = {name.upper(): text or "" for name, text in values.items()}
    return merged | {name.upper(): text for name, text in os.environ.items()}
