"""The frame around every view: who may look, in which language, and how it is drawn."""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import jinja2
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from gateway import VERSION
from gateway.api import bodies
from gateway.api.brake import Brake
from gateway.api.guard import LIMIT
from gateway.api.refusals import Refusals
from gateway.errors import BadBody, BadSignature, GatewayError
from gateway.page.login import COOKIE, SECONDS, PageAccess, check_site
from gateway.page.words import LANGUAGES, Words, wanted, words_of

HOME = "/router/"
PATH = "/router/page/"
LOGOUT = f"{PATH}log-out"
_VIEW = re.compile(rf"{PATH}(?:tenants|user|dead-letters|card)(?:[/?].*)?|{HOME}\?.*")
_LANGUAGE_COOKIE = "gateway_language"
_YEAR_SECONDS = 365 * 24 * 3600
_FOLDER = Path(__file__).parent
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
HEADERS = {
    # Nothing comes from elsewhere, nothing inline, and nobody frames it.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self';"
    " img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "Cache-Control": "no-store",
    # With no-referrer a form of ours would send `Origin: null`, as a stranger's does.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Login:
    """One call, by somebody who may make it."""

    request: Request
    words: Words
    id: str
    form: Mapping[str, str] = field(default_factory=dict)  # of a POST

    def asked(self, name: str) -> str:
        return self.request.query_params.get(name, "").strip()


View = Callable[[Login], Awaitable[Response]]


class Layout:
    def __init__(self, access: PageAccess, brake: Brake, refusals: Refusals) -> None:
        self._access = access
        self._brake = brake
        self._refusals = refusals
        self._static = {path.name: path.read_bytes() for path in (_FOLDER / "static").iterdir()}
        self._stamp = hashlib.sha256(b"".join(self._static.values())).hexdigest()[:12]

    def routes(self) -> list[Route]:
        """What the frame answers itself."""
        return [
            Route(HOME.rstrip("/"), _to_home, methods=["GET"]),
            Route(f"{PATH}login", self._log_in, methods=["POST"]),
            self.route("POST", LOGOUT, self._log_out),
            Route(f"{PATH}static/{{file}}", self._file, methods=["GET"]),
        ]

    def route(self, method: str, path: str, view: View) -> Route:
        """A view for those who may look; a POST must carry the login's token."""
        return Route(path, self._guarded(view), methods=[method])

    def show(self, login: Login, template: str, status: int = 200, **values: Any) -> Response:
        """The template in the frame, with these values."""
        token = self._access.token(login.id)
        return self._draw(login.request, login.words, template, status, token=token, **values)

    def _guarded(self, view: View) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            chosen = request.query_params.get("lang")
            if request.method == "GET" and chosen in LANGUAGES:
                return self._speak(request, chosen)
            words = _words(request)
            try:
                login = Login(request, words, self._access.login(request))
                if request.method == "POST":
                    check_site(request)
                    form = await _form(request)
                    self._access.check_token(login.id, form.get("token", ""))
                    login = Login(request, words, login.id, form)
                return await view(login)
            except BadSignature:
                if request.url.path == LOGOUT:
                    return see_other(HOME)  # it is over already
                if request.headers.get("sec-fetch-site") == "cross-site":
                    # A link on another site brings no SameSite=Strict cookie along; our own does.
                    return self._draw(request, words, "again.html")
                return self._ask_for_the_key(request, words, wrong=False)
            except GatewayError as exc:
                return self._trouble(request, words, exc)

        return answer

    def _trouble(self, request: Request, words: Words, exc: GatewayError) -> Response:
        status = self._refusals.answer(request, exc).status_code
        name = "trouble.unavailable" if status == 503 else "trouble.not_allowed"
        said = words(name, why=exc)
        return self._draw(request, words, "trouble.html", status, text=said)

    async def _log_in(self, request: Request) -> Response:
        words, form = _words(request), {}
        try:
            check_site(request)
            form = await _form(request)
            login = self._access.log_in(form.get("key", ""))
        except GatewayError as exc:
            held = await self._brake.hold(request, exc)
            if not isinstance(held, BadSignature):
                return self._trouble(request, words, held)
            self._refusals.answer(request, held)  # the operator finds it in the log
            return self._ask_for_the_key(request, words, wrong=True, then=form.get("next", ""))
        answer = see_other(_own_path(form.get("next", "")))
        _set_cookie(request, answer, COOKIE, login, SECONDS)
        return answer

    def _ask_for_the_key(
        self, request: Request, words: Words, *, wrong: bool, then: str | None = None
    ) -> Response:
        """then: where to go on; None: where it was asked for."""
        if then is None:
            then = _with_query(request.url.path, request.query_params)
        return self._draw(request, words, "login.html", 401, wrong=wrong, then=_own_path(then))

    async def _log_out(self, login: Login) -> Response:
        self._access.log_out(login.id)
        answer = see_other(HOME)
        answer.delete_cookie(COOKIE, path=HOME, httponly=True, samesite="strict")
        return answer

    def _speak(self, request: Request, language: str) -> Response:
        left = {name: text for name, text in request.query_params.items() if name != "lang"}
        answer = see_other(request.url.path, **left)
        _set_cookie(request, answer, _LANGUAGE_COOKIE, language, _YEAR_SECONDS)
        return answer

    async def _file(self, request: Request) -> Response:
        name = request.path_params["file"]
        if name not in self._static:
            return Response(status_code=404)
        headers = {"Cache-Control": "max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(self._static[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    def _draw(
        self, request: Request, words: Words, template: str, status: int = 200, **values: Any
    ) -> Response:
        here = request.url.path if request.method == "GET" else HOME
        query = {name: text for name, text in request.query_params.items() if name != "done"}
        text = TEMPLATES.get_template(template).render(
            w=words,
            languages=LANGUAGES,
            here=here,
            link=lambda **changes: _with_query(here, {**query, **changes}),
            static=f"{PATH}static/",
            stamp=self._stamp,
            version=VERSION,
            user_link=lambda who: _with_query(
                f"{PATH}user", {"user": who["number"], "session": who["session"]}
            ),
            has_key=self._access.has_key,
            time=time_of,
            **({"token": None} | values),
        )
        # What WAHA or a backend says may hold half an emoji.
        return Response(text.encode("utf-8", "replace"), status, HEADERS, "text/html")


async def _to_home(_: Request) -> Response:
    return RedirectResponse(HOME, 308)


def _words(request: Request) -> Words:
    chosen = request.cookies.get(_LANGUAGE_COOKIE)
    return words_of(wanted(chosen, request.headers.get("accept-language", "")))


async def _form(request: Request) -> dict[str, str]:
    """A form's fields, once each; raise BadBody."""
    try:
        body = await bodies.read(request, request.receive, LIMIT)
        return dict(parse_qsl(body.decode("ascii"), strict_parsing=bool(body), max_num_fields=50))
    except ValueError as exc:
        raise BadBody("this is no form of the page") from exc


def _set_cookie(request: Request, answer: Response, name: str, value: str, seconds: int) -> None:
    # Behind a proxy that ends TLS, which says so. Who says so himself only hurts himself.
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    answer.set_cookie(
        name, value, seconds, path=HOME, httponly=True, samesite="strict", secure=secure
    )


def _own_path(path: str) -> str:
    """path, if it is one of the page's views; else its home."""
    plain = path.isascii() and path.isprintable() and "\\" not in path
    return path if plain and _VIEW.fullmatch(path) else HOME


def see_other(path: str, /, **query: object) -> Response:
    """What follows an order: the view at path, to be fetched by GET."""
    return RedirectResponse(_with_query(path, query), 303, {"Cache-Control": "no-store"})


def _with_query(path: str, query: Mapping[str, object]) -> str:
    """path with these parameters; one that is empty or None is left out."""
    left = {name: value for name, value in query.items() if value not in ("", None)}
    return f"{path}?{urlencode(left)}" if left else path


def time_of(seconds: float | None) -> Markup:
    """In the reader's zone, by page.js; without it in UTC."""
    if seconds is None:
        return Markup("")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(
        at.strftime("%Y-%m-%dT%H:%M:%SZ"), at.strftime("%Y-%m-%d %H:%M")
    )
