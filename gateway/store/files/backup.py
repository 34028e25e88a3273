"""A data folder's back-up: written beside a running router, checked, put back.

A back-up is a folder with router.db, router_mappings.json, tenants.json if there is one, and
SHA256SUMS, as `sha256sum -c` reads it. The database is copied first, so that the mappings file
holds every lock that the database knows of.
"""

import contextlib
import hashlib
import io
import os
import shutil
import sqlite3
import stat
import time
from pathlib import Path

from gateway.errors import NoBackUp, StartRefused
from gateway.store.files import formats, history, journal, mappings, opening
from gateway.tenants.registry import FILE_NAME as _TENANTS_NAME
from gateway.tenants.registry import Tenants

SUMS_NAME = "SHA256SUMS"
_FILES = (opening.DATABASE_NAME, mappings.FILE_NAME, _TENANTS_NAME)
_BESIDE = (f"{opening.DATABASE_NAME}-wal", f"{opening.DATABASE_NAME}-shm")
_AT_ONCE = 1_048_576
_MOST_OF_SUMS = 4096  # bytes of a SHA256SUMS that names three files


def write_alone(folder: Path) -> Path:
    """As write(), of a folder that no router uses."""
    # The connection that reads is the last one to close, so it writes the WAL into the database.
    journal.rewrite_from_disk(
        (folder / opening.DATABASE_NAME).with_name(f"{opening.DATABASE_NAME}-wal")
    )
    return write(folder)


def write(folder: Path, *, least_free: int = 0) -> Path:
    """Copy what is in the data folder into opening.BACKUP_NAME there, durable; where.

    A snapshot of the database by a connection that only reads: the router writes on meanwhile, and
    its WAL grows for as long. Raise NoBackUp if the disk has no room for it.
    """
    target, database = folder / opening.BACKUP_NAME, folder / opening.DATABASE_NAME
    wal = database.with_name(database.name + "-wal")
    try:
        shutil.rmtree(target, ignore_errors=True)
        size = sum(one.stat().st_size for one in (database, wal) if one.exists())
        if (free := shutil.disk_usage(folder).free) < size + least_free:
            raise NoBackUp(
                f"{folder}: {free >> 20} MB free on its disk, {size + least_free >> 20} MB are"
                " needed for a copy of router.db and to go on"
            )
        target.mkdir(mode=0o700)
        _copy_database(database, target / opening.DATABASE_NAME)
        for name in (mappings.FILE_NAME, _TENANTS_NAME):
            with contextlib.suppress(FileNotFoundError):  # there may be no lock yet, and no tenants
                copy(folder / name, target / name)
        sums = "".join(
            f"{checksum(target / name)}  {name}\n" for name in _FILES if (target / name).exists()
        )
        mappings.replace_file(target / SUMS_NAME, sums.encode())
        mappings.sync_directory(folder)
    except (sqlite3.Error, OSError) as exc:
        shutil.rmtree(target, ignore_errors=True)
        raise NoBackUp(f"{target}: cannot be written ({exc})") from exc
    return target


def _copy_database(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source.resolve())) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        reading.execute("PRAGMA query_only = ON")
        reading.backup(writing)  # in one step: between steps a change would begin it anew
    _sync(target)


def copy(source: Path, target: Path) -> None:
    """Durable; target is whole or not there."""
    temporary = target.with_name(target.name + ".tmp")
    with _plain(source) as file, temporary.open("wb") as copied:
        shutil.copyfileobj(file, copied, _AT_ONCE)
        copied.flush()
        os.fsync(copied.fileno())
    os.replace(temporary, target)
    mappings.sync_directory(target.parent)


def checksum(path: Path) -> str:
    with _plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(path: Path) -> io.BufferedReader:
    """The file, opened to read; OSError if it is a link, a device or a pipe, which may have no end,
    or be another's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path} is no plain file")
    return file


def check(folder: Path) -> dict[str, str]:
    """The files of a back-up and their checksums; StartRefused if it is damaged, or none."""
    try:
        with _plain(folder / SUMS_NAME) as file:
            lines = file.read(_MOST_OF_SUMS).decode().splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if not {opening.DATABASE_NAME} <= set(sums) <= set(_FILES):
            raise StartRefused(
                f"{folder}: {SUMS_NAME} names other files than a back-up has: take another one"
            )
        wrong = [name for name, digest in sums.items() if checksum(folder / name) != digest]
    except (OSError, ValueError) as exc:
        raise StartRefused(f"{folder}: is no back-up, or not whole ({exc})") from exc
    if wrong:
        raise StartRefused(f"{folder}: damaged: {', '.join(wrong)}: take another one")
    _refuse_newer(folder / opening.DATABASE_NAME)
    return sums


def _refuse_newer(database: Path) -> None:
    try:
        with contextlib.closing(_reader(database)) as connection:
            number = formats.number_of(connection)
    except sqlite3.Error:
        return  # the start says what is wrong with it
    formats.refuse_newer(database, number)


def _reader(database: Path) -> sqlite3.Connection:
    """Connect to read a database that nobody writes; nothing is written beside it."""
    return sqlite3.connect(f"{database.resolve().as_uri()}?immutable=1", uri=True)


def prove(folder: Path) -> None:
    """Return if a router would start on the back-up; StartRefused if not: its router was damaged
    already."""
    database = folder / opening.DATABASE_NAME
    try:
        with contextlib.closing(_reader(database)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            has_locks = history.knows_of_locks(connection)
    except sqlite3.Error as exc:
        raise StartRefused(
            f"{database}: SQLite cannot use it ({exc}): the router's is damaged, too"
        ) from exc
    if found != "ok":
        raise StartRefused(f"{database}: SQLite calls it damaged ({found}): the router's is, too")
    if (folder / _TENANTS_NAME).exists():
        Tenants(folder / _TENANTS_NAME)
    if mappings.read(folder / mappings.FILE_NAME) is None and has_locks:
        raise StartRefused(
            f"{folder}: there are locks, but no {mappings.FILE_NAME} beside router.db"
        )


def restore(backup: Path, folder: Path) -> Path | None:
    """Put a back-up into the data folder; where what was there is now, None if nothing was.

    Raise StartRefused if a router uses the folder or the back-up is damaged. If this dies half-way
    no router starts on the folder until it is done again.
    """
    sums = check(backup)
    with opening.take_folder(folder):
        try:
            opening.set_mark(folder, opening.UNFINISHED)
            aside = _put_aside(folder, _FILES if _TENANTS_NAME in sums else _FILES[:2])
            for name in sums:
                copy(backup / name, folder / name)
            (folder / opening.MARK_NAME).unlink()
            mappings.sync_directory(folder)
        except OSError as exc:
            raise StartRefused(f"{folder}: cannot be written ({exc}): run it again") from exc
    return aside


def _put_aside(folder: Path, names: tuple[str, ...]) -> Path | None:
    there = [name for name in (*names, *_BESIDE) if (folder / name).exists()]
    if not there:
        return None
    stem = folder / time.strftime("before-restore-%Y%m%d-%H%M%S", time.gmtime())
    aside, number = stem, 1
    while aside.exists():
        number += 1
        aside = stem.with_name(f"{stem.name}-{number}")
    aside.mkdir()
    for name in there:
        os.replace(folder / name, aside / name)
    mappings.sync_directory(aside)
    mappings.sync_directory(folder)
    return aside


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
