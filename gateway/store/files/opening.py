"""Opening a data folder: take it, check it, bring file and database together, or refuse to start.

Nothing damaged is ever overwritten. Every refusal names the file, the place and the cure.
"""

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from gateway.domain.lock_events import Kind, LockEvent, Why
from gateway.domain.model import LONGEST_RETRY_AFTER, Moment, TenantId, UserId
from gateway.errors import StartRefused
from gateway.store.files import deliveries, history, mappings
from gateway.store.files.journal import SUSPECT_NAME, connect

DATABASE_NAME = "router.db"
LOCK_NAME = "router.lock"
MARK_NAME = "router.moved"
STORE_NOTE_NAME = "router.redis"  # the id of the store that was worked on, of a router on Redis
BACKUP_NAME = "backup.new"  # what a router wrote last, until it is fetched
_NAMES = (
    DATABASE_NAME,
    f"{DATABASE_NAME}-wal",
    f"{DATABASE_NAME}-shm",
    f"{DATABASE_NAME}.format-1",
    LOCK_NAME,
    mappings.FILE_NAME,
    f"{mappings.FILE_NAME}.tmp",
    SUSPECT_NAME,
    MARK_NAME,
    STORE_NOTE_NAME,
    BACKUP_NAME,
)

STEP_SECONDS = 0.5  # that the clock may go back without a word

Tx = sqlite3.Connection

log = logging.getLogger(__name__)


# What router.moved says of a folder that is, or was, one end of a migration.
UNFINISHED, ARRIVED, LEFT = "unfinished", "arrived", "left for "


class FolderLock:
    """On a data folder, held by this process until it is closed.

    On the folder itself and on router.lock: who removes that file lets nobody else in, and who
    knows the file only, as older versions do, is kept out as well.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        """Raise BlockingIOError if another process has it, OSError if it cannot be had at all.

        shared: beside others who share it.
        """
        how = fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        self.file = open(folder / LOCK_NAME, "ab", buffering=0)
        self._folder: int | None = None
        try:
            fcntl.flock(self.file, how)
            self._folder = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(self._folder, how)
            except BlockingIOError:
                raise
            except OSError:  # a network's file system may know locks of files alone
                os.close(self._folder)
                self._folder = None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(
    folder: Path, now: float, connect_to: Callable[[Path], Tx], *, for_migration: bool = False
) -> tuple[FolderLock, Tx, dict[UserId, TenantId]]:
    """for_migration: not for a router; what an unfinished migration left here is deleted."""
    path = folder / mappings.FILE_NAME
    mutex = take_folder(folder)
    try:
        _refuse_mounted_files(folder)
        _refuse_links(folder)
        _refuse_others_files(folder)
        _make_private(folder)
        if not for_migration:
            _refuse_moved(folder)
        elif mark_of(folder) == UNFINISHED:
            for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
                (folder / name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        connection = connect_to(folder / DATABASE_NAME)
        try:
            locks = _current_locks(path, connection)
            _import_predecessors(connection, path, locks, now)
            while heal_clock_step(connection, now):
                pass
            if redated := history.redate(connection, now):
                log.warning(
                    "%s entries of the history lay in the future: the clock was ahead; they count"
                    " as of now",
                    redated,
                    extra={"event": "store.clock", "count": redated},
                )
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as exc:
        mutex.close()
        raise StartRefused(f"{folder / DATABASE_NAME}: cannot be written ({exc})") from exc
    except BaseException:
        mutex.close()
        raise
    return mutex, connection, locks


def share_folder(folder: Path) -> FolderLock | None:
    """For a router on Redis: no router on files uses the folder until the lock returned is closed,
    or else half of the webhooks would go to one store and half to the other. None if the folder
    cannot be written: then nobody keeps anything in it."""
    _keep_private()
    try:
        return FolderLock(folder, shared=True)
    except BlockingIOError as exc:
        raise StartRefused(
            f"{folder}: a router on files uses this folder, and STORE_URL names another store:"
            " stop that one, or give each its own DATA_DIR"
        ) from exc
    except OSError:
        return None


def what_it_holds(folder: Path) -> str | None:
    """What a router on files has kept in folder, in words; None if nothing that would be missed, or
    all of it has moved elsewhere."""
    if (mark_of(folder) or "").startswith(LEFT):
        return None
    path = folder / mappings.FILE_NAME
    with contextlib.suppress(OSError):
        if path.is_file() and path.read_bytes().strip() not in (b"", b"{}"):
            return f"locks ({path.name})"
    database = folder / DATABASE_NAME
    if not database.exists():
        return None
    tables = ("delivery", "held", "dead_letter", "history")
    try:
        connection = sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)
        with contextlib.closing(connection):
            for table in tables:
                if connection.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0]:
                    return f"messages and their history ({database.name})"
    except sqlite3.Error as exc:
        return f"a {database.name} that cannot be read ({exc})"
    return None


def take_folder(folder: Path) -> FolderLock:
    """The folder is ours until the lock returned is closed; StartRefused if it is another's."""
    _keep_private()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    except BlockingIOError as exc:
        raise StartRefused(
            f"{folder}: another router uses this folder: stop it first. Two routers need a DATA_DIR"
            " each, or together a Redis (STORE_URL=redis://…)"
        ) from exc
    except OSError as exc:
        raise StartRefused(_not_ours(exc, folder)) from exc
    with contextlib.suppress(OSError):  # for people who look; a full disk is not refused for it
        lock.file.truncate(0)
        lock.file.write(f"{os.getpid()}\n".encode())
    return lock


