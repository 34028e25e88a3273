"""The open side of the router, attacked over real sockets."""

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from gateway.api import bodies, protocol
from gateway.app import create_app
from gateway.inbound.ingest import Ingest
from gateway.log import Throttle
from gateway.waha import signature
from tests.clients import settings_of
from tests.conftest import LIMITS, FakeBackend, wait_until
from tests.e2e.nginx import nginx
from tests.e2e.router import Router, free_port, running
from tests.messages import ALI, webhook

HEAD = b"POST /webhook/waha HTTP/1.1\r\nHost: localhost\r\n"
SLOW_CALLERS = 1000


@contextlib.contextmanager
def open_files(soft: int) -> Iterator[None]:
    """What is started inside may hold so many files open, unless it asks for more."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_a_thousand_slow_callers_stop_nobody_and_are_dropped(tmp_path: Path) -> None:
    """A third sends nothing, a third half a head, a third a body without end (slow loris)."""
    router = Router(tmp_path)
    with open_files(256):
        router.start()
    callers: list[socket.socket] = []
    try:
        with open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
            for number in range(SLOW_CALLERS):
                caller = socket.create_connection(("127.0.0.1", router.port), timeout=60)
                callers.append(caller)
                caller.sendall([b"", HEAD, HEAD + b"Content-Length: 99\r\n\r\n{"][number % 3])
            answer = router.post(webhook("start_realty_2", sent=time.time()))
            assert answer.json()["action"] == "new_session_locked"
            assert httpx.get(f"{router.url}/health").status_code == 200
            end = time.monotonic() + protocol.REQUEST_SECONDS + 15
            for caller in callers:
                caller.settimeout(max(0.1, end - time.monotonic()))
                with contextlib.suppress(ConnectionResetError):
                    while caller.recv(4096):  # the 400 to those in the body, and then the end
                        pass
    finally:
        for caller in callers:
            caller.close()
        router.stop()
    assert router.log.read_text("utf-8").count("🚫") <= 3, "each kind once a minute"


@contextlib.asynccontextmanager
async def served(
    tmp_path: Path, listener: socket.socket | None = None, *, keep_alive: int = 75
) -> AsyncIterator[int]:
    """The app in this process, on the wire as serve() puts it there; the port."""
    listener = listener or socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(settings_of(tmp_path), limits=LIMITS),
        http=protocol.BoundedProtocol,
        log_config=None,
        access_log=False,
        timeout_keep_alive=keep_alive,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    await wait_until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What comes back until the end, or until the router is silent for 5 s."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for part in pieces:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            while chunk := await reader.read(65_536):
                answer += chunk
    sending.cancel()
    writer.close()
    return answer


@pytest.fixture
def _reported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.BoundedProtocol, "_refusals", Throttle())


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LAST = b"Connection: close\r\n\r\n"


@pytest.mark.usefixtures("_reported_anew")
@pytest.mark.parametrize(
    ("pieces", "status", "reported"),
    [
        ([GET, LAST], b"200", ""),
        ([GET, b"X-Long: " + b"x" * 60_000 + b"\r\n", LAST], b"200", ""),
        ([GET, b"X-Long: " + b"x" * 66_000 + b"\r\n", LAST], b"431", "a head over 65536 bytes"),
        ([GET + b"X-Long: " + b"x" * 66_000 + b"\r\n" + LAST], b"431", "a head over"),
        ([GET + b"X: y\r\n" * 20_000 + LAST], b"431", "a head over"),
        ([GET, *[b"X: y\r\n" * 1000] * 80], b"431", "a head over"),
        (
            [b"GET /" + b"x" * 66_000 + b" HTTP/1.1\r\n", b"Host: localhost\r\n" + LAST],
            b"431",
            "a head over",
        ),
        ([b"GET /" + b"x" * 200_000, b"x" * 200_000], b"431", "a head over"),
        ([GET, *[b"X: y\r\n" * 20_000] * 4], b"431", "a head over"),
        # trailers, which nobody reads
        (
            [GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"a: b\r\n" * 20_000] * 9],
            b"200",
            "a head over",
        ),
        ([HEAD + b"Content-Length: " + b"0" * 5000 + b"2\r\n" + LAST + b"{}"], b"400", ""),
        ([HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"], b"400", "no HTTP"),
        # The head begins in one read with the body before it, and ends in another.
        (
            [HEAD + b"Content-Length: 2\r\n\r\n{}" + GET + b"X: " + b"x" * 70_000, b"\r\n\r\n"],
            b"400",
            "over 65536",
        ),
        ([HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"], b"400", "no HTTP"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n"], b"400", "no HTTP"),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], b"400", "no HTTP"),
        ([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], b"400", "no HTTP"),
    ],
)
async def test_a_head_has_an_end(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pieces: list[bytes],
    status: bytes,
    reported: str,
) -> None:
    async with served(tmp_path) as port:
        assert (await talk(port, *pieces, pause=0.01)).split()[1] == status
        await talk(port, *pieces)
    lines = [r.getMessage() for r in caplog.records if r.name == "gateway.api.protocol"]
    assert len(lines) == bool(reported), "told once, not twice"
    assert reported in "".join(lines)


@pytest.mark.usefixtures("_reported_anew")
async def test_requests_sent_on_without_waiting_are_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as port:
        few = GET + b"\r\n"
        assert (await talk(port, few * 50 + GET + LAST)).count(b"HTTP/1.1 200") == 51
        assert not caplog.records or "🚫" not in caplog.text
        assert (await talk(port, few * 5000)).count(b"HTTP/1.1 200") < 5000
    assert "without waiting for answers" in caplog.text


@pytest.mark.usefixtures("_reported_anew")
@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"GET /health HTTP/1.1\r\n", *[b"X: y\r\n"] * 1000],
        # answered at once, and then its body goes on
        [b"POST /health HTTP/1.1\r\nContent-Length: 9999\r\n\r\n", *[b"x"] * 1000],
        # the second request of a connection
        [GET + b"\r\n", b"GET /", *[b"x"] * 1000],
    ],
)
async def test_a_request_that_trickles_is_dropped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pieces: list[bytes],
) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.2)
    async with served(tmp_path) as port:
        started = time.monotonic()
        await talk(port, *pieces, pause=0.01)
        assert time.monotonic() - started < 5, "it was dropped, not waited for"
    assert "did not end within" in caplog.text


async def test_a_bare_line_end_does_not_keep_a_connection_for_good(tmp_path: Path) -> None:
    async with served(tmp_path, keep_alive=1) as port:
        started = time.monotonic()
        await talk(port, GET + b"\r\n", b"\r\n", pause=0.1)
        assert time.monotonic() - started < 4


@pytest.mark.usefixtures("_reported_anew")
async def test_who_does_not_read_his_answers_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.3)
    async with served(tmp_path) as port:
        with socket.socket() as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            caller.connect(("127.0.0.1", port))
            caller.setblocking(False)
            ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            for _ in range(1000):
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    caller.send(ask)
                await asyncio.sleep(0.005)
                if "took nothing of its answers" in caplog.text:
                    break
    assert "took nothing of its answers" in caplog.text


async def test_a_trailer_is_no_header(tmp_path: Path) -> None:
    async with served(tmp_path) as port:
        chunked = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = webhook("hello")
        framed = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\nOrigin: evil\r\n\r\n"
        assert (await talk(port, chunked + framed)).split()[1] == b"200"


async def test_an_idle_connection_between_two_requests_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.05)
    async with served(tmp_path) as port, httpx.AsyncClient() as client:
        for _ in range(3):
            answer = await client.get(f"http://127.0.0.1:{port}/health")
            assert answer.status_code == 200
            await asyncio.sleep(0.15)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(GET + b"\r\n")
            await reader.readuntil(b"}")
            await asyncio.sleep(0.15)
        writer.close()


async def test_a_body_that_trickles_is_answered_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "_SECONDS", 0.2)
    head = HEAD + b"Content-Length: 999999\r\n\r\n"
    async with served(tmp_path) as port:
        answer = await talk(port, head, *[b"x"] * 100, pause=0.01)
        assert answer.split()[1] == b"400"
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        answer = await talk(port, chunked, *[b"1\r\nx\r\n"] * 100, pause=0.01)
        assert answer.split()[1] == b"400"


async def test_a_peer_in_ipv4_mapped_form_is_this_machine(tmp_path: Path) -> None:
    """A socket for both families shows an IPv4 caller as ::ffff:127.0.0.1."""
    both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    async with served(tmp_path, both) as port:
        ready = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n" + LAST
        assert (await talk(port, ready)).split()[1] == b"200"


@contextlib.contextmanager
def nginx_before(router: Router, folder: Path) -> Iterator[str]:
    """nginx with proxy_pass and nothing else; its URL."""
    port = free_port()
    temporary = "".join(
        f"{name}_temp_path {folder};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = (
        f"daemon off; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port};\n"
        f"location / {{ proxy_pass http://127.0.0.1:{router.port}; }} }} }}\n"
    )
    with nginx(config, folder):
        yield f"http://127.0.0.1:{port}"


def test_through_a_bare_nginx_nothing_is_open_without_keys(tmp_path: Path) -> None:
    """proxy_http_version is named: it is nginx's default up to 1.29.6."""
    with running(tmp_path) as router, nginx_before(router, tmp_path) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/ready", "/router/stats", "/docs", "/openapi.json"):
            refused = httpx.get(f"{url}{path}")
            assert (refused.status_code, list(refused.json())) == (403, ["detail"])
            assert "ADMIN_API_KEY" in refused.text
        refused = httpx.post(f"{url}/webhook/waha", content=webhook("start_realty_2"))
        assert refused.status_code == 403
        assert "WEBHOOK_HMAC_KEY" in refused.text
        assert httpx.get(f"{router.url}/router/stats").json()["total_locked_users"] == 0


