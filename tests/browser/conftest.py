"""A real Chromium, and an office that has something to look at.

CHROMIUM names the browser, where it is not in the PATH (Debian: apt install chromium).
"""

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    async_playwright,
)

from examples.waha import StandIn
from tests.conftest import FakeBackend, Received, wait_until
from tests.e2e.router import Router
from tests.messages import webhook
from tests.programs import program

KEY = "office-key-" + "a" * 21
ALI, SARA, OMAR, MINA = (f"9715012345{n}" for n in (67, 68, 69, 70))
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"
TENANTS = {
    "2": {"name": "Marina Homes"},
    "3": {"name": "خانه‌های دریا"},
    "5": {"name": "بيوت النخيل", "note": "Palm"},
    "7": {"name": "Palm Homes"},
    "9": {"name": "Old Town", "active": False},
}


@pytest.fixture(scope="session")
def chromium() -> str:
    return program("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        # Without its own sandbox where root runs it, as in a container.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = await playwright.chromium.launch(executable_path=chromium, args=flags)
        yield launched
        await launched.close()


@dataclass
class Office:
    """A router in a process of its own, with clients, dead letters and messages that wait."""

    router: Router
    backend: FakeBackend
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def page(self) -> str:
        return f"{self.router.url}/router/"

    async def say(self, text: str, who: str, *, ago: float = 0.0) -> None:
        body = webhook(text, who, sent=time.time() - ago, bare_id=f"B{next(self.numbers)}")
        answer = await asyncio.to_thread(self.router.post, body)
        assert answer.status_code == 200, answer.text


def refuses(one: Received) -> int | web.StreamResponse:
    if b"REFUSE" in one.body:
        return web.Response(status=422, text=f"no such listing {EVIL}")
    return 503 if b"WAIT" in one.body else 200


@pytest.fixture
async def office(tmp_path: Path, backend: FakeBackend, waha: StandIn) -> AsyncIterator[Office]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tenants.json").write_text(json.dumps(TENANTS), "utf-8")
    backend.answer = refuses
    how = {"admin_api_key": KEY, "backend_api_url": backend.url, "waha_api_url": waha.url}
    made = Office(Router(tmp_path, **how), backend)
    await asyncio.to_thread(made.router.start)
    await made.say("start_realty_2", ALI)
    await made.say("start_realty_3 سلام", MINA)
    for number in range(12):
        await made.say("start_realty_2", f"97150777{number:04}")
    for number in range(5):
        await made.say("start_realty_5", f"97150888{number:04}")
    await made.say("start_realty_7", OMAR)
    await made.say(f"REFUSE {EVIL}", OMAR)
    await made.say("REFUSE هل الشقة متاحة؟", ALI)
    await made.say("WAIT Is the flat in Marina still free?", SARA)
    await made.say("start_realty_5 WAIT", SARA)
    await wait_until(lambda: sum(b"REFUSE" in one.body for one in backend.received) == 2)
    await wait_until(lambda: any(b"WAIT" in one.body for one in backend.received))
    yield made
    made.router.stop()


@dataclass
class Reader:
    """Somebody at a browser. Whatever the page does wrong is noted: scripts that fail, calls that
    leave the house, dialogs."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    async def log_in(self, office: Office) -> None:
        await self.page.goto(office.page)
        await self.page.fill("input[name=key]", KEY)
        await self.page.press("input[name=key]", "Enter")
        await self.page.wait_for_selector("h1.status")


def watched(page: Page, home: str) -> Reader:
    reader = Reader(page)

    def said(message: ConsoleMessage) -> None:
        # Chromium writes of each page with such a status, which a form may well have.
        expected = re.search(r"status of (?:401|404|422)", message.text)
        if message.type in ("error", "warning") and not expected:
            reader.wrong.append(message.text)

    def called(request: Request) -> None:
        if not request.url.startswith(home):
            reader.wrong.append(f"call to {request.url}")

    async def asked(dialog: Dialog) -> None:
        reader.wrong.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    page.on("pageerror", lambda error: reader.wrong.append(f"script: {error}"))
    page.on("console", said)
    page.on("request", called)
    page.on("dialog", asked)
    return reader


@pytest.fixture
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    made = await browser.new_context(locale="en-GB", timezone_id="Asia/Dubai")
    yield made
    await made.close()


@pytest.fixture
async def reader(context: BrowserContext, office: Office) -> AsyncIterator[Reader]:
    """Every test with one ends with a look at what went wrong."""
    found = watched(await context.new_page(), office.router.url)
    yield found
    assert not found.wrong
