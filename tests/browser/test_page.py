"""The page as a person sees it: keyboard, phone, print, three languages, wrong keys, evil names.

SCREENS=docs/screens keeps a picture of each view (make screens).
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from playwright.async_api import BrowserContext, Page, expect

from gateway.page.words import words_of
from tests.browser.conftest import ALI, EVIL, KEY, OMAR, SARA, TENANTS, Office, Reader, watched
from tests.conftest import FakeBackend, wait_until
from tests.e2e.router import running

VIEWS = {
    "overview": "",
    "tenants": "page/tenants",
    "user": f"page/user?user={SARA}",
    "ask": f"page/user?user={ALI}&ask=lock&to=5",
    "letters": "page/dead-letters",
    "card": "page/card?tenant=3",
}


async def overflows(page: Page) -> bool:
    """Whether one must scroll to the side."""
    script = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    return bool(await page.evaluate(script))


@pytest.mark.parametrize("language", ["en", "ar", "fa"])
async def test_every_view_in_every_language(
    reader: Reader, office: Office, language: str, tmp_path: Path
) -> None:
    place = Path(os.environ.get("SCREENS") or tmp_path)
    page, words = reader.page, words_of(language)
    await page.set_viewport_size({"width": 1080, "height": 720})
    await page.goto(f"{office.page}?lang={language}")
    await page.screenshot(path=place / f"login-{language}.png")
    await reader.log_in(office)
    for view, path in VIEWS.items():
        await page.set_viewport_size({"width": 1080, "height": 720})
        await page.goto(office.page + path)
        assert await page.get_attribute("html", "dir") == words.direction
        assert await page.locator("main h1").count() == 1
        await page.screenshot(path=place / f"{view}-{language}.png", full_page=True)
        await page.set_viewport_size({"width": 360, "height": 740})  # a phone
        assert not await overflows(page), view
    await page.goto(office.page)
    await page.screenshot(path=place / f"phone-{language}.png")


async def test_a_wrong_key_opens_nothing_and_the_right_one_leads_on(
    reader: Reader, office: Office
) -> None:
    page = reader.page
    await page.goto(f"{office.page}page/user?user={ALI}")
    await page.fill("input[name=key]", "wrong")
    await page.press("input[name=key]", "Enter")
    await expect(page.get_by_role("alert")).to_contain_text("This is not the key")
    assert await page.context.cookies() == []
    await page.fill("input[name=key]", KEY)
    await page.press("input[name=key]", "Enter")
    await expect(page.locator("h1")).to_have_text(ALI)
    (cookie,) = await page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert await page.evaluate("document.cookie") == ""
    await page.get_by_role("button", name="Log out").click()
    await expect(page.locator("input[name=key]")).to_be_visible()
    await page.goto(f"{office.page}page/tenants")
    await expect(page.locator("input[name=key]")).to_be_visible()


async def tab_to(page: Page, name: str) -> None:
    """Press Tab until the thing of that name has the focus."""
    for _ in range(80):
        await page.keyboard.press("Tab")
        script = "(document.activeElement.innerText || document.activeElement.name || '').trim()"
        if await page.evaluate(script) == name:
            return
    raise AssertionError(f"{name!r} is not to be reached by Tab")


async def test_a_client_is_moved_by_keyboard_alone(reader: Reader, office: Office) -> None:
    page = reader.page
    await page.goto(office.page)
    await expect(page.locator("input[name=key]")).to_be_focused()
    await page.keyboard.type(KEY)
    await page.keyboard.press("Enter")
    await page.wait_for_selector("h1.status")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await tab_to(page, "Find a client")
    await page.keyboard.press("Enter")
    await expect(page.locator("input[name=user]")).to_be_focused()
    await page.keyboard.type("+971 50 123 4567")
    await page.keyboard.press("Enter")
    await expect(page.locator(".big")).to_contain_text("Belongs to office 2")
    await tab_to(page, "to")
    await page.keyboard.type("5")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alertdialog")).to_contain_text("go to office 5?")
    await page.keyboard.press("Enter")  # the question has the focus: this says nothing
    await expect(page.get_by_role("alertdialog")).to_be_focused()
    await tab_to(page, "Yes")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("status")).to_contain_text("belongs to office 5")
    await tab_to(page, "Take the lock away")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alertdialog")).to_contain_text("goes to nobody")
    await tab_to(page, "No")
    await page.keyboard.press("Enter")
    await expect(page.locator(".big")).to_contain_text("Belongs to office 5")


async def test_evil_names_and_texts_are_only_shown(reader: Reader, office: Office) -> None:
    page = reader.page
    tenants = office.router.folder / "data" / "tenants.json"
    tenants.write_text(json.dumps(TENANTS | {"7": {"name": EVIL, "note": EVIL}}), "utf-8")
    await reader.log_in(office)
    for _ in range(100):  # the file is looked at every second
        await page.goto(f"{office.page}page/tenants")
        if await page.get_by_text(EVIL).count():
            break
    await expect(page.get_by_text(EVIL)).to_be_visible()
    await page.goto(f"{office.page}page/dead-letters?user={OMAR}")
    await page.get_by_role("link", name="Show").click()
    await expect(page.get_by_text(f"REFUSE {EVIL}")).to_be_visible()
    await expect(page.locator("pre")).to_contain_text(EVIL)
    for path in (
        f"page/user?user={EVIL}",
        f"page/dead-letters?tenant={EVIL}",
        f"page/tenants?find={EVIL}",
        f"page/card?tenant=7&text={EVIL}",
        f"?{EVIL}",
    ):
        await page.goto(office.page + path)
        assert await page.locator("img, main script").count() == 0, path


async def test_a_dead_letter_is_delivered_again(reader: Reader, office: Office) -> None:
    page = reader.page
    await reader.log_in(office)
    await page.get_by_role("link", name="Undelivered").click()
    await expect(page.locator(".dead-letters > li")).to_have_count(2)
    office.backend.answer = lambda _: 200
    office.backend.received.clear()
    await page.get_by_role("link", name="Deliver all of these again").click()
    await page.get_by_role("button", name="Yes").click()
    await expect(page.get_by_role("status")).to_contain_text("2 on their way again")
    await wait_until(lambda: sum(b"REFUSE" in one.body for one in office.backend.received) == 2)
    await page.reload()
    await expect(page.locator("main")).to_contain_text("every message was delivered")


async def test_the_overview_keeps_itself_fresh_and_says_when_it_cannot(
    reader: Reader, office: Office, context: BrowserContext
) -> None:
    page = reader.page
    await page.clock.install()
    await reader.log_in(office)
    users = page.locator(".figures dd").first
    before = int(await users.inner_text())
    await page.get_by_text("What else was looked at").click()
    await page.locator("#figures a").first.focus()
    await office.say("start_realty_2", "971509999999")
    await page.clock.run_for(11_000)
    await expect(users).to_have_text(str(before + 1))
    await expect(page.locator("details")).to_have_attribute("open", "")
    await expect(page.locator("#figures a").first).to_be_focused()
    office.router.signal(signal.SIGSTOP)  # it hangs
    await page.clock.run_for(11_000)
    await expect(page.get_by_role("alert")).to_contain_text("does not answer since", timeout=15_000)
    office.router.signal(signal.SIGCONT)
    await page.clock.run_for(11_000)
    await expect(page.get_by_role("alert")).to_have_count(0)
    office.router.stop()
    await page.clock.run_for(11_000)
    await expect(page.get_by_role("alert")).to_contain_text("does not answer since")
    office.router.start()
    await page.clock.run_for(11_000)
    await expect(page.get_by_role("alert")).to_have_count(0)
    await context.clear_cookies()
    await page.clock.run_for(11_000)
    await expect(page.locator("input[name=key]")).to_be_visible()
    reader.wrong[:] = [said for said in reader.wrong if "ERR_CONNECTION_REFUSED" not in said]


async def test_without_a_key_this_machines_browser_may_act(
    context: BrowserContext, tmp_path: Path, backend: FakeBackend
) -> None:
    """A browser sends Origin and Referer along, which an HTTP client does not."""
    with running(tmp_path, backend_api_url=backend.url) as router:
        assert router.run("say", ALI, "start_realty_2").returncode == 0
        reader = watched(await context.new_page(), router.url)
        await reader.page.goto(f"{router.url}/router/page/user?user={ALI}")
        await reader.page.get_by_role("link", name="Take the lock away").click()
        await reader.page.get_by_role("button", name="Yes").click()
        await expect(reader.page.get_by_role("status")).to_contain_text("is taken away")
        assert not reader.wrong


async def test_times_are_the_readers(reader: Reader, office: Office) -> None:
    page = reader.page
    await reader.log_in(office)
    await page.goto(f"{office.page}page/user?user={ALI}")
    shown = page.locator(".big time")
    at = await shown.get_attribute("datetime")
    assert at
    expected = await page.evaluate(
        "at => new Date(Date.parse(at) + 4 * 3600e3).toISOString().slice(11, 16)", at
    )  # Dubai has no summer time
    reported = await shown.inner_text()
    hour, minute = map(int, re.findall(r"(\d+):(\d\d)", reported)[0])
    assert f"{minute:02}" == expected[3:]
    assert hour % 12 == int(expected[:2]) % 12


@pytest.mark.parametrize("language", ["en", "fa"])
async def test_a_card_prints_on_one_sheet_of_a6(
    reader: Reader, office: Office, language: str, tmp_path: Path
) -> None:
    page = reader.page
    await reader.log_in(office)
    await page.goto(f"{office.page}?lang={language}")
    await page.goto(f"{office.page}page/card?tenant=3&text={'س' * 60}")
    await page.evaluate("window.print = () => { window.printed = true }")
    await page.get_by_text(str(words_of(language)("card.print"))).click()
    assert await page.evaluate("window.printed")
    printed = await page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
    (box,) = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", printed)
    assert [round(float(side) / 72 * 25.4) for side in box] == [105, 148]
    await page.emulate_media(media="print")
    await expect(page.locator("header")).to_be_hidden()
    await expect(page.locator(".card svg")).to_be_visible()
    room = await page.locator(".card").bounding_box()
    code = await page.locator(".card svg").bounding_box()
    assert room
    assert code
    assert code["y"] + code["height"] < room["y"] + room["height"]
    assert code["width"] / 96 * 25.4 > 60, "millimetres"


async def test_a_link_on_another_site_does_not_ask_for_the_key_again(
    reader: Reader, office: Office
) -> None:
    """SameSite=Strict keeps the cookie back there; the page then comes to itself once more."""
    page = reader.page
    await reader.log_in(office)
    elsewhere = office.page.replace("127.0.0.1", "localhost")  # another site, for a browser

    async def link(route: object) -> None:
        await route.fulfill(body=f'<a href="{office.page}">look</a>', content_type="text/html")  # type: ignore[attr-defined]

    await page.route(f"{elsewhere}**", link)
    await page.goto(elsewhere)
    await page.click("a")
    await expect(page.locator("h1.status")).to_be_visible()
    reader.wrong[:] = [said for said in reader.wrong if "localhost" not in said]
