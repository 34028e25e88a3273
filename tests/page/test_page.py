"""The page over HTTP: who may look, who may act, and what is shown. In a browser:
tests/browser."""

import asyncio
import json
import re
import time
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from fastapi.testclient import TestClient

from gateway.app import create_app
from gateway.domain.lock_events import Kind
from gateway.domain.model import Note
from gateway.metrics import Metrics
from gateway.operations import status
from gateway.operations.traffic import Traffic
from gateway.page import views
from gateway.page.login import COOKIE
from gateway.page.words import LANGUAGES, wanted, words_of
from tests.clients import HOOK, client_of, settings_of
from tests.conftest import LIMITS, wait_until
from tests.messages import ALI, OMAR, SARA, webhook

KEY = "k" * 32
HOME, PATH = "/router/", "/router/page/"
VIEWS = ["/router/", f"{PATH}tenants", f"{PATH}user", f"{PATH}dead-letters", f"{PATH}card"]


def log_in(client: TestClient, key: str = KEY, **more: str) -> Any:
    return client.post(f"{PATH}login", data={"key": key, **more})


def token_of(page: Any) -> str:
    return str(re.findall(r'name="token" value="([^"]+)"', page.text)[0])


def asking(client: TestClient) -> Any:
    """A view with a form."""
    return client.get(f"{PATH}user", params={"user": ALI, "ask": "lock", "to": "2"})


def text_of(page: Any) -> str:
    """What a person reads of it, in one line."""
    main = page.text.partition("<main")[2].partition("</main>")[0].partition(">")[2]
    return " ".join(unescape(re.sub("<[^>]*>", " ", main)).split())


def locked(client: TestClient, who: str) -> int | None:
    answer = client.get(f"/router/user/{who}", headers={"X-Api-Key": KEY})
    tenant: int | None = answer.json()["locked_to_tenant"]
    return tenant


@pytest.mark.parametrize("path", [*VIEWS, f"{PATH}card/2.svg"])
def test_with_a_key_nothing_is_shown_without_a_login(tmp_path: Path, path: str) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        for cookie in (None, "", "x", "a.b.c"):
            client.cookies.clear()
            if cookie is not None:
                client.cookies.set(COOKIE, cookie)
            answer = client.get(path)
            assert answer.status_code == 401
            assert 'type="password"' in answer.text
            assert "<nav>" not in answer.text


def test_the_key_opens_every_view_and_comes_back_to_where_one_was(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=f"new-{KEY},{KEY}") as client:
        wrong = log_in(client, "K" * 32)
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers
        right = log_in(client, next=f"{PATH}user?user=%2B971")
        assert (right.status_code, right.headers["location"]) == (303, f"{PATH}user?user=%2B971")
        reported = right.headers["set-cookie"].lower()
        for part in ("httponly", "samesite=strict", "path=/router/", "max-age=43200"):
            assert part in reported
        assert "secure" not in reported
        assert KEY not in reported
        for path in VIEWS:
            assert client.get(path).status_code == 200, path
    with client_of(tmp_path / "other", admin_api_key="o" * 32) as other:
        other.cookies.set(COOKIE, client.cookies[COOKIE])
        assert other.get(HOME).status_code == 401, "another key ends the visit"
    with client_of(tmp_path / "again", admin_api_key=KEY) as again:
        again.cookies.set(COOKIE, client.cookies[COOKIE])
        assert again.get(HOME).status_code == 401, "it was signed with the new one"


async def test_many_wrong_keys_are_not_even_compared(tmp_path: Path) -> None:
    app = create_app(settings_of(tmp_path, admin_api_key=KEY), limits=LIMITS)
    async with app.router.lifespan_context(app):
        way = httpx.ASGITransport(app, client=("testclient", 1))
        async with httpx.AsyncClient(transport=way, base_url="http://localhost") as client:

            async def guess(key: str) -> int:
                answer = await client.post(f"{PATH}login", data={"key": key})
                return answer.status_code

            reported = await asyncio.gather(*(guess("wrong") for _ in range(30)))
            assert (reported.count(401), reported.count(429)) == (10, 20)
            assert await guess(KEY) == 303


