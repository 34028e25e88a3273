"""data/tenants.json, where there is one: who the tenants are, and where their messages go.

{"2": {"name": "Marina Homes", "active": true, "backend_url": "https://…", "signing_secret":
"whsec_…", "gateway_phone": "971557357753", "note": "…"}}. Every field may be left out. Without the
file every number is a tenant.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from gateway.domain.model import LARGEST_TENANT, Address, Tenant, TenantId
from gateway.errors import StartRefused
from gateway.settings import HttpUrl, Phone, SigningSecrets, split

FILE_NAME = "tenants.json"
_CHECK_SECONDS = 1.0  # a change is read once the file has looked the same at two looks

log = logging.getLogger(__name__)

# Persian and Arabic names hold them: joiners and non-joiners, and direction marks.
_IN_NAMES = dict.fromkeys(map(ord, "\u200c\u200d\u200e\u200f"))

_Stamp = tuple[int, int, int]  # a file that was rewritten has another one


def _some_text(value: str) -> str:
    if not value.translate(_IN_NAMES).isprintable():
        raise ValueError("must be of one line, without control characters")
    return value


_Text = Annotated[str, Field(max_length=200), AfterValidator(_some_text)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    name: _Text = ""
    active: bool = True
    backend_url: HttpUrl | None = None
    signing_secret: SigningSecrets | None = None
    gateway_phone: Phone | None = None
    note: _Text = ""

    def tenant(self) -> Tenant:
        secrets = split(self.signing_secret or SecretStr(""))
        if secrets and not self.backend_url:
            raise ValueError("signing_secret: signs what goes to a backend_url, which is missing")
        address = Address(self.backend_url, secrets) if self.backend_url else None
        return Tenant(self.name, self.active, address, self.gateway_phone, self.note)


class Tenants:
    """What the file says, taken up within seconds of a change.

    trouble: why what holds is older than the file; a file that is broken or gone changes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        """Raise StartRefused, with place and cure, if the file is broken. path None: no file."""
        self.trouble: str | None = None
        self._listeners: list[Callable[[], None]] = []
        self._path = path
        self._all: Mapping[TenantId, Tenant] | None = None  # None: there is no file
        self._stamp: _Stamp | None = None
        self._watching: asyncio.Task[None] | None = None
        if path and (stamp := _stamp(path)):
            self._take(_read(path), stamp)

    @property
    def listed(self) -> Mapping[TenantId, Tenant] | None:
        """All tenants of the file, None without one."""
        return self._all

    def get(self, tenant: TenantId) -> Tenant | None:
        """None: unknown. Without a file every number is known."""
        return Tenant() if self._all is None else self._all.get(tenant)

    def may_lock(self, tenant: TenantId) -> bool:
        """Whether users may be locked to tenant: it is known and active."""
        return self.refusal(tenant) is None

    def refusal(self, tenant: TenantId) -> Literal["no_tenant", "inactive"] | None:
        """Why users may not be locked to tenant."""
        known = self.get(tenant)
        if known is None:
            return "no_tenant"
        return None if known.active else "inactive"

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call listener after each change from now on."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Log what there is, and follow changes of the file from now on."""
        self._log_listed()
        if self._path:
            self._watching = asyncio.create_task(self._follow_file(self._path))

    def stop(self) -> None:
        if self._watching:
            self._watching.cancel()

    async def _follow_file(self, path: Path) -> None:
        before = self._stamp
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                stamp = await asyncio.to_thread(_stamp, path)
                if stamp == before and (stamp != self._stamp or self.trouble):
                    await self._read_again(path, stamp)
                before = stamp
            except Exception as exc:  # whatever it is, the file must be looked at again
                self._in_trouble(str(exc) if isinstance(exc, StartRefused) else f"{path}: {exc}")

    async def _read_again(self, path: Path, stamp: _Stamp | None) -> None:
        if stamp is None:
            if self._all is not None:
                self._in_trouble(f"{path} is gone: put it back, or restart to do without it")
            else:
                self.trouble = None  # a broken one was there for a while
            self._stamp = None
            return
        try:
            found = await asyncio.to_thread(_read, path)
        except StartRefused as exc:
            self._in_trouble(str(exc))
            return
        if self.trouble:
            log.warning("%s can be used again", path, extra={"event": "tenants.healed"})
            self.trouble = None
        if found != self._all:
            self._take(found, stamp)
            self._log_listed()
        self._stamp = stamp

    def _in_trouble(self, reason: str) -> None:
        if reason != self.trouble:
            log.error(
                "%s. What it said before still holds", reason, extra={"event": "tenants.failed"}
            )
        self.trouble = reason

    def _take(self, found: Mapping[TenantId, Tenant], stamp: _Stamp) -> None:
        self._all, self._stamp = found, stamp
        for listener in self._listeners:
            listener()

    def _log_listed(self) -> None:
        if self._all is not None:
            log.info(
                "📇 %s: %s tenants, %s of them inactive, %s with a backend of their own",
                self._path,
                len(self._all),
                sum(not one.active for one in self._all.values()),
                sum(one.address is not None for one in self._all.values()),
                extra={"event": "tenants.read", "count": len(self._all)},
            )


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StartRefused(f"{path}: cannot be looked at ({exc.strerror})") from exc
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[TenantId, Tenant]:
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once)
    except OSError as exc:
        raise StartRefused(f"{path}: cannot be read ({exc.strerror}): check its rights") from exc
    except (ValueError, RecursionError) as exc:
        raise StartRefused(f"{path}: not JSON, or cut off ({str(exc)[:200]}): fix it") from exc
    if not isinstance(found, dict):
        raise StartRefused(f'{path}: must hold an object such as {{"2": {{"name": "…"}}}}: fix it')
    return {_number(path, key): _tenant(path, key, entry) for key, entry in found.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is twice in one object")
    return found


def _number(path: Path, key: str) -> TenantId:
    if not re.fullmatch("[1-9][0-9]{0,9}", key) or int(key) > LARGEST_TENANT:
        raise StartRefused(f"{path}: {key[:60]!r} is no tenant: a number of 1-{LARGEST_TENANT}")
    return TenantId(int(key))


def _tenant(path: Path, key: str, entry: object) -> Tenant:
    try:
        return _Entry.model_validate(entry).tenant()
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        place = ".".join(map(str, error["loc"])) or "its entry"
        reason = str(error["msg"]).removeprefix("Value error, ")
    except ValueError as exc:
        place, _, reason = str(exc).partition(": ")
    raise StartRefused(f"{path}: tenant {key}: {place}: {reason}: fix it")
