"""doctor: looks at the router from inside and outside, a line for each thing, the cure with it."""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from gateway.cli.connect import cure, session_cure, wanted
from gateway.domain.model import Address
from gateway.errors import StartRefused, StoreUnavailable, WahaError
from gateway.settings import WEBHOOK_PATH, Settings, misspelt_names, split
from gateway.store.files import opening
from gateway.store.redis.scripts import open_scripts
from gateway.tenants.registry import FILE_NAME, Tenants
from gateway.waha import events, webhook_config
from gateway.waha.client import Waha

_SECONDS = 10.0  # for one answer
_CLOCK_SECONDS = 5.0  # of difference; links and signatures are judged by time
_SILENT_SECONDS = 6 * 3600.0  # without an event: WORKING proves nothing
_FREE_BYTES, _LEAST_BYTES = 2 * 1024**3, 512 * 1024**2
_REMOTE = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "ceph", "glusterfs")  # fsync is a guess there
_MEMORY = ("tmpfs", "ramfs")
_TAKE_A_VOLUME = "mount a volume or a folder of the host there, as docker-compose.yml does"
_HOW_TO_CONNECT = (
    "python whatsapp_router.py connect-waha; but where WHATSAPP_HOOK_URL sets it for all sessions"
    " (docker-compose.yml does), fix it there"
)
_MOST_BACKENDS = 20  # of tenants' own that are called


class Verdict(Enum):
    OK = "ok   "
    MIND = "mind "  # may be meant
    WRONG = "WRONG"


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    what: str
    detail: str
    cure: str = ""

    def __str__(self) -> str:
        arrow = f" -> {self.cure}" if self.cure else ""
        return f"{self.verdict.value} {self.what}: {self.detail}{arrow}"


def ok(what: str, detail: str) -> Finding:
    return Finding(Verdict.OK, what, detail)


def warn(what: str, detail: str, cure: str) -> Finding:
    return Finding(Verdict.MIND, what, detail, cure)


def fail(what: str, detail: str, cure: str) -> Finding:
    return Finding(Verdict.WRONG, what, detail, cure)


async def examine(settings: Settings, url: str | None) -> int:
    """Print what is found; 1 if something is wrong. url: how WAHA reaches this router."""
    status = 0
    async for finding in findings(settings, url):
        print(finding, flush=True)
        status |= finding.verdict is Verdict.WRONG
    return status


async def findings(settings: Settings, url: str | None) -> AsyncIterator[Finding]:
    for finding in _access(settings):
        yield finding
    for finding in _folder(settings):
        yield finding
    if _on_redis(settings):
        async for finding in _redis(settings.store_place):
            yield finding
    addresses = [Address(settings.backend_url)]
    try:
        listed = Tenants(settings.data_dir / FILE_NAME).listed
        detail = "none: every number is a tenant" if listed is None else f"{len(listed)} tenants"
        yield ok(FILE_NAME, detail)
        addresses += [one.address for one in (listed or {}).values() if one.address]
    except StartRefused as exc:
        yield fail(FILE_NAME, str(exc), "fix it: the next start would be refused")
    async with httpx.AsyncClient(timeout=_SECONDS, trust_env=False) as client:
        report = _RouterReport()
        for what, part in (
            ("router", _router(client, settings, report)),
            ("WAHA", _waha(client, settings, url, report)),
        ):
            try:
                async for finding in part:
                    yield finding
            except Exception as exc:  # whatever it is, the other things are looked at
                yield fail(what, f"what answers there is not it ({exc!a:.200})", "see who listens")
        urls = list(dict.fromkeys(one.url for one in addresses))
        for backend in urls[:_MOST_BACKENDS]:
            yield await _backend(client, backend)
        if (left := len(urls) - _MOST_BACKENDS) > 0:
            yield warn("backends", f"{left} more were not called", "try them by hand")


