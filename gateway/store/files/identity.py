"""Whether the files of a data folder are still those that were opened.

A file that is removed or replaced under a running router goes on to take what is written to it, and
all of that is gone with the process: no error ever says so.
"""

import contextlib
import os
import sqlite3
from pathlib import Path

_Stamp = tuple[int, int]  # device and inode


class Identity:
    """Of the folder, of the database in it, and of what SQLite keeps beside that."""

    def __init__(self, folder: Path, database: Path) -> None:
        real = database.resolve()
        self._folder, self._database = folder, database
        self._beside = [real.with_name(f"{real.name}{end}") for end in ("-wal", "-shm")]
        self._known: dict[Path, _Stamp] = {}
        self._descriptor: int | None = os.open(folder, os.O_RDONLY)
        self.why_not_ours()

    def why_not_ours(self) -> str | None:
        """Which of them was removed or replaced, in words; None if none was."""
        for path in (self._folder, self._database, *self._beside):
            try:
                now = stamp(path)
            except OSError:
                continue  # a disk that fails says nothing of the file, and shows itself
            if now and self._known.setdefault(path, now) != now:
                return f"{path} was replaced by another while the router ran"
            if now is None and path in self._known:
                return f"{path} was removed while the router ran"
        return None

    def restore_folder(self) -> None:
        """Make the folder again if it was removed with all that was in it. One that was only moved
        still has everything."""
        if self._descriptor is None or self._folder.exists():
            return
        if os.fstat(self._descriptor).st_nlink == 0:
            self._folder.mkdir(mode=0o700)
            made = stamp(self._folder)
            assert made is not None
            self._known[self._folder] = made

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def folder_is_ours(self) -> bool:
        """Whether the folder is the one that was opened, or cannot be looked at."""
        try:
            return stamp(self._folder) == self._known.get(self._folder)
        except OSError:
            return True

    def can_be_put_back(self) -> bool:
        """Whether a copy may take the database's place: none of the files is another's."""
        if self._database.is_symlink() or not self.folder_is_ours():
            return False
        files = (self._database, *self._beside)
        return all(stamp(path) in (None, self._known.get(path)) for path in files)

    def put_back(self, connection: sqlite3.Connection) -> None:
        """Write all that the open connection still reads where the database was, durable."""
        copy = self._database.with_name(f"{self._database.name}.tmp")
        copy.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(copy)) as target:
            connection.backup(target)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        for path in self._beside:
            path.unlink(missing_ok=True)
        os.replace(copy, self._database)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def stamp(path: Path) -> _Stamp | None:
    """Of the file there; None if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
