"""What is known of a database's file from outside: its name and state, its log, its copies, who holds it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import duckdb

from concept_audit.errors import StoreError, first_line
from concept_audit.files import atomic_write
from concept_audit.store import schema
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.layout import Layout

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def roll_back(cursor: Cursor) -> None:
    """Undo a transaction, if it is not over."""
    # The failed statement may have ended it already.
    with suppress(duckdb.Error):
        cursor.execute("ROLLBACK")


HEADER_BYTES = 3 * 4096
"""What comes before the blocks of a DuckDB file."""


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait for one's turn among the processes that wait here, who get it in the order in which they came.

    Args:
        path: of an empty file. Where it cannot be written, or the system has no such locks, there are no turns.
    """
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # The lock goes with its last descriptor, also when a process is killed.
        if descriptor is not None:
            os.close(descriptor)


def log_of(path: Path) -> Path:
    """Where DuckDB keeps what was committed to a file and is not in it yet."""
    return path.with_name(path.name + ".wal")


def backup_path(layout: Layout, what: str) -> Path:
    """A name for a copy of the workspace that no copy has."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in count(1):
        path = layout.backups / f"workspace-{what}-{stamp}{f'-{number}' if number > 1 else ''}.duckdb"
        if not path.exists():
            return path
    raise AssertionError("numbers do not end")


def newer(number: int, known: int) -> str:
    """Why a file is refused that a later version wrote, and what helps."""
    return (
        f"was written by a newer version of Concept audit (format {number}, this one reads up to {known}); "
        "update this one: pip install -U concept-audit"
    )


def identity_of(path: Path) -> tuple[int, int] | None:
    """Tells whether another file has come to a path: inode and time; None if there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def opens(path: Path) -> bool:
    """Whether a database that a build wrote is there, and can be opened in this version's format."""
    if not path.exists():
        return False
    try:
        with duckdb.connect(str(path), read_only=True) as con:
            found = con.execute("SELECT value FROM base.meta WHERE key = 'format'").fetchone()
            if is_short(con, path):
                return False
    except duckdb.Error:
        return False
    return found == (str(schema.FORMAT),)


def is_short(con: Cursor, path: Path, name: str | None = None) -> bool:
    """Whether the end of a database is missing, which DuckDB notices only when it reads what was there.

    Args:
        con: a connection on which it is open.
        name: that it is attached by; None for the one that the connection was made to.
    """
    sizes = con.execute(
        """SELECT block_size * total_blocks FROM pragma_database_size()
           WHERE database_name = coalesce(?, current_database())""",
        [name],
    ).fetchall()
    return any(path.stat().st_size < HEADER_BYTES + size for (size,) in sizes)


def opening_error(path: Path) -> str | None:
    """Why a database that people write to cannot be opened; None if it can, or if somebody holds it open now."""
    try:
        duckdb.connect(str(path), read_only=True).close()
    except duckdb.Error as error:
        # What a killed process left to be put in order is no damage, and only a writer can do it.
        waits = log_of(path).exists() or "lock" in str(error).lower()
        return None if waits else first_line(error)
    return None


def make_database(con: Cursor, path: Path) -> None:
    """Make an empty database, whole or not at all: one that was cut off while it was made could never be opened.

    Raises:
        StoreError: the disk is full, fails, or may not be written to.
    """
    with atomic_write(path) as partial:
        try:
            con.execute(f"ATTACH {quoted(partial)} AS made (STORAGE_VERSION '{schema.STORAGE}')")
        finally:
            with suppress(duckdb.Error):
                con.execute("DETACH made")


def copy_database(con: Cursor, name: str, target: Path) -> None:
    """Write what is committed of a database into another file, whole or not at all.

    Args:
        name: that it is attached by.

    Raises:
        StoreError: the disk is full, or the copy does not hold what the database holds.
    """
    with atomic_write(target) as partial:
        try:
            con.execute(f"ATTACH {quoted(partial)} AS copied (STORAGE_VERSION '{schema.STORAGE}')")
            con.execute(f"COPY FROM DATABASE {name} TO copied")
            con.execute("DETACH copied")
            con.execute(f"ATTACH {quoted(partial)} AS copied (READ_ONLY)")
            if _counts(con, name) != _counts(con, "copied"):
                raise StoreError(f"{target}: the copy does not hold all that is in {name}; try again")
        finally:
            with suppress(duckdb.Error):
                con.execute("DETACH copied")
            log_of(partial).unlink(missing_ok=True)


def _counts(con: Cursor, name: str) -> dict[str, int]:
    """Rows of each table of a database."""
    tables = con.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = ? AND NOT internal", [name]
    ).fetchall()
    return {
        f"{part}.{table}": only_row(con.execute(f'SELECT count(*) FROM {name}."{part}"."{table}"'))[0]
        for part, table in tables
    }


def quoted(path: Path) -> str:
    """A path as a string of SQL."""
    return "'" + str(path).replace("'", "''") + "'"


def holder(error: str) -> str:
    """Which process has a file, by DuckDB's words."""
    found = re.search(r"held in (.+?) \(PID (\d+)\)", error)
    return f" ({Path(found[1]).name}, PID {found[2]})" if found else ""
