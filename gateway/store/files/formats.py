"""The format of router.db: its number, and how an older one is brought up to this one.

1  before formats had a number (user_version 0)
2  history: `why` is a code, with `who` and `other` beside it. Words: dedup_0…2 for seen_0…2,
   poison_attempts for own_faults, linked_at for sighted. person for help: what else is known of
   a person is one record

The number is SQLite's user_version, so it goes wherever the file goes: into back-ups, too.
"""

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from gateway.errors import StartRefused
from gateway.store.files.mappings import sync_directory

FORMAT = 2
COPY_SUFFIX = ".format-"  # router.db.format-1: what there was before it was brought up

log = logging.getLogger(__name__)

_SCHEMA = (Path(__file__).parent / "schema.sql").read_text("utf-8")
# A router of format 1 made what was missing at each start: older ones had fewer tables.
_SCHEMA_1 = (Path(__file__).parent / "schema_1.sql").read_text("utf-8")

_WAHA = "', says WAHA'"
_UPGRADES = {
    1: f"""{_SCHEMA_1}
DROP INDEX history_why;
ALTER TABLE history ADD COLUMN who TEXT;
ALTER TABLE history ADD COLUMN other TEXT;
UPDATE history SET
    who = CASE WHEN why LIKE '%' || {_WAHA} THEN 'waha' END,
    other = CASE WHEN why LIKE 'is %' THEN substr(replace(why, {_WAHA}, ''), 4)
        WHEN why LIKE 'was %' THEN substr(replace(why, {_WAHA}, ''), 5) END,
    why = CASE
        WHEN why LIKE 'is %' THEN 'merged_into'
        WHEN why LIKE 'was %' THEN 'merged_from'
        WHEN why = 'operator' THEN 'operator'
        WHEN why LIKE 'operator, %' THEN 'tenant_move'
        WHEN kind = 'imported' THEN 'import'
        WHEN user LIKE 'erased-%' OR kind = 'merged' THEN NULL
        ELSE 'link' END;
CREATE INDEX history_other ON history (other) WHERE other IS NOT NULL;
ALTER TABLE delivery RENAME COLUMN own_faults TO poison_attempts;
DROP INDEX delivery_line;
CREATE INDEX delivery_queue ON delivery (user, tenant, event_time, id);
ALTER TABLE alias RENAME COLUMN sighted TO linked_at;
ALTER TABLE seen_0 RENAME TO dedup_0;
ALTER TABLE seen_1 RENAME TO dedup_1;
ALTER TABLE seen_2 RENAME TO dedup_2;
UPDATE meta SET name = 'dedup_period' WHERE name = 'seen_period';
CREATE TABLE person (user TEXT PRIMARY KEY, record TEXT NOT NULL, help_waits_since REAL,
    updated_at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX person_help ON person (help_waits_since) WHERE help_waits_since IS NOT NULL;
CREATE INDEX person_updated ON person (updated_at);
INSERT INTO person SELECT user,
    CASE WHEN sent_at IS NULL THEN json_object('help_queued_at', queued_at)
        ELSE json_object('help_queued_at', queued_at, 'help_sent_at', sent_at) END,
    CASE WHEN sent_at IS NULL THEN queued_at END,
    coalesce(sent_at, queued_at) FROM help;
DROP TABLE help;
"""
}


def set_up(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables, or bring those of an older format up, in one step that a kill leaves
    whole, after a copy beside path.

    Raise StartRefused if the format is newer than FORMAT, or there is no room for the copy.
    """
    number = number_of(connection)
    refuse_newer(path, number)
    if number == FORMAT:
        return

    if number:
        _copy_beside(path, number)
    try:
        connection.execute("BEGIN IMMEDIATE")
        for step in steps_from(number):
            connection.execute(step)
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if number:
        log.warning(
            "%s had format %s and has format %s now; the copy %s can go once all is well",
            path,
            number,
            FORMAT,
            _copy_of(path, number),
            extra={"event": "store.upgraded"},
        )


def steps_from(number: int) -> list[str]:
    """Return the statements that make this format of that one; 0: of nothing."""
    scripts = [_UPGRADES[one] for one in range(number, FORMAT)] if number else [_SCHEMA]
    return [statement for script in scripts for statement in _statements(script)]


def number_of(connection: sqlite3.Connection) -> int:
    """Return the format's number; 0 if there are no tables yet."""
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    if number:
        return int(number)
    query = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'delivery')"
    return int(connection.execute(query).fetchone()[0])


def refuse_newer(path: Path, number: int) -> None:
    """Raise StartRefused if number is of a newer router."""
    if number > FORMAT:
        raise StartRefused(
            f"{path}: has format {number}, and this router knows formats up to {FORMAT}: run a"
            " newer router on it, or put an older back-up in its place"
        )


def _copy_of(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}{COPY_SUFFIX}{number}")


def _copy_beside(path: Path, number: int) -> None:
    target = _copy_of(path, number)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with (
            contextlib.closing(sqlite3.connect(path)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            source.backup(copy)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_directory(path.parent)
    except (OSError, sqlite3.Error) as exc:
        temporary.unlink(missing_ok=True)
        raise StartRefused(
            f"{target}: a copy of router.db cannot be written before its format is changed ({exc}):"
            " make room on the disk"
        ) from exc


def _statements(script: str) -> list[str]:
    """Return the statements one by one: executescript() would commit each for itself."""
    found, rest = [], ""
    for line in script.splitlines(keepends=True):
        rest += line
        if sqlite3.complete_statement(rest):
            found.append(rest)
            rest = ""
    return found