def test_a_page_of_a_login_goes_on_while_the_key_is_changed(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        log_in(client)
        login, token = client.cookies[COOKIE], token_of(client.get(HOME))
    with client_of(tmp_path, admin_api_key=f"new-{KEY},{KEY}") as client:
        client.cookies.set(COOKIE, login)
        order = {"user": ALI, "do": "lock", "from": "", "to": "2", "token": token}
        assert client.post(f"{PATH}user", data=order).status_code == 303
        assert locked(client, ALI) == 2


def test_who_leaves_is_out_and_a_wrong_key_costs_no_way(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        wrong = log_in(client, "wrong", next=f"{PATH}tenants")
        assert f'name="next" value="{PATH}tenants"' in wrong.text
        log_in(client)
        login, token = client.cookies[COOKIE], token_of(client.get(HOME))
        client.cookies.clear()
        client.cookies.set(COOKIE, login)
        assert client.get(HOME).status_code == 200
        left = client.post(f"{PATH}log-out", data={"token": token})
        assert left.headers["location"] == HOME
        other_end = login[:-1] + chr(ord(login[-1]) + 1)  # base64: the same signature, perhaps
        for cookie in (login, f"{login}=", other_end):
            client.cookies.clear()
            client.cookies.set(COOKIE, cookie)
            assert client.get(HOME).status_code == 401, "the cookie is of no use any more"
        again = client.post(f"{PATH}log-out", data={"token": token})
        assert (again.status_code, again.headers["location"]) == (303, HOME)


@pytest.mark.parametrize("query", ["lang=fa&path=x", "lang=fa&query=y", "lang=fa&lang=ar&name=z"])
def test_whatever_is_in_the_address_the_language_is_chosen(tmp_path: Path, query: str) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        assert client.get(f"{HOME}?{query}").status_code == 303


def form_of(page: Any) -> dict[str, str]:
    """What a question's Yes sends."""
    asked = page.text.split("alertdialog")[1].split("</form>")[0]
    return dict(re.findall(r'name="(\w+)" value="([^"]*)"', asked))


def test_a_client_of_another_session_stays_one(tmp_path: Path) -> None:
    """The same number may have a lock in each of them."""
    with client_of(tmp_path, handler=refusing) as client:
        client.post(HOOK, content=webhook("start_realty_2", bare_id="1"))
        client.post(HOOK, content=webhook("start_realty_7", session="sales", bare_id="2"))
        letters(client, 2)
        page = client.get(f"{PATH}dead-letters", params={"tenant": "7"}).text
        (link,) = re.findall(rf'href="({PATH}user\?[^"]*)"', page)
        shown = client.get(unescape(link))
        assert "Belongs to office 7" in text_of(shown)
        assert "(sales)" in text_of(shown)
        number = re.findall(r"letters\?id=(\d+)", page)[0]
        one = client.get(f"{PATH}dead-letters", params={"id": number}).text
        assert unescape(re.findall(rf'href="({PATH}user\?[^"]*)"', one)[0]) == unescape(link)
        asked = {"user": ALI, "session": "sales", "ask": "replay"}
        done = client.post(
            f"{PATH}dead-letters", data=form_of(client.get(f"{PATH}dead-letters", params=asked))
        )
        assert "session=sales" in done.headers["location"]
        assert "count=1" in done.headers["location"]
        asked = {"user": ALI, "session": "sales", "ask": "unlock"}
        client.post(f"{PATH}user", data=form_of(client.get(f"{PATH}user", params=asked)))
        assert locked(client, ALI) == 2, "the other one was meant"


@pytest.mark.parametrize(
    "path",
    [
        f"{PATH}login",
        f"{PATH}log-out",
        f"{PATH}static/page.css",
        "https://evil.example",
        "//evil.example",
        "/\\evil",
        "/router/",
        "/x",
        "",
        "javascript:",
    ],
)
def test_a_log_in_leads_nowhere_but_to_the_page(tmp_path: Path, path: str) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        assert log_in(client, next=path).headers["location"] == HOME


def test_behind_a_proxy_that_ends_tls_the_cookie_is_secure(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        headers = {"X-Forwarded-Proto": "https"}
        answer = client.post(f"{PATH}login", data={"key": KEY}, headers=headers)
        assert "secure" in answer.headers["set-cookie"].lower()


def test_a_login_ends_after_twelve_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        log_in(client)
        monkeypatch.setattr("gateway.page.login.SECONDS", -1)
        assert client.get(HOME).status_code == 401


def test_an_order_needs_the_token_of_its_own_login(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        client.post(HOOK, content=webhook("start_realty_2"))
        log_in(client)
        others = token_of(client.get(HOME))
        log_in(client)
        order = {"user": ALI, "do": "unlock", "from": "2"}
        for token in ("", "x", others):
            refused = client.post(f"{PATH}user", data=order | {"token": token})
            assert refused.status_code == 403, token
        token = token_of(client.get(HOME))
        cross = {"Sec-Fetch-Site": "cross-site"}
        answer = client.post(f"{PATH}user", data=order | {"token": token}, headers=cross)
        assert answer.status_code == 403
        assert log_in(client).status_code == 303
        assert client.post(f"{PATH}login", data={"key": KEY}, headers=cross).status_code == 403
        assert locked(client, ALI) == 2
        client.get(f"{PATH}user", params=order | {"token": token})
        assert locked(client, ALI) == 2, "GET orders nothing"
        for odd in (b"\xff", b"a", b"a=b&" * 60, b"x" * 70_000):
            assert client.post(f"{PATH}user", content=odd).status_code in (400, 403, 413)


def test_without_a_key_this_machine_looks_and_acts_by_the_page_alone(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        client.post(HOOK, content=webhook("start_realty_2"))
        page = client.get(HOME)
        assert page.status_code == 200
        assert "Log out" not in page.text
        order = {"user": ALI, "do": "unlock", "from": "2"}
        assert client.post(f"{PATH}user", data=order).status_code == 403
        done = client.post(f"{PATH}user", data=order | {"token": token_of(asking(client))})
        assert done.status_code == 303
        assert locked(client, ALI) is None


def test_every_answer_forbids_what_the_page_does_not_need(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        answers = [client.get(HOME), log_in(client, "no")]
        log_in(client)
        answers += [client.get(path) for path in VIEWS]
        answers.append(client.get(f"{PATH}dead-letters?id=1"))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-frame-options"] == "DENY"
        assert not re.search(r"\s(?:on[a-z]+|style)=|<script>|<style", answer.text)


def test_a_client_is_found_in_any_spelling_moved_and_unlocked(tmp_path: Path) -> None:
    with client_of(tmp_path, admin_api_key=KEY) as client:
        client.post(HOOK, content=webhook("start_realty_2"))
        log_in(client)
        for spelled in ("+971 50 123-4567", "00971501234567", "٩٧١٥٠١٢٣٤٥٦٧", f"\u2066{ALI}\u2069"):
            page = client.get(f"{PATH}user", params={"user": spelled})
            assert "Belongs to office 2" in text_of(page), spelled
        nobody = client.get(f"{PATH}user", params={"user": "call me"})
        assert nobody.status_code == 422
        assert "is no phone number" in text_of(nobody)
        asked = client.get(f"{PATH}user", params={"user": ALI, "ask": "lock", "to": "۵"})
        assert f"Let all that {ALI} writes from now on go to office 5 ?" in text_of(asked)
        assert locked(client, ALI) == 2, "it was only asked"
        token = token_of(asked)
        order = {"user": ALI, "do": "lock", "from": "2", "to": "5", "token": token}
        moved = client.post(f"{PATH}user", data=order)
        page = client.get(moved.headers["location"])
        assert "Done: the client belongs to office 5 ." in text_of(page)
        assert "Moved from office 2 to office 5" in text_of(page)
        assert locked(client, ALI) == 5
        again = client.post(f"{PATH}user", data=order)
        assert "has changed meanwhile" in text_of(client.get(again.headers["location"]))
        order = {"user": ALI, "do": "unlock", "from": "5", "token": token}
        gone = client.post(f"{PATH}user", data=order)
        assert "the lock is taken away" in text_of(client.get(gone.headers["location"]))
        gone = client.post(f"{PATH}user", data=order | {"from": ""})
        assert "There was no lock" in text_of(client.get(gone.headers["location"]))


@pytest.mark.parametrize(
    ("who", "to", "reported"),
    [
        (ALI, "9", "Office 9 is not in tenants.json"),
        (ALI, "3", "Office 3 is inactive"),
        (ALI, "0", "An office is a number from 1"),
        (ALI, "2147483648", "An office is a number from 1"),
        ("971557357753", "2", "is the gateway's own number"),
    ],
)
def test_nobody_is_moved_to_where_there_is_no_office(
    tmp_path: Path, who: str, to: str, reported: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tenants.json").write_text('{"2": {}, "3": {"active": false}}')
    with client_of(tmp_path) as client:
        order = {"user": who, "do": "lock", "to": to, "token": token_of(asking(client))}
        page = client.get(client.post(f"{PATH}user", data=order).headers["location"])
        assert reported in text_of(page)
        assert "alertdialog" not in page.text, "there is nothing to say yes to"
        assert locked(client, who) is None


def refusing(_: httpx.Request) -> httpx.Response:
    return httpx.Response(422, text="no <such> listing")


def letters(client: TestClient, count: int, **asked: Any) -> list[Any]:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        answer = client.get("/router/dead-letters", params=asked, headers={"X-Api-Key": KEY})
        found: list[Any] = answer.json()["dead_letters"]
        if len(found) == count:
            return found
    raise AssertionError(found)


def test_dead_letters_are_shown_replayed_and_deleted(tmp_path: Path) -> None:
    with client_of(tmp_path, handler=refusing) as client:
        client.post(HOOK, content=webhook("start_realty_2 <b>Hello</b>", bare_id="1"))
        client.post(HOOK, content=webhook("start_realty_3", SARA, bare_id="2"))
        client.post(HOOK, content=webhook("start_realty_3", OMAR, bare_id="3"))
        found = letters(client, 3)
        page = client.get(f"{PATH}dead-letters", params={"tenant": "2"})
        assert ALI in page.text
        assert SARA not in page.text
        one = next(letter for letter in found if letter["tenant_id"] == 2)
        shown = text_of(client.get(f"{PATH}dead-letters", params={"id": one["id"]}))
        assert "start_realty_2 <b>Hello</b>" in shown
        assert "no <such> listing" in shown
        token = token_of(page)
        order = {"do": "delete", "id": one["id"], "token": token}
        gone = client.post(f"{PATH}dead-letters", data=order)
        assert "Done: deleted" in text_of(client.get(gone.headers["location"]))
        assert client.get(f"{PATH}dead-letters", params={"id": one["id"]}).status_code == 404
        order = {"do": "replay_all", "tenant": "3", "user": "", "token": token}
        again = client.post(f"{PATH}dead-letters", data=order)
        assert again.headers["location"] == f"{PATH}dead-letters?tenant=3&done=replayed&count=2"
        assert "Done: 2 on their way again" in text_of(client.get(again.headers["location"]))
        for odd in (
            {"do": "replay_all", "tenant": "x"},
            {"do": "replay"},
            {"do": "replay", "id": "0"},
            {"do": "replay", "id": "abc"},
            {"do": "delete"},
            {"do": ""},
            {},
        ):
            assert (
                client.post(f"{PATH}dead-letters", data=odd | {"token": token}).status_code == 400
            )
        letters(client, 2)  # refused once more
        assert text_of(client.get(f"{PATH}dead-letters", params={"tenant": "9"})).endswith(
            "its turn."
        )


def test_offices_are_sorted_found_and_paged(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    named = {str(number): {"name": f"Office {number:03}"} for number in range(1, 251)}
    (tmp_path / "data" / "tenants.json").write_text(json.dumps(named))
    with client_of(tmp_path) as client:
        client.post(HOOK, content=webhook("start_realty_77"))

        def shown(**asked: str) -> list[int]:
            page = client.get(f"{PATH}tenants", params=asked).text
            return list(map(int, re.findall(r'<th scope="row">(\d+)</th>', page)))

        assert shown()[:3] == [77, 1, 2], "the most clients first"
        assert shown(sort="number") == list(range(1, 101))
        assert shown(sort="number", **{"from": "200"}) == list(range(201, 251))
        assert shown(sort="name", find="office 12") == list(range(120, 130))
        assert shown(find="۷۷") == [77]
        assert shown(find="nothing") == []
        assert shown(sort="number", **{"from": "5000"}) == [250]
        assert shown(sort="evil", **{"from": "9" * 30})[:1] == [77]


def test_a_link_and_its_card(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entries = '{"2": {"name": "Marina"}, "3": {"active": false, "gateway_phone": "971500000001"}}'
    (tmp_path / "data" / "tenants.json").write_text(entries)
    with client_of(tmp_path) as client:
        page = client.get(f"{PATH}card", params={"tenant": "2", "text": "سلام"})
        address = "https://wa.me/971557357753?text=start_realty_2%0A%D8%B3%D9%84%D8%A7%D9%85"
        assert f'href="{address}"' in page.text
        assert page.text.count("<svg") == 1
        assert "Marina" in text_of(page)
        assert "is inactive" in text_of(client.get(f"{PATH}card", params={"tenant": "3"}))
        assert client.get(f"{PATH}card", params={"tenant": "4"}).status_code == 422
        assert client.get(f"{PATH}card", params={"tenant": "x"}).status_code == 422
        long = client.get(f"{PATH}card", params={"tenant": "2", "text": "س" * 1000})
        assert "too long for a QR code" in text_of(long)
        for name, begins in (("2.svg", b"<?xml"), ("2.png", b"\x89PNG")):
            drawn = client.get(f"{PATH}card/{name}")
            assert drawn.content.startswith(begins)
            assert f'filename="office-{name}"' in drawn.headers["content-disposition"]
        for name in ("4.svg", "x.svg", "2.gif", "2"):
            assert client.get(f"{PATH}card/{name}").status_code == 404


def test_what_is_shown_when_the_store_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.errors import StoreUnavailable
    from gateway.store.files.store import FileStore

    async def fails(*_: object, **__: object) -> None:
        raise StoreUnavailable("the disk is on fire")

    with client_of(tmp_path) as client:
        for name in ("lock_of", "backlog"):
            monkeypatch.setattr(FileStore, name, fails)
        answer = client.get(f"{PATH}user", params={"user": ALI})
        assert answer.status_code == 503
        assert "cannot answer now: the disk is on fire" in text_of(answer)
        assert "What waits is not to be known now" in text_of(client.get(HOME))


def test_the_language_is_the_readers(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        german = client.get(HOME, headers={"Accept-Language": "de, fa;q=0.9, en;q=0.5"})
        assert '<html lang="fa" dir="rtl">' in german.text
        chosen = client.get(f"{PATH}tenants?sort=name&lang=ar")
        assert chosen.headers["location"] == f"{PATH}tenants?sort=name"
        assert '<html lang="ar" dir="rtl">' in client.get(HOME).text
        assert '<html lang="ar"' in client.get(f"{HOME}?lang=xx").text
    assert wanted(None, "") == "en"


def test_every_language_has_every_word() -> None:
    """And the same values in it; none is missing, and none is left over."""
    english = words_of("en")._words
    for language in LANGUAGES:
        words = words_of(language)._words
        assert list(words) == list(english)
        for name, text in words.items():
            fields = sorted(re.findall(r"\{(\w+)\}", text))
            assert fields == sorted(re.findall(r"\{(\w+)\}", english[name])), (language, name)
    said = {*status.SENTENCES, *(f"status.{level.name.lower()}" for level in status.Level)}
    said |= {f"history.{one.value}" for one in (*Kind, *Note)}
    said |= {"history.merged_none"}
    said |= {f"message.{where}" for where in ("waiting", "held", "dead_letter", "unreadable")}
    assert said <= english.keys()
    source = "".join(
        path.read_text("utf-8")
        for path in Path("gateway/page").rglob("*")
        if path.suffix in (".html", ".py")
    )
    named = set(re.findall(r"""\b(?:w|words)\(["']([a-z_.]*[a-z])["']""", source))
    assert named <= english.keys()
    templates = "".join(re.findall(r"[^\s]+", source))
    composed = {f"nav.{name}" for name in re.findall(r'\("(\w+)","/router/', templates)}
    composed |= {f"tenant.{name}" for name in (*views._SORTS, "inactive", "unknown")}
    composed |= {f"figure.{name}" for name in ("users", "tenants", "waiting", "held", "dead")}
    composed |= {
        f"done.{name}" for name in re.findall(r'"(\w+)" if |done="(\w+)"', source) for name in name
    }
    composed |= {f"unit.{name}" for name in ("day", "hour", "minute", "second")}
    composed |= {"trouble.unavailable", "trouble.not_allowed", "done.no_lock"}
    composed |= {f"user.{name}" for name in ("no_tenant", "inactive", "own_number", "ask_unlock")}
    assert english.keys() - said - named - composed == set()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7300, "2 h"), (1e6, "11 d")],
)
def test_how_long_something_lasts(seconds: float, shown: str) -> None:
    lasting = words_of("en").lasting(seconds)
    assert re.sub("<[^>]*>", "", lasting) == shown
    assert "۲" in words_of("fa").lasting(7300)


def test_values_are_escaped_in_every_sentence() -> None:
    reported = words_of("ar")("store.refusing", why="<script>")
    assert "<bdi>&lt;script&gt;</bdi>" in reported


def test_an_hour_of_minutes() -> None:
    metrics = Metrics()
    traffic = Traffic(metrics)
    assert len(traffic.minutes()) == 60
    for outcome in ("locked", "moved", "routed", "duplicate", "ignored", "unknown_user"):
        metrics.webhook(outcome, 0.1)
    metrics.recovered("routed")
    metrics.recovered("duplicate")
    metrics.attempted("delivered", 0.1)
    assert traffic.minutes()[-1] == (5, 1)
    traffic.turn()
    assert traffic.minutes()[-2:] == [(5, 1), (0, 0)]
    metrics.webhook("routed", 0.1)
    for _ in range(59):
        traffic.turn()
    assert traffic.minutes()[0] == (1, 0)
    traffic.turn()
    assert sum(minute.came for minute in traffic.minutes()) == 0


async def test_each_minute_of_the_hour_ends() -> None:
    metrics = Metrics()
    traffic = Traffic(metrics, clock=lambda: 59.99)  # each is almost over
    metrics.webhook("routed", 0.1)
    traffic.start()
    await wait_until(lambda: traffic.minutes()[-3].came == 1)
    traffic.stop()


def test_on_redis_the_page_shows_the_same(tmp_path: Path, redis_socket: str) -> None:
    redis.Redis(unix_socket_path=redis_socket).flushall()  # of what other tests have left in it
    with client_of(tmp_path, store_url=f"unix:{redis_socket}", handler=refusing) as client:
        client.post(HOOK, content=webhook("start_realty_2", bare_id="R1"))
        letters(client, 1)
        assert "Belongs to office 2" in text_of(client.get(f"{PATH}user", params={"user": ALI}))
        order = {"user": ALI, "do": "lock", "from": "2", "to": "5"}
        order["token"] = token_of(asking(client))
        assert "done=locked" in client.post(f"{PATH}user", data=order).headers["location"]
        page = text_of(client.get(f"{PATH}user", params={"user": ALI}))
        assert "Moved from office 2 to office 5" in page
        assert "undelivered" in page
        assert "wait for a decision: 1" in text_of(client.get(HOME))
        for path in VIEWS:
            assert client.get(path).status_code == 200, path
