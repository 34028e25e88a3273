"""Run the scenario on a bad disk, and hold what is on it afterwards against what was promised."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from gateway.domain.model import Delivered
from gateway.store import open_store
from tests.conftest import LIMITS
from tests.e2e.router import ROOT, environment

Promises = list[dict[str, Any]]
EVERY = os.environ.get("FAULTS") == "all"  # every call, not only some of them


def play(folder: Path, shim: Path, **faults: object) -> tuple[Promises, str]:
    """The promises made in folder by a process with these faults (see disk.c, without FAULT_), and
    what it said on standard error."""
    named = {f"FAULT_{name.upper()}": str(value) for name, value in faults.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.scenario", str(folder)],
        cwd=ROOT,
        env=environment() | named | {"LD_PRELOAD": str(shim), "FAULT_FOLDER": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


async def check(folder: Path, promises: Promises) -> None:
    """On a sound disk again: everything promised is there, once, and nothing is damaged."""
    waiting: dict[tuple[str, str], int] = {}
    store = await open_store(f"file:{folder}", LIMITS)
    locks = {str(who): int(tenant) for who, tenant in (await store.locks(100, None)).locks.items()}
    while claimed := await store.claim(100, wait=0):
        for delivery in claimed:
            text = json.loads(delivery.body)["payload"]["body"]
            assert (delivery.user, text) not in waiting, "twice in the store"
            waiting[delivery.user, text] = delivery.tenant
            await store.settle(delivery, Delivered())
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
    linked = {who for who, text in waiting.keys() | settled if text.startswith("start_realty")}
    assert linked <= locks.keys() | {"971500000002"}, "a message without its lock"
    assert locks.keys() <= linked, "a lock without its message"
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