def _access(settings: Settings) -> Iterator[Finding]:
    yield ok("settings", "every value can be used")
    for name, meant in misspelt_names().items():
        yield warn("settings", f"{name} is no setting and changes nothing", f"is {meant} meant?")
    hook = bool(split(settings.webhook_hmac_key))
    key = bool(settings.waha_api_key.get_secret_value())
    admin = bool(split(settings.admin_api_key))
    local = settings.listens_on_loopback
    if hook:
        yield ok("webhook access", "only signed webhooks are let in")
    elif key:
        yield warn(
            "webhook access",
            "the key alone lets a webhook in, no signature",
            "set WEBHOOK_HMAC_KEY",
        )
    elif local:
        yield warn("webhook access", "any program on this machine may post", "set WEBHOOK_HMAC_KEY")
    else:
        yield fail("webhook access", "shut: no key is set", "set WEBHOOK_HMAC_KEY")
    if admin:
        yield ok("admin access", "ADMIN_API_KEY is asked for")
    elif local:
        yield warn(
            "admin access", "any program on this machine may administer", "set ADMIN_API_KEY"
        )
    else:
        yield fail("admin access", "shut: no key is set", "set ADMIN_API_KEY")
    if split(settings.backend_signing_secret):
        yield ok("deliveries", "are signed")
    else:
        yield warn("deliveries", "are not signed: a backend cannot know who sent them",
                   "set BACKEND_SIGNING_SECRET here and there")  # fmt: skip


def _on_redis(settings: Settings) -> bool:
    return not settings.store_place.startswith("file:")


def _folder(settings: Settings) -> Iterator[Finding]:
    what, folder = "data folder", settings.data_dir
    if _on_redis(settings):
        yield ok(what, f"only tenants.json: STORE_URL={settings.store_url.partition(':')[0]}:…")
        return
    if not folder.is_dir():
        yield warn(what, f"{folder} is not there yet", "the first start makes it")
        return
    place = folder.resolve()
    try:
        probe = folder / f".doctor-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as exc:
        yield fail(what, f"{place} cannot be written ({exc.strerror})", "check owner and rights")
        return
    free = shutil.disk_usage(folder).free
    detail = f"{place}, {free / 1024**3:.1f} GB free"
    if free < _LEAST_BYTES:
        yield fail(what, detail, "make room: webhooks are refused")
    elif free < _FREE_BYTES:
        yield warn(what, detail, "make room: below 0.5 GB webhooks are refused")
    else:
        yield ok(what, detail)
    kind = _file_system(place)
    if kind and kind.startswith(_REMOTE):
        yield fail("disk", f"{place} is on {kind}", "take a local disk: locks and fsync need one")
    elif kind in _MEMORY:
        yield fail("disk", f"{place} is on {kind}: memory, gone with a restart", _TAKE_A_VOLUME)
    elif kind == "overlay" and _in_container():
        yield fail("disk", f"{place} is in the container's own layer, gone with it", _TAKE_A_VOLUME)
    else:
        yield ok("disk", kind or "of unknown kind")
    if readable := opening.open_to_others(folder):
        names = ", ".join(sorted(one.name for one in readable))
        yield warn(
            "rights",
            f"other accounts may read {names}: messages and clients",
            f"the next start mends it, or now: chmod -R go-rwx {place}",
        )
    loose = [one.name for one in (folder, *folder.iterdir()) if _open_to_all(one)]
    keys = folder / FILE_NAME
    if keys.exists() and keys.stat().st_mode & stat.S_IROTH and b"whsec_" in keys.read_bytes():
        yield warn("rights", f"any account may read the secrets in {keys}", f"chmod o-r {keys}")
    if loose:
        yield warn(
            "rights", f"any account may change {', '.join(sorted(loose))}", f"chmod -R o-w {place}"
        )


def _in_container() -> bool:
    """Docker, Podman and Kubernetes each leave a mark in theirs."""
    marks = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")
    return any(Path(mark).exists() for mark in marks)


def _open_to_all(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.stat().st_mode & stat.S_IWOTH)
    return False


