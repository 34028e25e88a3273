"""What we ask of WAHA: which phone a LID is, to send a text, what a session's status and setup are,
which messages it has.

Source: WAHA docs of July 2026, "Contacts" (API - lids), "Send messages", "Sessions"; statuses from
WAHA's source at 2026.2.1: 422 after 10-15 s while the session is not WORKING, 400 from NOWEB
without its store, 501 for what an engine cannot do.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from gateway.errors import WahaError, WahaRefused, WahaSilent, WahaUnavailable
from gateway.waha import events

TIMEOUT_SECONDS = 20.0  # WAHA takes up to 15 s to say that a session is not WORKING
_CONNECT_SECONDS = 5.0
_ANSWER_BYTES = 1_048_576
_MESSAGES_BYTES = 67_108_864  # of a hundred messages with their previews
_CONNECTIONS = 32
_REFUSALS = frozenset({400, 401, 403, 404, 405, 501})  # the same call would get the same answer
_NOT_DONE = frozenset({422, 429, 503})  # other 5xx: an engine may have failed after it sent


# What a proxy in front says of a WAHA that is not there (RFC 9110, 15.6; Cloudflare's 52x).
PROXY_STATUSES = frozenset({502, 503, 504, 530, *range(520, 528)})


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What WAHA says of a session. own_ids: of its number; config: empty if it has none."""

    status: str | None
    own_ids: frozenset[str]
    config: dict[str, Any]


