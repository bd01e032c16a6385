"""The two databases of an audit, open for as short as can be.

DuckDB lets one process write a file, or several read it. The workspace is
therefore attached for single queries only, so that the app, the command line and
a person's own SQL can work on one audit side by side. Within a process all
threads share one instance, since DuckDB attaches a file only once.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from concept_audit.errors import StoreError, first_line
from concept_audit.files import as_store_error
from concept_audit.store import schema
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import RowFilter
from concept_audit.store.layout import Layout
from concept_audit.store.shard_store import check_command

LOCK_PATIENCE_SECONDS = 8.0
SEARCHES_KEPT = 32
HEADER_BYTES = 3 * 4096
"""What comes before the blocks of a DuckDB file."""

_open: weakref.WeakValueDictionary[Path, Database] = weakref.WeakValueDictionary()
_open_guard = threading.Lock()


def database(layout: Layout) -> Database:
    """The process's one handle on an audit's databases."""
    key = layout.root.resolve()
    with _open_guard:
        found = _open.get(key)
        if found is None:
            found = _open[key] = Database(Layout(key))
        return found


def opens(path: Path) -> bool:
    """Whether a database that a build wrote is there, and can be opened in this version's format."""
    if not path.exists():
        return False
    try:
        with duckdb.connect(str(path), read_only=True) as con:
            found = con.execute("SELECT value FROM base.meta WHERE key = 'format'").fetchone()
            if _is_short(con, path):
                return False
    except duckdb.Error:
        return False
    return found == (str(schema.FORMAT),)


def _is_short(con: Cursor, path: Path) -> bool:
    """Whether the end of a database is missing, which DuckDB notices only when it reads what was there."""
    sizes = con.execute("SELECT block_size * total_blocks FROM pragma_database_size()").fetchall()
    return path.stat().st_size < HEADER_BYTES + max(size for (size,) in sizes)


def opening_error(path: Path) -> str | None:
    """Why a database that people write to cannot be opened; None if it can, or if somebody holds it open now."""
    try:
        duckdb.connect(str(path), read_only=True).close()
    except duckdb.Error as error:
        # What a killed process left to be put in order is no damage, and only a writer can do it.
        waits = path.with_name(path.name + ".wal").exists() or "lock" in str(error).lower()
        return None if waits else first_line(error)
    return None


@atexit.register
def _close_all() -> None:
    # DuckDB complains at length about instances that outlive the interpreter.
    for instance in list(_open.values()):
        instance.close()