def test_through_a_bare_nginx_with_keys_all_is_served(tmp_path: Path) -> None:
    with (
        running(tmp_path, webhook_hmac_key="hook-key", admin_api_key="boss-key") as router,
        nginx_before(router, tmp_path) as url,
    ):
        body = webhook("start_realty_2", sent=time.time())
        signed = {"X-Webhook-Hmac": signature.sign(body, b"hook-key")}
        assert httpx.post(f"{url}/webhook/waha", content=body, headers=signed).status_code == 200
        shown = httpx.get(f"{url}/router/user/{ALI}", headers={"X-Api-Key": "boss-key"})
        assert shown.json()["locked_to_tenant"] == 2


SECRETS = {
    "webhook_hmac_key": "hmac-7Zk2,hmac-old-7Zk2",
    "waha_api_key": "waha-7Zk2",
    "admin_api_key": "admin-7Zk2,admin-old-7Zk2",
    "backend_signing_secret": "whsec_N1prMk43WmsyTjdaazJON1prMk43WmsyTjdaazI=",
}
TRACES = ("7Zk2", "N1prMk43", "7Zk2N7Zk2N")


async def test_no_secret_comes_out_whatever_goes_wrong(
    tmp_path: Path, backend: FakeBackend
) -> None:
    """Log at its most talkative, every answer, the start's refusal."""
    backend.answer = lambda _: 500
    seen = []
    settings = SECRETS | {"log_level": "DEBUG", "backend_api_url": backend.url}
    router = Router(tmp_path, **settings)

    def attack() -> None:
        router.start()
        body = webhook("start_realty_2", sent=time.time())
        signed = signature.sign(body, b"hmac-old-7Zk2")
        for headers in ({"x_webhook_hmac": signed}, {"x_webhook_hmac": "0"}, {"x_api_key": "x"}):
            seen.append(router.post(body, **headers).text)
        for path in ("/ready", "/openapi.json", "/docs", "/router/stats", "/router/pending"):
            for key in ("admin-old-7Zk2", "wrong"):
                got = httpx.get(f"{router.url}{path}", headers={"X-Api-Key": key})
                seen.append(f"{got.text}{got.headers}")

    await asyncio.to_thread(attack)
    await wait_until(lambda: backend.received)
    await asyncio.to_thread(router.stop)
    router.env |= {"PORT": "none", "BACKEND_SIGNING_SECRET": "whsec_N1prMk43", "HOST": "0.0.0.0"}
    refused = await asyncio.to_thread(router.run)
    seen += [refused.stderr, refused.stdout, router.log.read_text("utf-8")]
    seen += [str(r.headers) for r in backend.received]
    assert "PORT" in refused.stderr
    assert "BACKEND_SIGNING_SECRET" in refused.stderr
    for trace in TRACES:
        assert not [text for text in seen if trace in text]


