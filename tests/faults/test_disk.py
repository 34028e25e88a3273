"""Every system call that changes files, failing or the last one: nothing promised is lost.

The calls are counted in a run without faults; then one run for each number, each error, and for a
process that dies there. A shim in C (LD_PRELOAD) plays the disk. Set FAULTS=all for every number;
without it every 25th is taken, another one for each kind of fault.
"""

import errno
import shutil
from pathlib import Path

import pytest

from tests.faults.promises import EVERY, check, play

STEP = 1 if EVERY else 25
KINDS = {"dies": 0, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}


@pytest.mark.parametrize("kind", KINDS)
async def test_no_failing_call_loses_what_was_promised(
    tmp_path: Path, shim: Path, kind: str
) -> None:
    folder, count = tmp_path / "sound", tmp_path / "count"
    promises, said = play(folder, shim, count=count)
    assert promises[-1] == {"closed": True}, said
    await check(folder, promises)
    calls = int(count.read_text())
    assert calls > 30

    for at in range(1 + list(KINDS).index(kind) % STEP, calls + 1, STEP):
        folder = tmp_path / f"{kind}-{at}"
        promises, said = play(folder, shim, at=at, times=3, errno=KINDS[kind])
        try:
            if kind != "dies" and promises:
                assert promises[-1] == {"closed": True}, "it did not recover by itself"
            assert "Traceback" not in said
            await check(folder, promises)
        except Exception as exc:
            raise AssertionError(f"{kind} at call {at} of {calls}: {exc}\n{said}") from exc
        shutil.rmtree(folder)
