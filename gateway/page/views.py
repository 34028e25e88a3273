"""The page's views. Each is drawn whole on the server; page.js only keeps the overview fresh."""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup
from starlette.responses import Response
from starlette.routing import Route

from gateway.domain import phone_numbers
from gateway.domain.lock_events import Kind, Why
from gateway.domain.model import (
    LARGEST_TENANT,
    SESSION_NAME,
    Backlog,
    HistoryEntry,
    Selection,
    TenantId,
    Totals,
    UserId,
    scoped,
    session_of,
    unscoped,
)
from gateway.errors import BadBody, NotLockable, TooLongForQr
from gateway.lifecycle import Components
from gateway.operations.status import Finding, Level, backlog_of
from gateway.operations.traffic import MINUTES
from gateway.page.layout import HEADERS, HOME, PATH, Layout, Login, see_other
from gateway.page.words import Words
from gateway.settings import Settings
from gateway.tenants import qr
from gateway.waha import events

_ROWS = 100  # of a table, on one page
_MERGES = (Why.MERGED_INTO.value, Why.MERGED_FROM.value)
_LOCKS = tuple(
    one.value for one in (Kind.LOCKED, Kind.MOVED, Kind.MERGED, Kind.IMPORTED)
)  # that give one
_MESSAGES = 20  # of a user, of all that are kept
_SHOWN = 300  # characters of a message
_SORTS: dict[str, Callable[["_Row"], Any]] = {
    "number": lambda row: row.number,
    "name": lambda row: (row.name == "", phone_numbers.fold(row.name)),
    "users": lambda row: -row.totals.users,
    "delivered": lambda row: -row.totals.delivered,
    "waiting": lambda row: -row.totals.waiting,
    "dead": lambda row: -row.totals.dead,
    "last": lambda row: -(row.totals.last_seen or 0.0),
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A tenant. state: "inactive", "unknown" (to tenants.json) or empty."""

    number: TenantId
    name: str
    state: str
    totals: Totals


class Page:
    def __init__(self, components: Components, *, layout: Layout, settings: Settings) -> None:
        self._store = components.store
        self._actions = components.actions
        self._status = components.status
        self._tenants = components.tenants
        self._sessions = components.sessions
        self._traffic = components.traffic
        self._links = components.links
        self._layout = layout
        self._settings = settings

    def routes(self) -> list[Route]:
        route = self._layout.route
        return [
            *self._layout.routes(),
            route("GET", HOME, self._overview),
            route("GET", f"{PATH}tenants", self._tenants_view),
            route("GET", f"{PATH}user", self._user),
            route("POST", f"{PATH}user", self._act_on_user),
            route("GET", f"{PATH}dead-letters", self._dead_letters),
            route("POST", f"{PATH}dead-letters", self._act_on_dead_letters),
            route("GET", f"{PATH}card", self._card),
            route("GET", f"{PATH}card/{{file}}", self._card_file),
        ]

    async def _overview(self, login: Login) -> Response:
        backlog = await backlog_of(self._store)
        findings = self._status.findings(backlog)
        known = backlog if isinstance(backlog, Backlog) else None
        worst = max((finding.level for finding in findings), key=lambda level: level.value)
        users, tenants = self._store.totals()
        figures = {"users": users, "tenants": tenants}
        if known:
            figures |= {"waiting": known.waiting, "held": known.held, "dead": known.dead}
        minutes = self._traffic.minutes()
        return self._layout.show(
            login,
            "overview.html",
            worst=worst.name.lower(),
            troubles=[
                _notice(login.words, finding)
                for finding in findings
                if finding.level is not Level.OK
            ],
            rest=[
                _notice(login.words, finding) for finding in findings if finding.level is Level.OK
            ],
            figures=figures,
            minutes=minutes,
            most=max(max(minute) for minute in minutes) or 1,
            width=MINUTES,
            came=sum(minute.came for minute in minutes),
            delivered=sum(minute.delivered for minute in minutes),
        )

    async def _tenants_view(self, login: Login) -> Response:
        find, sort = login.asked("find"), login.asked("sort")
        number, folded = _number(find, most=LARGEST_TENANT), phone_numbers.fold(find)
        sort = sort if sort in _SORTS else "users"
        totals = await self._store.tenant_totals()

        def rows_that_fit() -> tuple[list[_Row], list[_Row]]:
            rows = self._rows(totals)
            fit = [
                row
                for row in rows
                if folded in phone_numbers.fold(row.name) or row.number == number
            ]
            return rows, sorted(fit, key=_SORTS[sort])

        rows, fits = await asyncio.to_thread(rows_that_fit)  # of a hundred thousand it takes long
        first = min(_number(login.asked("from"), most=10**9) or 0, max(0, len(fits) - 1))
        return self._layout.show(
            login,
            "tenants.html",
            find=find,
            rows=fits[first : first + _ROWS],
            count=len(fits),
            any=bool(rows),
            sort=sort,
            sorts=list(_SORTS),
            most=max((row.totals.users for row in rows), default=0) or 1,
            before=first and max(0, first - _ROWS),
            first=first,
            next=first + _ROWS if first + _ROWS < len(fits) else None,
        )

    def _rows(self, totals: Mapping[TenantId, Totals]) -> list[_Row]:
        rows, listed = [], self._tenants.listed or {}
        for number in sorted({*totals, *listed}):
            tenant = self._tenants.get(number)
            state = "unknown" if tenant is None else "" if tenant.active else "inactive"
            name = tenant.name if tenant else ""
            rows.append(_Row(number, name, state, totals.get(number, Totals())))
        return rows

    async def _user(self, login: Login) -> Response:
        text, session = login.asked("user"), login.asked("session")
        sessions = {self._settings.waha_session: None, **self._sessions.all()}
        if session:
            sessions[session] = None
        common: dict[str, Any] = {"text": text, "session": session, "sessions": [*sessions]}
        who = self._person(text, session)
        if who is None:
            wrong = login.words("user.no_user", text=text[:60]) if text else None
            return self._layout.show(
                login, "find.html", 422 if wrong else 200, wrong=wrong, **common
            )
        known, lock = await self._store.lock_of(who)
        before = _number(login.asked("before"))
        history = await self._store.history(known, limit=21, before=before)
        summary = await self._store.summary(known, limit=_MESSAGES)
        ask, to = login.asked("ask"), _number(login.asked("to"), most=LARGEST_TENANT)
        wrong = self._why_no_lock(login.words, known, to) if ask == "lock" else None
        return self._layout.show(
            login,
            "user.html",
            user=unscoped(known),
            ids=[unscoped(one) for one in summary.ids],
            tenant=lock.tenant,
            name=self._name_of(lock.tenant),
            since=None if before else next((x.at for x in history if x.kind in _LOCKS), None),
            history=[(entry, _history(login.words, entry)) for entry in history[:20]],
            older=history[19].id if len(history) > 20 else None,
            messages=[(one, _text(one.body)) for one in summary.messages],
            more=summary.waiting + summary.held + summary.dead_letters - len(summary.messages),
            held=summary.held,
            ask=ask if not wrong and (ask == "lock" or (ask == "unlock" and lock.tenant)) else None,
            to=to,
            wrong=wrong,
            done=_done(login),
            **common,
        )

    async def _act_on_user(self, login: Login) -> Response:
        form = login.form
        who = self._person(form.get("user", ""), form.get("session", ""))
        if who is None:
            raise BadBody(f"{form.get('user', '')[:60]!r} is no user")
        back = {"user": unscoped(who), "session": form.get("session", "")}
        _, lock = await self._store.lock_of(who)
        if form.get("from", "") != str(lock.tenant or ""):
            # The answer was to a question of another time.
            return see_other(f"{PATH}user", **back, done="changed")
        if form.get("do") == "unlock":
            _, tenant, _ = await self._actions.unlock(who)
            return see_other(f"{PATH}user", **back, done="unlocked" if tenant else "no_lock")
        to = _number(form.get("to", ""), most=LARGEST_TENANT)
        if to is None or self._why_no_lock(login.words, who, to):
            # The view says why.
            return see_other(f"{PATH}user", **back, ask="lock", to=form.get("to", ""))
        await self._actions.lock(who, TenantId(to))
        return see_other(f"{PATH}user", **back, done="locked", tenant=to)

    async def _dead_letters(self, login: Login) -> Response:
        number = _number(login.asked("id"))
        if number is not None:
            dead_letter = await self._store.dead_letter(number)
            if dead_letter is None:
                gone = login.words("dead_letter.gone")
                return self._layout.show(login, "trouble.html", 404, text=gone)
            return self._layout.show(
                login,
                "dead_letter.html",
                dead_letter=dead_letter,
                user=self._shown(dead_letter.user),
                text=_text(dead_letter.body or b""),
                answer=dead_letter.answer.decode("utf-8", "replace"),
                ask=login.asked("ask") == "delete",
            )
        which, common = self._selection(login.request.query_params)
        before = _number(login.asked("before"))
        found = await self._store.dead_letters(which, limit=_ROWS + 1, before=before)
        return self._layout.show(
            login,
            "dead_letters.html",
            dead_letters=[(one, self._shown(one.user)) for one in found[:_ROWS]],
            older=found[_ROWS - 1].id if len(found) > _ROWS else None,
            ask=login.asked("ask") == "replay" and bool(found),
            done=_done(login),
            **common,
        )

    async def _act_on_dead_letters(self, login: Login) -> Response:
        form = login.form
        which, asked = self._selection(form)
        number, todo = _number(form.get("id", "")), form.get("do")
        if todo == "delete" and number:
            count = await self._actions.delete_dead_letters(Selection(id=number))
            return see_other(f"{PATH}dead-letters", done="deleted" if count else "")
        if todo == "replay" and number:
            count = await self._actions.replay(Selection(id=number))
            return see_other(f"{PATH}dead-letters", done="replayed", count=count)
        if todo == "replay_all" and not asked["wrong"]:
            count = await self._actions.replay(which)
            stored = {name: asked[name] for name in ("tenant", "user", "session")}
            return see_other(f"{PATH}dead-letters", **stored, done="replayed", count=count)
        raise BadBody("say what is to be done, and with which message")

    async def _card(self, login: Login) -> Response:
        number = _number(login.asked("tenant"), most=LARGEST_TENANT)
        text, wrong, code = login.asked("text")[:1000], None, None
        link = self._links.of(TenantId(number), text) if number else None
        if login.asked("tenant") and not number:
            wrong = login.words("user.bad_tenant")
        elif number and link is None:
            wrong = login.words("user.no_tenant", tenant=number)
        elif link:
            try:
                # In a thread: a large one takes a tenth of a second.
                drawn = await asyncio.to_thread(qr.inline, link.url)
                code = Markup(drawn)  # noqa: S704  # modules alone, no text
            except TooLongForQr:
                wrong = login.words("card.too_long")
        return self._layout.show(
            login,
            "card.html",
            422 if wrong else 200,
            number=number or "",
            text=text,
            wrong=wrong,
            link_=link,
            code=code,
            query=urlencode({"text": text}) if text else "",
        )

    async def _card_file(self, login: Login) -> Response:
        stem, _, kind = login.request.path_params["file"].partition(".")
        number, text = _number(stem, most=LARGEST_TENANT), login.asked("text")[:1000]
        kinds = {"svg": (qr.svg, "image/svg+xml"), "png": (qr.png, "image/png")}
        link = self._links.of(TenantId(number), text) if number else None
        if link is None or kind not in kinds:
            code = login.words("trouble.not_found")
            return self._layout.show(login, "trouble.html", 404, text=code)
        draw, media = kinds[kind]
        try:
            drawn = await asyncio.to_thread(draw, link.url, size=512)
        except TooLongForQr:
            code = login.words("card.too_long")
            return self._layout.show(login, "trouble.html", 422, text=code)
        name = f'attachment; filename="office-{number}.{kind}"'
        return Response(drawn, 200, {**HEADERS, "Content-Disposition": name}, media)

    # what they need

    def _person(self, text: str, session: str) -> UserId | None:
        known = phone_numbers.person(text, gateway_phone=self._settings.gateway_phone)
        home = self._settings.waha_session
        if known is None or (session and not re.fullmatch(SESSION_NAME, session)):
            return None
        return scoped(session or home, known, home)

    def _shown(self, user: UserId) -> dict[str, str]:
        """What leads to a user: number, and session where it is not the home one."""
        home = self._settings.waha_session
        session = session_of(user, home)
        return {"number": unscoped(user), "session": "" if session == home else session}

    def _name_of(self, tenant: TenantId | None) -> str:
        known = self._tenants.get(tenant) if tenant else None
        return known.name if known else ""

    def _why_no_lock(self, words: Words, user: UserId, tenant: int | None) -> Markup | None:
        """Why user cannot be locked to tenant; None if there is no reason."""
        if tenant is None:
            return words("user.bad_tenant")
        try:
            self._actions.check_lock(user, TenantId(tenant))
        except NotLockable as exc:
            which = {"user": unscoped(user)} if exc.why == "own_number" else {"tenant": tenant}
            return words(f"user.{exc.why}", **which)
        return None

    def _selection(self, asked: Mapping[str, str]) -> tuple[Selection, dict[str, Any]]:
        """Which dead letters are asked for; and as it was asked, with what of it is `wrong`:
        "tenant", "user" or nothing."""
        notice = {name: asked.get(name, "").strip() for name in ("tenant", "user", "session")}
        tenant = _number(notice["tenant"], most=LARGEST_TENANT)
        user = self._person(notice["user"], notice["session"])
        wrong = ""
        if notice["tenant"] and tenant is None:
            wrong = "tenant"
        elif notice["user"] and user is None:
            wrong = "user"
        which = Selection(tenant=TenantId(tenant) if tenant else None, user=user)
        return Selection(id=0) if wrong else which, {**notice, "wrong": wrong}  # 0: there is none


def _text(body: bytes) -> str:
    """The beginning of what the person wrote, or empty."""
    text = events.text_of(body)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _number(text: str, *, most: int = 2**63 - 1) -> int | None:
    """A whole number from 1 to most, in digits of any script; None if text is none."""
    found = int(text) if text.isdecimal() and len(text) < 20 else 0
    return found if 1 <= found <= most else None


def _notice(words: Words, finding: Finding) -> Markup:
    values = dict(finding.values)
    if isinstance(seconds := values.get("seconds"), float):
        values["seconds"] = words.lasting(seconds)
    if finding.session:
        values["session"] = finding.session
    return words(finding.code, **values)


def _history(words: Words, entry: HistoryEntry) -> Markup:
    name = f"history.{entry.kind}"
    # Of a merge with a person who was erased since, only the kind is left.
    is_merge = entry.kind == Kind.MERGED.value or entry.why in _MERGES
    if is_merge and entry.to_tenant is None:
        name = "history.merged_none"
    return words(name, to=entry.to_tenant, old=entry.from_tenant)


def _done(login: Login) -> Markup | None:
    """What an order has just brought about."""
    name = f"done.{login.asked('done')}"
    if not login.words.has(name):
        return None
    values = {key: _number(login.asked(key)) or 0 for key in ("tenant", "count")}
    return login.words(name, **values)