async def test_an_unforeseen_error_is_answered_and_logged_and_the_next_webhook_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The webhook does not pass the middleware that answers with 500 elsewhere."""
    whole = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
    request = whole % (len(webhook("hello")), webhook("hello"))
    async with served(tmp_path) as port:
        with monkeypatch.context() as broken:
            broken.setattr(Ingest, "receive", _stumbling)
            assert (await talk(port, request)).split()[1] == b"500"
        assert (await talk(port, request)).split()[1] == b"200"
    assert "ZeroDivisionError" in caplog.text


async def _stumbling(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


def _webhooks(count: int, last: bytes = b"Connection: close\r\n") -> list[bytes]:
    """Whole requests, the last of which ends the connection."""
    found = []
    for number in range(count):
        body = webhook(f"start_realty_2 {number}", bare_id=f"3EB0{number:04}")
        end = last if number == count - 1 else b""
        found.append(HEAD + end + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    return found


@pytest.mark.parametrize(
    ("pieces", "at_once"),
    [
        (_webhooks(3), 2),
        ([b"".join(_webhooks(3))], 2),  # pipelined; of the last it is said that it closes
        ([part for one in _webhooks(2) for part in (one[:200], one[200:])], 1),
    ],
    ids=["one after the other", "pipelined", "in two pieces"],
)
async def test_a_webhook_is_answered_at_once_and_as_by_asgi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], at_once: int
) -> None:
    """Fails when uvicorn no longer goes the way that gateway.api.protocol shortens."""
    taken = []
    answer = protocol._AtOnce.answer

    def noted(self: protocol._AtOnce, json: bytes) -> bool:
        taken.append(answer(self, json))
        return taken[-1]

    monkeypatch.setattr(protocol._AtOnce, "answer", noted)
    async with served(tmp_path) as port:
        answers = await talk(port, *pieces, pause=0.1)
    assert taken.count(True) == at_once
    heads = [one.partition(b"\r\n\r\n")[0] for one in answers.split(b"HTTP/1.1 ")[1:]]
    names = [
        {line.partition(b":")[0] for line in head.split(b"\r\n")[1:]} - {b"connection"}
        for head in heads
    ]
    assert names == [{b"date", b"server", b"content-type", b"content-length"}] * len(heads)
    assert answers.count(b'"status":"routed"') == len(heads) == len(_webhooks(at_once + 1))


async def test_who_hangs_up_before_the_answer_is_routed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone, accepted = asyncio.Event(), asyncio.Event()
    receive = Ingest.receive

    async def slow(self: Ingest, *args: Any, **how: Any) -> Any:
        await gone.wait()
        outcome = await receive(self, *args, **how)
        accepted.set()
        return outcome

    monkeypatch.setattr(Ingest, "receive", slow)
    async with served(tmp_path) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(_webhooks(1, last=b"")[0])
        await writer.drain()
        writer.transport.abort()
        await asyncio.sleep(0.1)  # for the server to see it; too early only weakens the test
        gone.set()
        await asyncio.wait_for(accepted.wait(), 30)
        async with httpx.AsyncClient() as client:
            shown = await client.get(f"http://127.0.0.1:{port}/health")
    assert shown.json()["total_locked_users"] == 1
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["lock/971501234567", "tenants/1/move", "recover", "explain"])
def test_a_body_without_end_is_not_stored(tmp_path: Path, path: str) -> None:
    """Nobody's, and then that of somebody who may call."""
    key = "k" * 32
    with running(tmp_path, admin_api_key=key) as router:
        before = router.megabytes()
        for head in (b"", f"X-Api-Key: {key}\r\n".encode()):
            with socket.create_connection(("127.0.0.1", router.port), timeout=10) as caller:
                caller.sendall(
                    f"POST /router/{path} HTTP/1.1\r\nHost: localhost\r\n".encode()
                    + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
                    + head
                    + b"\r\n"
                )
                chunk = b"10000\r\n" + b"1" * 0x10000 + b"\r\n"
                with contextlib.suppress(OSError):
                    for _ in range(5000):  # 300 MB
                        caller.sendall(chunk)
            assert httpx.get(f"{router.url}/health", timeout=2).status_code == 200
        assert router.megabytes() < before + 40


def test_bodies_that_nobody_has_signed_share_one_budget(tmp_path: Path) -> None:
    """150 callers send all of their 8 MB but the last byte."""
    with running(tmp_path, webhook_hmac_key="k" * 32) as router:
        before = router.megabytes()
        head = HEAD + b"Content-Length: 8000000\r\n\r\n"
        answers: list[bytes] = []
        callers = []
        for _ in range(150):
            caller = socket.create_connection(("127.0.0.1", router.port), timeout=10)
            callers.append(caller)
            with contextlib.suppress(OSError):
                caller.sendall(head + b" " * 7_999_999)
        body = webhook("start_realty_2", sent=time.time())
        signed = signature.sign(body, b"k" * 32)
        assert router.post(body, x_webhook_hmac=signed).status_code == 200
        held = router.megabytes() - before
        for caller in callers:
            caller.settimeout(0.2)
            with contextlib.suppress(OSError):
                answers.append(caller.recv(300))
            caller.close()
        assert held < 120, "the budget is 64 MB"
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
        assert refused
        assert all(b"retry-after: 2" in one.lower() for one in refused)
