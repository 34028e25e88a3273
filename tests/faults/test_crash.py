"""Every state in which a crash can leave the files: what was promised by then holds in each.

The scenario runs once and every call is recorded; from the record come the states after each call,
for a process that is killed and for a machine that loses its power. FAULTS=all takes every call,
without it every seventh is taken.
"""

import errno
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.machine import Call, Machine, calls
from tests.faults.promises import EVERY, Promises, check, play

STEP, SYNC_STEP = (1, 1) if EVERY else (7, 12)
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder for the states; in memory, for there are thousands."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


async def check_state(disk: Path, state: dict[str, bytes], promises: Promises, what: str) -> None:
    folder = disk / "data"
    folder.mkdir()
    for name, content in state.items():
        if not name.endswith("-shm"):  # memory that processes share; no crash leaves it behind
            (folder / name).write_bytes(content)
    try:
        await check(folder, promises)
    except Exception as exc:
        raise AssertionError(f"after {what}: {type(exc).__name__}: {exc}") from exc
    shutil.rmtree(folder)


def promised(call: Call) -> Promises:
    return [json.loads(line) for line in call.data.splitlines()] if call.what == "promise" else []


async def test_after_a_crash_at_any_call_the_old_state_is_there_or_the_new(
    tmp_path: Path, shim: Path, disk: Path
) -> None:
    trace = tmp_path / "trace"
    promises, said = play(tmp_path / "data", shim, trace=trace)
    assert promises[-1] == {"closed": True}, said
    machine, made = Machine(), Promises()
    dice = random.Random(2026)
    recorded = list(calls(trace))
    assert sum(call.what == "fsync" for call in recorded) > 30
    for number, call in enumerate(recorded, 1):
        machine.apply(call) if call.what != "promise" else made.extend(promised(call))
        if number % STEP:
            continue
        what = f"call {number} of {len(recorded)}, {call.what} {call.name}"
        await check_state(disk, machine.after_a_kill(), made, f"{what}, killed")
        await check_state(disk, machine.after_a_power_cut(), made, f"{what}, power cut")
        for _ in range(2):
            state = machine.after_a_power_cut(dice)
            await check_state(disk, state, made, f"{what}, power cut in the middle")


@pytest.mark.parametrize("dies", [False, True])
async def test_after_a_failed_fsync_only_what_is_on_the_disk_is_promised(
    tmp_path: Path, shim: Path, disk: Path, dies: bool
) -> None:
    """Linux shows a reader what a failed fsync did not make durable, and syncs it never again. The
    router goes on, or (dies) is killed there and started again; then the power is cut."""
    count = tmp_path / "count"
    play(tmp_path / "sound", shim, calls="fsync", count=count)
    syncs = int(count.read_text())
    assert syncs > 30
    dice = random.Random(2026)
    for at in range(1 + dies * SYNC_STEP // 2, syncs + 1, SYNC_STEP):
        folder, trace = tmp_path / f"at-{at}", tmp_path / f"trace-{at}"
        faults = {"calls": "fsync", "at": at, "times": 1, "errno": errno.EIO, "die": int(dies)}
        play(folder, shim, trace=trace, **faults)
        if dies:
            play(folder, shim, trace=trace)
        machine, made = Machine(), Promises()
        recorded = list(calls(trace))
        broken = next((n for n, call in enumerate(recorded) if call.what == "fsync failed"), None)
        if broken is None:  # batches form by chance: this time it made fewer calls
            continue
        looks = {*dice.choices(range(broken, len(recorded)), k=8), len(recorded) - 1}
        for number, call in enumerate(recorded):
            machine.apply(call) if call.what != "promise" else made.extend(promised(call))
            if number in looks:
                what = f"fsync {at} of {syncs} failed, then call {number} of {len(recorded)}"
                await check_state(disk, machine.after_a_power_cut(), made, what)
        shutil.rmtree(folder, ignore_errors=True)