class Database:
    """Hands out cursors on ``workspace`` with ``audit`` attached, one writer or many readers at a time.

    Leases do not nest in one thread: a writer would wait for its own reader to end.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._instance = duckdb.connect(config={"allow_community_extensions": False})
        self._instance.execute("SET preserve_insertion_order = true")
        self._turn = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting_writers = 0
        self._attached_audit: tuple[int, int] | None = None
        self._prepared = False
        self._found: list[str] = []
        self._mine = threading.local()

    def close(self) -> None:
        """Let go of the files; no lease may be taken afterwards."""
        self._instance.close()

    @contextmanager
    def reading(self) -> Iterator[Cursor]:
        """A cursor for queries.

        Raises:
            StoreError: the audit is absent, or another process keeps the workspace locked.
        """
        self._refuse_nesting()
        with self._turn:
            self._turn.wait_for(lambda: not self._writing and not self._waiting_writers)
            if not self._readers:
                self._attach(write=False)
            self._readers += 1
        self._mine.lease = True
        try:
            with self._cursor() as cursor:
                yield cursor
        finally:
            self._mine.lease = False
            with self._turn:
                self._readers -= 1
                if not self._readers:
                    self._detach()
                self._turn.notify_all()

    @contextmanager
    def writing(self) -> Iterator[Cursor]:
        """A cursor in a transaction on the workspace: committed at the end, undone by an error.

        Raises:
            StoreError: as `reading`, or the disk is full.
        """
        self._refuse_nesting()
        with self._turn:
            self._waiting_writers += 1
            try:
                self._turn.wait_for(lambda: not self._writing and not self._readers)
                self._attach(write=True)
                self._writing = True
            finally:
                self._waiting_writers -= 1
                self._turn.notify_all()
        self._mine.lease = True
        try:
            with self._cursor() as cursor, self._transaction(cursor):
                yield cursor
        finally:
            self._mine.lease = False
            with self._turn:
                self._writing = False
                self._detach()
                self._turn.notify_all()

    def found(self, build: str, words: Sequence[str]) -> str:
        """The name of a table with the ids of the rows in which all these words occur.

        Texts do not change while a build stands, and reading them takes longer than anything else a page
        does: they are searched once, and the result is kept in memory for the queries that follow.

        Args:
            words: in lower case, as from `RowFilter.words`.
        """
        digest = hashlib.blake2b("\0".join([build, *words]).encode("utf-8", "surrogatepass"), digest_size=12)
        name = f"memory.main.found_{digest.hexdigest()}"
        with self.reading() as cursor:
            if name not in self._found:
                condition, parameters = RowFilter(text=" ".join(f'"{word}"' for word in words)).sql()
                cursor.execute(
                    f"CREATE TABLE IF NOT EXISTS {name} AS SELECT example_id FROM audit.main.examples e WHERE {condition}",
                    parameters,
                )
                self._found.append(name)
                if len(self._found) > SEARCHES_KEPT:
                    cursor.execute(f"DROP TABLE IF EXISTS {self._found.pop(0)}")
        return name

    def _refuse_nesting(self) -> None:
        if getattr(self._mine, "lease", False):
            raise RuntimeError("this thread holds a lease on the database already")

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        cursor = self._instance.cursor()
        try:
            cursor.execute("USE workspace")
            yield cursor
        finally:
            cursor.close()

    @contextmanager
    def _transaction(self, cursor: Cursor) -> Iterator[None]:
        cursor.execute("BEGIN")
        try:
            yield
            cursor.execute("COMMIT")
        except Exception as error:
            _roll_back(cursor)
            refused = as_store_error(self._layout.workspace, error)
            if refused is None:
                raise
            raise refused from error
        except BaseException:
            _roll_back(cursor)
            raise

    def _attach(self, write: bool) -> None:
        self._attach_audit()
        fresh = not self._layout.workspace.exists()
        # A process that was killed may have left a log, which only a writer can put in order.
        log = self._layout.workspace.with_name(self._layout.workspace.name + ".wal")
        if fresh or not self._prepared or (log.exists() and not write):
            self._attach_file("workspace", self._layout.workspace, read_only=False, fresh=fresh)
            self._prepare_workspace()
            self._detach()
        self._attach_file("workspace", self._layout.workspace, read_only=not write)

    def _prepare_workspace(self) -> None:
        """Make what is missing in a workspace: all of a new one, what has come since in an older one.

        Raises:
            StoreError: it was written by a later version.
        """
        cursor = self._instance.cursor()
        try:
            cursor.execute("USE workspace")
            cursor.execute(schema.WORKSPACE_TABLES)
            found = cursor.execute("SELECT value FROM base.meta WHERE key = 'format'").fetchone()
            if found is not None and int(found[0]) > schema.FORMAT:
                self._detach()
                raise StoreError(
                    f"{self._layout.workspace}: written in format {found[0]}, this version reads up to "
                    f"{schema.FORMAT}; use the version that wrote it"
                )
            views = hashlib.blake2b(schema.WORKSPACE_VIEWS.encode(), digest_size=8).hexdigest()
            known = cursor.execute("SELECT value FROM base.meta WHERE key = 'views'").fetchone()
            if found is None or int(found[0]) < schema.FORMAT or known != (views,):
                cursor.execute(schema.WORKSPACE_VIEWS)
                state = [["format", str(schema.FORMAT)], ["views", views]]
                cursor.executemany("INSERT OR REPLACE INTO base.meta VALUES (?, ?)", state)
            self._prepared = True
        finally:
            cursor.close()

    def _attach_audit(self) -> None:
        """Attach ``audit.duckdb``, again if a build has replaced it."""
        try:
            state = self._layout.audit.stat()
        except FileNotFoundError:
            raise StoreError(
                f"{self._layout.root}: the audit is not finished (no audit.duckdb); run "
                "`concept-audit build` again with the same options, it goes on where it was"
            ) from None
        identity = (state.st_ino, state.st_mtime_ns)
        if identity == self._attached_audit:
            return
        if self._attached_audit is not None:
            self._instance.execute("DETACH audit")
            self._attached_audit = None
        try:
            self._instance.execute(f"ATTACH '{_quoted(self._layout.audit)}' AS audit (READ_ONLY)")
            (found,) = only_row(self._instance.execute("SELECT value FROM audit.base.meta WHERE key = 'format'"))
            if _is_short(self._instance, self._layout.audit):
                raise duckdb.IOException("the end of the file is missing")
        except (duckdb.Error, AssertionError) as error:
            self._instance.execute("DETACH DATABASE IF EXISTS audit")
            raise StoreError(
                f"{self._layout.audit}: damaged ({first_line(error)}); `{check_command(self._layout.root)}` makes it "
                "again from what the build has found; labels, probes and flags are kept"
            ) from error
        if int(found) != schema.FORMAT:
            self._instance.execute("DETACH audit")
            raise StoreError(
                f"{self._layout.audit}: written in format {found}, this version reads {schema.FORMAT}; run the same "
                "`concept-audit build` (or `demo`) again, which writes the store anew from what it has found"
            )
        self._attached_audit = identity

    def _attach_file(self, name: str, path: Path, read_only: bool, fresh: bool = False) -> None:
        # The storage version of a file that is there cannot be lowered.
        mode = " (READ_ONLY)" if read_only else f" (STORAGE_VERSION '{schema.STORAGE}')" if fresh else ""
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                self._instance.execute(f"ATTACH '{_quoted(path)}' AS {name}{mode}")
                return
            except duckdb.IOException as error:
                if "lock" not in str(error).lower():
                    raise as_store_error(path, error) or StoreError(
                        f"{path}: cannot be opened ({error}); if it is damaged, move it away"
                    ) from error
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{path}: another process{_holder(str(error))} holds it; close that program "
                        "or its connection, then try again"
                    ) from error
                time.sleep(0.05)

    def _detach(self) -> None:
        self._instance.execute("DETACH workspace")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _roll_back(cursor: Cursor) -> None:
    # The failed statement may have ended the transaction already.
    with suppress(duckdb.Error):
        cursor.execute("ROLLBACK")


def _holder(error: str) -> str:
    found = re.search(r"held in (.+?) \(PID (\d+)\)", error)
    return f" ({Path(found[1]).name}, PID {found[2]})" if found else ""
