"""backup and restore as an operator runs them, beside a router under load and a kill -9."""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.conftest import FakeBackend, wait_until
from tests.e2e.router import ROOT, Router
from tests.messages import webhook

KEYS = {"admin_api_key": "a" * 32}


def names(folder: Path) -> list[str]:
    """All but what is there for back-ups to come."""
    beside = ("backup.of", "backup.lock")
    return sorted(one.name for one in folder.iterdir() if one.name not in beside)


async def test_after_the_loss_of_a_disk_all_of_the_back_up_is_there_and_delivered(
    tmp_path: Path, backend: FakeBackend
) -> None:
    backend.answer = lambda _: 500
    router = Router(tmp_path, backend_api_url=backend.url, **KEYS).start()

    async def post(text: str, who: str) -> bytes:
        body = webhook(text, who, sent=time.time())
        assert (await asyncio.to_thread(router.post, body)).status_code == 200
        return body

    before = [await post(f"start_realty_2 {n}", f"97150{n:07}") for n in range(30)]
    stored = tmp_path / "kept"
    saved = await asyncio.to_thread(router.run, "backup", str(stored))
    assert saved.returncode == 0, saved.stderr
    assert "router.db, router_mappings.json" in saved.stdout
    (first,) = names(stored)
    assert await asyncio.to_thread(sums_of, stored / first) == 0
    await post("start_realty_3", "971509999999")
    refused = await asyncio.to_thread(router.run, "restore", str(stored))
    assert refused.returncode == 1
    assert "another router uses this folder" in refused.stderr
    router.kill()
    for file in (tmp_path / "data").iterdir():
        file.unlink()  # the disk is lost
    back = await asyncio.to_thread(router.run, "restore", str(stored))
    assert back.returncode == 0, back.stderr
    assert f"restored from {stored / first}" in back.stdout
    backend.received.clear()
    backend.answer = lambda _: 200
    await asyncio.to_thread(router.start)
    await wait_until(lambda: set(before) <= set(backend.bodies), seconds=30)
    assert {one.tenant for one in backend.received} == {2}
    again = (await asyncio.to_thread(router.post, before[0])).json()
    assert again["status"] == "duplicate"
    router.stop()


async def test_the_newest_stay_and_without_a_router_it_works_as_well(tmp_path: Path) -> None:
    router = Router(tmp_path).start()
    stored = tmp_path / "kept"
    made = []
    for _ in range(4):
        done = await asyncio.to_thread(router.run, "backup", str(stored), "--keep", "2")
        assert done.returncode == 0, done.stderr
        made.append(done.stdout.split(":")[0].rpartition("/")[2])
    assert names(stored) == sorted(made)[-2:]
    router.stop()
    done = await asyncio.to_thread(router.run, "backup", str(stored), "--keep", "2")
    assert done.returncode == 0, done.stderr
    assert len(names(stored)) == 2
    assert "backup.new" not in names(tmp_path / "data")


async def test_no_back_up_of_half_a_folder_and_the_new_one_is_never_deleted(
    tmp_path: Path,
) -> None:
    router = Router(tmp_path)
    router.start()
    assert router.post(webhook("start_realty_2", sent=time.time())).status_code == 200
    tenants = tmp_path / "data" / "tenants.json"
    tenants.write_text("{}")
    tenants.chmod(0o600)
    router.stop()
    stored = tmp_path / "kept"
    (stored / "router-20990101-000000").mkdir(parents=True)  # written by a clock that was ahead
    (stored / "router-20260101-000000.partial").mkdir()
    done = await asyncio.to_thread(router.run, "backup", str(stored), "--keep", "1")
    assert done.returncode == 0, done.stderr
    (good,) = names(stored)
    assert good != "router-20990101-000000"
    assert (stored / good / "tenants.json").stat().st_mode & 0o077 == 0, "it holds secrets"
    (tmp_path / "data" / "router.moved").write_text("unfinished\n")  # a restore died
    refused = await asyncio.to_thread(router.run, "backup", str(stored), "--keep", "1")
    assert refused.returncode == 1
    assert "is not whole" in refused.stderr
    assert names(stored) == [good]


async def test_back_ups_of_two_routers_do_not_share_a_folder(tmp_path: Path) -> None:
    """Or they would be deleted for one another's."""
    stored = tmp_path / "kept"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        router = Router(tmp_path / name).start()
        assert router.post(webhook("start_realty_2", sent=time.time())).status_code == 200
        router.stop()
        done = await asyncio.to_thread(router.run, "backup", str(stored), "--keep", "1")
        assert (done.returncode == 0) is (name == "one"), done.stderr
    assert "holds back-ups of" in done.stderr
    assert len(names(stored)) == 1
    (stored / "backup.of").unlink()
    (stored / "backup.of").mkdir()
    refused = await asyncio.to_thread(router.run, "backup", str(stored))
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert "backup.of: cannot be used" in line
    assert len(names(stored)) == 1


async def test_a_back_up_or_restore_that_is_killed_leaves_no_half_one(tmp_path: Path) -> None:
    router = Router(tmp_path)
    router.start()
    body = "x" * 200_000
    for number in range(60):
        text = f"start_realty_2 {body}"
        sent = webhook(text, f"97150{number:07}", sent=time.time())
        assert router.post(sent).status_code == 200
    stored = tmp_path / "kept"
    whole = await asyncio.to_thread(router.run, "backup", str(stored))
    assert whole.returncode == 0, whole.stderr
    (good,) = names(stored)
    at_work = [
        lambda: (tmp_path / "data" / "backup.new").exists(),
        lambda: (tmp_path / "data" / "backup.new" / "SHA256SUMS").exists(),
        lambda: any(stored.glob("*.partial")),
        lambda: any(stored.glob("*.partial/router.db")),
        lambda: any(stored.glob("*.partial/SHA256SUMS")),
    ]
    for there in at_work:
        await _killed(router, there, "backup", str(stored))
        await asyncio.to_thread(shutil.rmtree, tmp_path / "data" / "backup.new", True)
        found = [one for one in names(stored) if not one.endswith(".partial")]
        for one in found:
            assert await asyncio.to_thread(sums_of, stored / one) == 0
    router.stop()
    for number in range(6):
        copied = number

        def there(files: int = copied) -> bool:
            aside = max(tmp_path.glob("data/before-restore-*"), default=None)
            return aside is not None and len(list(aside.iterdir())) >= min(files, 2)

        await _killed(router, there, "restore", str(stored / good))
        # Whatever it was doing: done again, it is whole.
        back = await asyncio.to_thread(router.run, "restore", str(stored / good))
        assert back.returncode == 0, back.stderr
    router.start()
    health = await asyncio.to_thread(httpx.get, f"{router.url}/health")
    assert health.json()["total_locked_users"] == 60
    router.stop()


def sums_of(folder: Path) -> int:
    """What an operator without our program sees of it."""
    command = ["sha256sum", "--quiet", "-c", "SHA256SUMS"]
    return subprocess.run(command, cwd=folder, check=False).returncode


async def _killed(router: Router, there: Callable[[], bool], *arguments: str) -> None:
    """Start the command, and kill it as soon as something is there; if it is quicker, it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "whatsapp_router.py"), *arguments,
        cwd=router.folder, env=router.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.returncode is None and not there():
        await asyncio.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    await process.wait()
