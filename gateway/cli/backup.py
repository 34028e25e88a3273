"""backup and restore: a copy of all that a router on files holds, and the way back."""

import asyncio
import contextlib
import fcntl
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tqdm import tqdm

from gateway.cli.router_client import request
from gateway.errors import NoBackUp, StartRefused
from gateway.settings import Settings
from gateway.store.files import backup, mappings, opening

_LOCK_NAME = "backup.lock"
_ORIGIN_NAME = "backup.of"
_NAME = re.compile(r"router-[0-9]{8}-[0-9]{6}(?:-[0-9]+)?")


async def back_up(settings: Settings, data: Path, into: Path, *, keep: int) -> int:
    """Write a new folder router-<UTC> in into, and delete all but the newest keep; the exit status.

    The running router writes the copy into the data folder, and it is fetched from there; if none
    runs we write it ourselves. Raise StartRefused if that fails.
    """
    if keep < 1:
        raise StartRefused(f"--keep {keep}: must be 1 or more")
    with _one_at_a_time(data), _one_at_a_time(into, makes=True):
        _check_whose(into, data)
        return await _back_up(settings, data, into, keep)


async def _back_up(settings: Settings, data: Path, into: Path, keep: int) -> int:
    written = await _written(settings, data)
    try:
        target = _fresh(into)
        partial = target.with_name(f"{target.name}.partial")
        partial.mkdir(mode=0o700)  # tenants.json holds secrets
        sums = backup.check(written)
        for name in (*sums, backup.SUMS_NAME):
            backup.copy(written / name, partial / name)
        backup.check(partial)  # as it is read from there
        backup.prove(partial)
        partial.rename(target)
        mappings.sync_directory(into)
        shutil.rmtree(written, ignore_errors=True)  # the next one replaces it
        others = {one for one in into.iterdir() if _NAME.fullmatch(one.name)} - {target}
        old = sorted(others)[: max(0, len(others) - keep + 1)]  # by name; never the new one
        for one in old:
            shutil.rmtree(one)
    except OSError as exc:
        raise StartRefused(f"{into}: cannot be written ({exc})") from exc
    finally:
        for one in into.glob("router-*.partial"):
            shutil.rmtree(one, ignore_errors=True)
    print(f"{target}: {', '.join(sums)}")
    if old:
        print(f"deleted: {', '.join(one.name for one in old)}")
    return 0


def put_back(data: Path, place: Path) -> int:
    """Restore the back-up that place is, or the newest in it; the exit status."""
    if not (place / backup.SUMS_NAME).exists():
        found = sorted(one for one in place.glob("router-*") if _NAME.fullmatch(one.name))
        if not found:
            raise StartRefused(f"{place}: is no back-up, and holds none")
        place = found[-1]
    aside = backup.restore(place, data)
    print(f"{data}: restored from {place}")
    if aside:
        print(f"what was there is in {aside}: delete it when all is well")
    return 0


@contextlib.contextmanager
def _one_at_a_time(folder: Path, *, makes: bool = False) -> Iterator[None]:
    """Two at once would take the copy from each other."""
    try:
        if makes:
            folder.mkdir(parents=True, exist_ok=True)
        mutex = open(folder / _LOCK_NAME, "ab")
    except OSError as exc:
        raise StartRefused(f"{folder}: cannot be used ({exc})") from exc
    with mutex:
        try:
            fcntl.flock(mutex, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StartRefused(f"{folder}: another back-up is under way there") from exc
        yield


def _check_whose(into: Path, data: Path) -> None:
    """Back-ups of two routers in one folder would be deleted for one another's."""
    origin, ours = into / _ORIGIN_NAME, str(data.resolve())
    try:
        if not origin.exists():
            mappings.replace_file(origin, f"{ours}\n".encode())
        theirs = origin.read_text("utf-8").strip()
    except (OSError, ValueError) as exc:
        raise StartRefused(f"{origin}: cannot be used ({exc})") from exc
    if theirs != ours:
        raise StartRefused(
            f"{into}: holds back-ups of {theirs}: give {ours} a folder of its own, or delete"
            f" {_ORIGIN_NAME} there"
        )


def _fresh(into: Path) -> Path:
    stem = into / time.strftime("router-%Y%m%d-%H%M%S", time.gmtime())
    target, number = stem, 1
    while target.exists():
        number += 1
        target = stem.with_name(f"{stem.name}-{number}")
    return target


async def _written(settings: Settings, data: Path) -> Path:
    try:
        mutex = opening.take_folder(data)
    except StartRefused:  # a router runs on it
        return await _asked_of_the_router(settings, data)
    with mutex:
        if (mark := opening.mark_of(data)) and mark != opening.ARRIVED:
            raise StartRefused(
                f"{data}: is not whole, or has been migrated away ({mark}): see router.moved"
            )
        if not (data / opening.DATABASE_NAME).exists():
            raise StartRefused(f"{data}: there is nothing to back up")
        try:
            return await asyncio.to_thread(backup.write_alone, data)
        except NoBackUp as exc:
            raise StartRefused(str(exc)) from exc


async def _asked_of_the_router(settings: Settings, data: Path) -> Path:
    answer = await request(settings, "/router/backup", progress=_copied(data))
    place = Path(answer["folder"])
    if not place.exists():
        raise StartRefused(f"{place}: not to be seen from here: run this where the router runs")
    return place


@contextlib.asynccontextmanager
async def _copied(data: Path) -> AsyncIterator[None]:
    """On a terminal, how much of the database has been copied."""
    total = (data / opening.DATABASE_NAME).stat().st_size
    copy = data / opening.BACKUP_NAME / opening.DATABASE_NAME
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        async def show_progress() -> None:
            while True:
                await asyncio.sleep(0.2)
                with contextlib.suppress(OSError):
                    bar.update(copy.stat().st_size - bar.n)

        showing = asyncio.create_task(show_progress())
        try:
            yield
        finally:
            showing.cancel()