def _refuse_links(folder: Path) -> None:
    """A rewrite would put a file in the place of the link, and the file behind it would no longer
    follow. (SQLite follows a link to router.db, and keeps its other files beside that one.)"""
    path = folder / mappings.FILE_NAME
    if path.is_symlink():
        raise StartRefused(
            f"{path}: is a link to {os.readlink(path)}, and would be replaced by a file: put the"
            " file itself there, or set DATA_DIR to the folder where it is"
        )


def open_to_others(folder: Path) -> list[Path]:
    """What the router keeps in folder, and the folder, as far as other accounts may read it or
    write it."""
    return [path for path in (folder, *_stored_in(folder)) if path.lstat().st_mode & 0o077]


def _stored_in(folder: Path) -> list[Path]:
    found = [folder / name for name in _NAMES] + list(folder.glob("before-restore-*"))
    return [path for path in found if path.exists() and not path.is_symlink()]


def _keep_private() -> None:
    """What this process makes from now on is its account's alone to read."""
    os.umask(0o077)


def _make_private(folder: Path) -> None:
    """Messages and locks are nobody else's to read; what is made from now on is not (umask)."""
    for path in open_to_others(folder):
        try:
            path.chmod(0o700 if path.is_dir() else 0o600)
        except OSError as exc:
            log.warning(
                "%s can be read by other accounts, and that cannot be changed (%s): run chmod"
                " go-rwx on it",
                path,
                exc.strerror,
                extra={"event": "start.readable"},
            )


def _refuse_mounted_files(folder: Path) -> None:
    """A file that is a mount of its own cannot be replaced by another one, which is how the
    mappings are written; and what is beside router.db would not be on its disk."""
    try:
        mounts = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return  # not Linux
    # Blanks in a path are written as \\040 there (proc(5)).
    places = {line.split()[1].replace("\\040", " ") for line in mounts if line.count(" ") > 1}
    for name in (mappings.FILE_NAME, DATABASE_NAME):
        path = folder.resolve() / name
        if str(path) in places:
            raise StartRefused(
                f"{path}: is a mount of its own, and can be replaced by no other file: mount the"
                f" whole folder {folder} instead"
            )


