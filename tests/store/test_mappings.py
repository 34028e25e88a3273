"""The file of the locks follows the memory, in slices, whatever changes between two of them."""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.domain.model import TenantId, UserId
from gateway.store.files import mappings
from gateway.store.files.mappings import Mappings

Change = tuple[UserId, TenantId | None, int]


def applied(locks: dict[Any, Any], changes: Iterable[Change]) -> dict[Any, Any]:
    """As the start does it with the redo rows."""
    for user, tenant, _ in changes:
        if tenant is None:
            locks.pop(user, None)
        else:
            locks[user] = tenant
    return locks


@pytest.mark.parametrize("seed", range(20))
async def test_a_crash_after_any_rewrite_loses_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each file that was written, with the changes whose redo rows were still there, is all."""
    monkeypatch.setattr(mappings, "_AT_ONCE", 2)
    monkeypatch.setattr(mappings, "_SLICE", 3)
    draw = Random(seed)
    users = [UserId(f"97150{number:07}") for number in range(20)]
    locks = {user: TenantId(1) for user in users[:14]}
    before = dict(locks)
    changes: list[Change] = []
    # With the number up to which redo rows are gone then, and how many changes there were.
    files: list[tuple[bytes, int, int]] = []
    in_file = 0

    def written(number: int) -> None:
        nonlocal in_file
        in_file = number

    def write_file(path: Path, data: bytes) -> None:
        files.append((data, in_file, len(changes)))
        path.write_bytes(data)

    stored = Mappings(tmp_path / "m.json", locks, written=written, write_file=write_file)
    for number in range(1, 200):
        tenant = draw.choice([None, TenantId(number)])
        changes.append((draw.choice(users), tenant, number))
        stored.change(*changes[-1])
        for _ in range(draw.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
    await stored.close()

    final = applied(dict(before), changes)
    assert json.loads((tmp_path / "m.json").read_bytes()) == final
    assert set(stored.users()) == set(final)
    assert len(files) > 1
    for place, (data, gone_before, count) in enumerate(files):
        so_far = changes[:count]
        # Killed before the redo rows of this rewrite go, or after.
        gone_after = files[place + 1][1] if place + 1 < len(files) else in_file
        for gone in (gone_before, gone_after):
            left = [change for change in so_far if change[2] > gone]
            assert applied(json.loads(data), left) == applied(dict(before), so_far), place


async def test_the_slices_make_what_encoding_at_once_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappings, "_AT_ONCE", 2)
    monkeypatch.setattr(mappings, "_SLICE", 4)
    for count in (0, 1, 2, 3, 4, 5, 8, 9):
        locks = {UserId(f"97150{n:07}"): TenantId(n + 1) for n in range(count)}
        stored = Mappings(tmp_path / f"{count}.json", dict(locks), written=lambda _: None)
        assert await stored._encoded() == mappings.encode(locks)
        await stored.close()


async def test_who_waits_for_the_file_waits_no_longer_than_asked_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    def failing(path: Path, data: bytes) -> None:
        raise OSError("no space")

    stored = Mappings(tmp_path / "m.json", {}, written=lambda _: None, write_file=failing)
    for number in range(1, 20):
        stored.change(UserId(f"97150{number:07}"), TenantId(2), number)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(stored.in_file(number, 0.05) for number in range(1, 20)))
    assert asyncio.get_running_loop().time() - began < 5
    assert stored.trouble
    assert stored._waiters == {}
    await stored.close()
