"""Every system call that writes, failing or the last one: nothing promised is lost or half there.

The calls are counted in a run without faults; then one run for each number, each error, and for a
process that dies there. A shim in C (LD_PRELOAD) plays the disk. Set FAULTS=all for every number;
without it every 25th is taken, another one for each kind of fault.
"""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.model import Done
from gateway.store import open_store
from tests.conftest import LIMITS
from tests.e2e.router import ROOT, environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs Linux and gcc"
)
STEP = 1 if os.environ.get("FAULTS") == "all" else 25
KINDS = {"dies": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("shim") / "disk.so"
    source = ROOT / "tests" / "faults" / "disk.c"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-o", str(built), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return built


def play(
    folder: Path, shim: Path, *, at: int, number: int, times: int = 3
) -> tuple[list[dict[str, Any]], str]:
    """The promises made on a disk that fails at that call, and what was said on standard error."""
    faults = {
        "LD_PRELOAD": str(shim),
        "FAULT_FOLDER": str(folder),
        "FAULT_AT": str(at),
        "FAULT_TIMES": str(times),
        "FAULT_ERRNO": str(number),
        "FAULT_COUNT": str(folder.parent / "count"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.scenario", str(folder)],
        cwd=ROOT,
        env=environment() | faults,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


async def check(folder: Path, promises: list[dict[str, Any]]) -> None:
    """On a sound disk again: everything promised is there, once, and nothing is damaged."""
    waiting: dict[tuple[str, str], int] = {}
    store = await open_store(f"file:{folder}", LIMITS)
    locks = {str(who): int(tenant) for who, tenant in (await store.locks(100, None)).locks.items()}
    while claimed := await store.claim(100, wait=0):
        for delivery in claimed:
            text = json.loads(delivery.body)["payload"]["body"]
            assert (delivery.user, text) not in waiting, "twice in the store"
            waiting[delivery.user, text] = delivery.tenant
            await store.settle(delivery, Done())
    await store.close()

    settled = {(one["by"], one["done"]) for one in promises if "done" in one}
    assert not settled & waiting.keys(), "what was settled came again"
    # Settled, perhaps, without the promise: the process died right after.
    settled |= {(one["by"], one["claimed"]) for one in promises if "claimed" in one}
    expected: dict[str, int | None] = {}
    for one in promises:
        if "text" in one:
            place = (one["user"], one["text"])
            assert place in waiting or place in settled, f"lost: {place}"
            if place in waiting and one["tenant"]:
                assert waiting[place] == one["tenant"]
            if one["tenant"]:
                expected[one["user"]] = one["tenant"]
        elif "unlocked" in one:
            expected[one["unlocked"]] = None
    for who, tenant in expected.items():
        # The next step may have been kept without its promise; what was promised may not be undone.
        assert locks.get(who) in {tenant, *after(who, tenant)}, f"{who}: {locks.get(who)}"
    with_lock = {who for who, text in waiting if text.startswith("start_realty")}
    assert with_lock <= locks.keys() | {"971500000002"}, "a message without its lock"
    assert json.loads((folder / "router_mappings.json").read_bytes()) == locks
    database = sqlite3.connect(folder / "router.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


def after(who: str, tenant: int | None) -> set[int | None]:
    """What the scenario makes of the lock next."""
    steps: dict[tuple[str, int | None], set[int | None]] = {
        ("971500000000", 1): {9},
        ("971500000002", 3): {None},
    }
    return steps.get((who, tenant), set())


@pytest.mark.parametrize("kind", KINDS)
async def test_no_failing_call_loses_what_was_promised(
    tmp_path: Path, shim: Path, kind: str
) -> None:
    folder = tmp_path / "sound"
    promises, said = play(folder, shim, at=0, number=0)
    assert promises[-1] == {"closed": True}, said
    await check(folder, promises)
    calls = int((tmp_path / "count").read_text())
    assert calls > 30

    for at in range(1 + list(KINDS).index(kind) % STEP, calls + 1, STEP):
        folder = tmp_path / f"{kind}-{at}"
        promises, said = play(folder, shim, at=at, number=KINDS[kind])
        try:
            if kind != "dies" and promises:
                assert promises[-1] == {"closed": True}, "it did not recover by itself"
            assert "Traceback" not in said
            await check(folder, promises)
        except Exception as exc:
            raise AssertionError(f"{kind} at call {at} of {calls}: {exc}\n{said}") from exc
        shutil.rmtree(folder)