def _file_system(path: Path) -> str | None:
    """The kind of file system that path is on; None where that is unknown."""
    try:
        mounts = Path("/proc/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1:3] for line in mounts if len(line.split()) > 2]
    on = [(place, kind) for place, kind in found if path.is_relative_to(place)]
    return max(on, key=lambda pair: len(pair[0]))[1] if on else None


@dataclass(slots=True)
class _RouterReport:
    """What the running router says of WAHA's sessions: when an event of each last came (Unix
    seconds), and which send it nothing."""

    last_events: dict[str, float] = field(default_factory=dict)
    unhooked: set[str] = field(default_factory=set)


async def _router(
    client: httpx.AsyncClient, settings: Settings, report: _RouterReport
) -> AsyncIterator[Finding]:
    what = "router"
    base = settings.local_url
    keys = split(settings.admin_api_key)
    headers = {b"X-Api-Key": keys[0].encode()} if keys else {}
    try:
        answer = await client.get(f"{base}/health")
        health = answer.json()
        if health.get("service") != "whatsapp-gateway-router":
            raise ValueError("something else answers there")
    except (httpx.HTTPError, ValueError) as exc:
        yield fail(what, f"{base}/health: {_text_of(exc)}", "start it, or check HOST and PORT")
        return
    try:
        status = await client.get(f"{base}/router/status", headers=headers)
        metrics = await client.get(f"{base}/metrics", headers=headers)
    except httpx.HTTPError as exc:
        yield fail(what, f"{base}/router/status: {_text_of(exc)}", "see its log")
        return
    async for finding in _asked_for_keys(client, settings):
        yield finding
    if status.status_code in (401, 403):
        if keys:
            yield fail(what, f"{base} runs with another ADMIN_API_KEY", "restart it with this one")
        else:
            yield fail(
                what,
                f"{base} does not let us in ({_detail(status)})",
                "set ADMIN_API_KEY for the router, and run this with the same settings",
            )
        return
    if not status.is_success:
        yield fail(what, f"{base}/router/status: {_detail(status)}", "see its log")
        return
    components = status.json()["components"]
    bad = [one for one in components if one["status"] != "OK"]
    users = health["total_locked_users"]
    if health["status"] != "healthy":
        yield fail(what, "it cannot accept webhooks", "see its log")
    for one in bad:
        name = f"{one['component']} {one['session'] or ''}".strip()
        cure = "see the log, and docs/operating.md, When something is wrong"
        yield fail(what, f"{name} is {one['status']}: {one['text']}", cure)
    if not bad and health["status"] == "healthy":
        yield ok(what, f"{base} is ready, {users} users locked")
    name = "gateway_waha_session_last_event_timestamp_seconds"
    for family in text_string_to_metric_families(metrics.text):
        if family.name == name:
            report.last_events = {one.labels["session"]: one.value for one in family.samples}
    report.unhooked = {one["session"] for one in bad if one["component"] == "waha_webhook"}


def _detail(answer: httpx.Response) -> str:
    try:
        return f"{answer.status_code}, {answer.json()['detail']}"[:300]
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)


async def _asked_for_keys(client: httpx.AsyncClient, settings: Settings) -> AsyncIterator[Finding]:
    """Whether the router that runs asks for the keys that are set: it may be older than they."""
    base, restart = settings.local_url, "restart it"
    if split(settings.admin_api_key) and (await client.get(f"{base}/ready")).is_success:
        yield fail("admin access", "the running router does not ask for ADMIN_API_KEY", restart)
    if split(settings.webhook_hmac_key):
        unsigned = await client.post(f"{base}{WEBHOOK_PATH}", content=b"{}")
        if unsigned.status_code not in (401, 403):
            yield fail("webhook access", "the running router takes unsigned webhooks", restart)


async def _waha(
    client: httpx.AsyncClient, settings: Settings, url: str | None, report: _RouterReport
) -> AsyncIterator[Finding]:
    name = settings.waha_session
    ping = re.sub("/api$", "", settings.waha_api_url) + "/ping"
    try:
        answer = await client.get(ping)
    except httpx.HTTPError as exc:
        yield fail("WAHA", f"{ping}: {_text_of(exc)}", "is WAHA running, is WAHA_API_URL right?")
        return
    if answer.is_success:
        yield ok("WAHA", f"{ping} answers {answer.status_code}")
    else:
        yield fail("WAHA", f"{ping} answers {answer.status_code}", "see WAHA's log, and what is"
                    " in front of it")  # fmt: skip
    yield _clock("clock, WAHA's", answer)
    waha = Waha(settings.waha_api_url, settings.waha_api_key.get_secret_value())
    try:
        session = await waha.session(name)
    except WahaError as exc:
        yield fail(f"session {name}", str(exc), cure(exc))
        return
    finally:
        await waha.close()
    status = session.get("status")
    if status == "WORKING":
        yield ok(f"session {name}", "WORKING")
    elif status == "STARTING":
        yield warn(f"session {name}", status, session_cure(status))
    else:
        yield fail(f"session {name}", str(status), session_cure(str(status)))
    for finding in _number(session, settings):
        yield finding
    last = report.last_events.get(name)
    yield _silence(name, last)
    sends = bool(last) and name not in report.unhooked
    for finding in _webhook(session, settings, url, sends=sends):
        yield finding