def _refuse_others_files(folder: Path) -> None:
    """Each file of ours must be ours to write, or the router dies at some later moment."""
    for name in (mappings.FILE_NAME, DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm"):
        path = folder / name
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            raise StartRefused(_not_ours(PermissionError(errno.EACCES, "Permission denied"), path))


def _not_ours(exc: OSError, path: Path) -> str:
    """Why path cannot be written, and the one command that puts it right."""
    if exc.errno not in (errno.EACCES, errno.EPERM):
        return f"{path}: cannot be written ({exc.strerror}): check the disk, or set DATA_DIR"
    # Not path.exists(): it raises where a folder cannot be looked into.
    if os.path.isfile(exc.filename or path):
        path = Path(str(exc.filename or path))
    there = next(one for one in (path, *path.parents) if os.path.exists(one))
    us, owner = f"{os.getuid()}:{os.getgid()}", there.stat().st_uid
    return (
        f"{path}: cannot be written: {there} belongs to uid {owner}, the router runs as uid"
        f" {os.getuid()}. Run: sudo chown -R {us} {there} (in a container: on the host, with the"
        " folder that is mounted there; of a volume of docker compose: docker compose run --rm"
        f" --no-deps --user root --cap-add CHOWN --entrypoint chown router -R {us} {there})"
    )


def mark_of(folder: Path) -> str | None:
    try:
        return (folder / MARK_NAME).read_text("utf-8").strip()
    except FileNotFoundError:
        return None


def set_mark(folder: Path, mark: str) -> None:
    mappings.replace_file(folder / MARK_NAME, f"{mark}\n".encode())


def _refuse_moved(folder: Path) -> None:
    path, mark = folder / MARK_NAME, mark_of(folder)
    if mark == ARRIVED:  # a router begins here: what follows is no migration's any more
        path.unlink()
        mappings.sync_directory(folder)
    elif mark is not None and mark.startswith(LEFT):
        raise StartRefused(
            f"{folder}: all that was here has been migrated to {mark.removeprefix(LEFT)}: set"
            " STORE_URL; to go on with what it was then: python whatsapp_router.py migrate --reopen"
            f" file:{folder}"
        )
    elif mark is not None:
        raise StartRefused(
            f"{folder}: a migration to this folder, or a restore, did not finish: run it again"
        )


def _current_locks(path: Path, connection: Tx) -> dict[UserId, TenantId]:
    """What the file says and the redo rows add; the file then holds it."""
    locks = mappings.read(path)
    redo = connection.execute("SELECT user, tenant FROM lock_redo ORDER BY id").fetchall()
    if locks is None:
        if history.knows_of_locks(connection):
            raise StartRefused(
                f"{path}: missing, but router.db beside it knows of locks: put the back-up in its"
                " place, or write it from the history with `python whatsapp_router.py rebuild`"
            )
        locks = {}
    elif not redo:
        return locks
    _apply(locks, redo)
    _write(path, locks)
    connection.execute("DELETE FROM lock_redo")
    return locks


def _apply(
    locks: dict[UserId, TenantId], changes: Iterable[tuple[UserId, TenantId | None]]
) -> None:
    for user, tenant in changes:
        if tenant is None:
            locks.pop(user, None)
        else:
            locks[user] = tenant


def _write(path: Path, locks: dict[UserId, TenantId]) -> None:
    try:
        mappings.check(path, locks)
    except StartRefused as exc:
        raise StartRefused(f"{path.with_name(DATABASE_NAME)} is damaged: it makes {exc}") from exc
    try:
        mappings.replace_file(path, mappings.encode(locks))
    except OSError as exc:
        raise StartRefused(
            f"{path}: cannot be written ({exc.strerror}): check disk and rights"
        ) from exc


def _import_predecessors(
    connection: Tx, path: Path, locks: dict[UserId, TenantId], now: float
) -> None:
    """Locks of a predecessor's file open the history, as old as that file at most."""
    if not locks or not history.is_empty(connection):
        return
    written = Moment.of(min(now, path.stat().st_mtime))
    connection.execute("BEGIN")
    for user, tenant in locks.items():
        event = LockEvent(now, user, Kind.IMPORTED, None, tenant, written, Why.IMPORT)
        history.record(connection, event)
    connection.execute("COMMIT")


def rebuild(folder: Path) -> tuple[Path, int]:
    """Write the missing mappings file from the history; where, and how many locks.

    Raise StartRefused if there is a file, which is never overwritten, or a router on the folder.
    """
    path = folder / mappings.FILE_NAME
    mutex = take_folder(folder)
    try:
        if path.exists():
            raise StartRefused(f"{path}: exists; move it away first, it is not overwritten")
        database = folder / DATABASE_NAME
        if not database.exists():
            raise StartRefused(f"{database}: missing, so there is no history to use")
        connection = connect(database)
        try:
            locks: dict[UserId, TenantId] = {}
            _apply(locks, history.changes(connection))
            _write(path, locks)
            connection.execute("DELETE FROM lock_redo")
        except sqlite3.Error as exc:
            raise StartRefused(f"{database}: cannot be read ({exc}): use the back-up") from exc
        finally:
            connection.close()
    finally:
        mutex.close()
    return path, len(locks)


def heal_clock_step(tx: Tx, now: float) -> int:
    """What was put off by a clock that has gone back since is due now, some of it at a time; how
    much, 0 when none is left."""
    return tx.execute(
        "UPDATE delivery SET due = ? WHERE id IN (SELECT id FROM delivery"
        " WHERE due > ? AND (coalesce(tried_at, due) > ? OR due > ?) LIMIT ?)",
        (now, now, now, now + LONGEST_RETRY_AFTER, deliveries.CHUNK),
    ).rowcount