class Waha:
    """url: WAHA's API with its /api. key: sent as X-Api-Key, none if empty."""

    def __init__(
        self, url: str, key: str, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._url = url
        self._client = httpx.AsyncClient(
            # Bytes: httpx refuses a text outside ASCII.
            headers={b"X-Api-Key": key.encode()} if key else {},
            # The shorter ones show whether WAHA can have heard us at all.
            timeout=httpx.Timeout(TIMEOUT_SECONDS, connect=_CONNECT_SECONDS, pool=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=_CONNECTIONS),
            transport=transport,
            trust_env=False,
        )

    async def phone_of(self, session: str, lid: str) -> str | None:
        """The phone behind `…@lid`; None where WAHA does not know it.

        Raise WahaRefused if asking again is of no use, else WahaUnavailable.
        """
        number = lid.removesuffix("@lid")
        answer = await self._call("GET", f"/{_quoted(session)}/lids/{number}%40lid")
        found = events.person(answer.get("pn")) if isinstance(answer, dict) else None
        return None if found is None or found.endswith("@lid") else found

    async def send_text(self, session: str, chat_id: str, text: str) -> None:
        """Raise WahaRefused or WahaUnavailable if it was surely not sent, WahaSilent if perhaps."""
        body = {"session": session, "chatId": chat_id, "text": text}
        await self._call("POST", "/sendText", body)

    async def session(self, name: str) -> dict[str, Any]:
        """Its name, status, config (an object or null), me, engine …; WahaRefused if there is none
        of that name, or what is answered is no session."""
        answer = await self._call("GET", f"/sessions/{_quoted(name)}")
        if not isinstance(answer, dict) or not isinstance(answer.get("config"), dict | None):
            raise WahaRefused(f"{self._url}/sessions/{name}: what it answers is no session", 200)
        return answer

    async def session_info(self, name: str) -> SessionInfo:
        """The session's status; fails as session() does."""
        found = await self.session(name)
        me = found.get("me")
        shown = me if isinstance(me, dict) else {}
        ids = [one for key in ("id", "lid") if (one := events.person(shown.get(key)))]
        config = found.get("config")
        return SessionInfo(
            events.status(found.get("status")),
            frozenset(ids),
            config if isinstance(config, dict) else {},
        )

    async def uptime(self) -> float | None:
        """Seconds for which WAHA itself has run; None if it does not say (a narrowed key gets 403).

        Raise WahaUnavailable if it does not answer.
        """
        try:
            answer = await self._call("GET", "/server/status")
        except WahaRefused:
            return None
        uptime = answer.get("uptime") if isinstance(answer, dict) else None  # milliseconds
        if not isinstance(uptime, int | float) or isinstance(uptime, bool) or uptime < 0:
            return None
        return uptime / 1000

    async def messages(
        self, session: str, *, since: int, until: int | None, limit: int, offset: int
    ) -> list[dict[str, Any]]:
        """Up to limit incoming messages of all chats that were sent from `since` until `until`
        (Unix seconds, both included), from the offset-th on, as a `message` event's payload has
        them. Oldest first where WAHA knows sortOrder, else newest first; messages of one second
        be in the order in which they came, either way.

        Some may be left out of a page: the list ends where a page is empty. Raise WahaRefused where
        the engine cannot say (WEBJS; NOWEB without its store).
        """
        path = f"/{_quoted(session)}/chats/all/messages"
        path += f"?limit={limit}&offset={offset}&downloadMedia=false"
        path += "&sortBy=timestamp&sortOrder=asc"
        path += f"&filter.timestamp.gte={since}&filter.fromMe=false"
        path += "" if until is None else f"&filter.timestamp.lte={until}"
        answer = await self._call("GET", path, most=_MESSAGES_BYTES)
        if not isinstance(answer, list):
            raise WahaRefused(f"{self._url}{path}: what it answers is no list", 200)
        return [one for one in answer if isinstance(one, dict)]

    async def message(self, session: str, message_id: str) -> dict[str, Any]:
        """The payload of one message, its media fetched anew if WAHA has deleted them.

        message_id: as the webhook has it. WEBJS and WPP find a message by its chat and whole id,
        NOWEB and GOWS by either. Raise WahaRefused with status 404 if it is gone.
        """
        pieces = message_id.split("_")
        chat = pieces[1] if len(pieces) > 2 else "all"
        path = f"/{_quoted(session)}/chats/{_quoted(chat)}/messages/{_quoted(message_id)}"
        answer = await self._call("GET", f"{path}?downloadMedia=true", most=_MESSAGES_BYTES)
        if not isinstance(answer, dict):
            raise WahaRefused(f"{self._url}{path}: what it answers is no message", 200)
        return answer

    async def set_config(self, session: str, config: dict[str, Any]) -> None:
        """Replace the session's whole config. WAHA stops and starts a running session for it."""
        body = {"name": session, "config": config}
        await self._call("PUT", f"/sessions/{_quoted(session)}", body)

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(
        self, method: str, path: str, body: Any = None, *, most: int = _ANSWER_BYTES
    ) -> Any:
        url = self._url + path
        try:
            async with (
                asyncio.timeout(TIMEOUT_SECONDS),
                self._client.stream(method, url, json=body) as response,
            ):
                status, answer = response.status_code, await _beginning(response, most)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise WahaUnavailable(
                f"{url}: no connection ({str(exc) or type(exc).__name__})"
            ) from exc
        except (httpx.HTTPError, OSError, TimeoutError) as exc:
            raise WahaSilent(f"{url}: no answer ({str(exc) or type(exc).__name__})") from exc
        if not 200 <= status < 300:
            raise _failure(url, status, answer)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            return None


def _quoted(name: str) -> str:
    """As a part of a path: a session's name may hold a blank."""
    return quote(name, safe="")


async def _beginning(response: httpx.Response, most: int) -> bytes:
    read = bytearray()
    async for chunk in response.aiter_bytes():
        read += chunk
        if len(read) > most:
            break
    return bytes(read)


def _failure(url: str, status: int, answer: bytes) -> WahaError:
    text = f"{url}: {status} {' '.join(answer[:200].decode('utf-8', 'replace').split())!a}"
    if status in _REFUSALS:
        return WahaRefused(text, status)
    return (WahaUnavailable if status in _NOT_DONE else WahaSilent)(text, status)