def _number(session: dict[str, Any], settings: Settings) -> Iterator[Finding]:
    """Links and cards name GATEWAY_PHONE: with another number they lead clients elsewhere."""
    me = session.get("me")
    own = events.person(me.get("id")) if isinstance(me, dict) else None
    if own is None:
        return
    if own == settings.gateway_phone:
        yield ok("number", f"links name {own}, which the session has")
    else:
        cure = f"set GATEWAY_PHONE={own}, or gateway_phone of tenants who have another number"
        yield fail("number", f"links name {settings.gateway_phone}, the session has {own}", cure)


def _silence(session: str, last: float | None) -> Finding:
    what = f"events of {session}"
    if last is None:
        return warn(
            what, "none since the router's start", "write to the number, and run this again"
        )
    age = time.time() - last
    detail = f"the last {age:.0f} s ago"
    if age > _SILENT_SECONDS:
        return warn(what, detail, "write to the number: WORKING does not prove that events come")
    return ok(what, detail)


def _webhook(
    session: dict[str, Any], settings: Settings, url: str | None, *, sends: bool
) -> Iterator[Finding]:
    """sends: an event came to the router since the session began, so some webhook there is."""
    what, want = "webhook", wanted(settings, url)
    if isinstance(want, str):
        yield warn(what, "not looked at", want)
        return
    config = session.get("config")
    left = webhook_config.faults(config if isinstance(config, dict) else {}, want)
    for fault in left:
        if fault.startswith("no webhook") and sends:
            yield warn(
                what,
                f"{fault} in the session, yet events come: WHATSAPP_HOOK_URL sets one for all"
                " sessions, which WAHA's API does not show",
                "look there for its key and for retries of an hour",
            )
        else:
            yield fail(what, fault, _HOW_TO_CONNECT)
    if not left:
        yield ok(what, f"once, to {want.url}, with what it needs")


async def _backend(client: httpx.AsyncClient, url: str) -> Finding:
    """A GET: only that somebody answers matters, and by which clock."""
    what = f"backend {url}"
    try:
        async with client.stream("GET", url) as answer:
            found = _clock(what, answer)
    except (httpx.HTTPError, ValueError) as exc:  # ValueError: IDNA
        do = "start it, or fix its URL"
        if "//localhost" in url and _in_container():
            do = "in a container localhost is the container itself: name the service"
        return fail(what, _text_of(exc), do)
    if answer.status_code >= 500:
        return fail(what, f"answers {answer.status_code} to a GET", "see its log")
    if answer.is_redirect:
        return fail(
            what,
            f"answers {answer.status_code}, Location: {answer.headers.get('location', '')[:200]!a}",
            "a delivery follows no redirect: set its URL to where it leads",
        )
    return found if found.verdict is not Verdict.OK else ok(what, "answers")


def _clock(what: str, answer: httpx.Response) -> Finding:
    """By the answer's Date (RFC 9110, 6.6.1), which has whole seconds."""
    try:
        ahead = time.time() - parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return warn(what, "it does not say its time", "compare the clocks by hand")
    return _compared(what, ahead)


def _compared(what: str, ahead: float) -> Finding:
    """ahead: by how many seconds our clock is."""
    if abs(ahead) > _CLOCK_SECONDS:
        return fail(what, f"this machine is {ahead:+.0f} s off it", "let both keep time by NTP")
    return ok(what, "agrees with ours")


async def _redis(url: str) -> AsyncIterator[Finding]:
    """Whether STORE_URL can be used, and what time it is there: things are due by that clock."""
    try:
        found = await open_scripts(url)
    except StartRefused as exc:
        yield fail("Redis", str(exc), "the next start would be refused")
        return
    try:
        ahead = time.time() - await found.time()
        yield ok("Redis", "answers, and can be used")
        yield _compared("clock, Redis'", ahead)
    except StoreUnavailable as exc:
        yield fail("Redis", str(exc), "look at its log")
    finally:
        await found.close()


def _text_of(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__
