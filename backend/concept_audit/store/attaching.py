"""The files that a DuckDB instance has attached: all that were asked for, or none.

DuckDB lets one process write a file, or several read it, and says so by an error when
it is somebody else's turn. Whoever waits for one file holds no other meanwhile, so that
nobody waits in a ring, and nobody who wants another file waits in vain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import duckdb

from concept_audit.errors import StoreError, first_line
from concept_audit.files import as_store_error
from concept_audit.store import migrations, schema
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.database_files import (
    backup_path,
    copy_database,
    holder,
    identity_of,
    is_short,
    log_of,
    make_database,
    newer,
    quoted,
    roll_back,
    turn,
)
from concept_audit.store.layout import Layout
from concept_audit.store.shard_store import check_command

LOCK_PATIENCE_SECONDS = 8.0
SHORTEST_WAIT, LONGEST_WAIT = 0.001, 0.02
LOCKED = ("lock on file", "used by another process")
"""What DuckDB says, on one system or another, of a file that is another process's."""
Access = Literal["read", "write", "raw"]
"""``raw`` is to write, but leaves the file in the format that it has."""


class _LockedError(Exception):
    """Another process has a file."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason


class Attachments:
    """An instance of DuckDB, and which of an audit's files it has attached.

    Not safe to share between threads: `Database` sees to that.

    Attributes:
        writes: whether it may put files in order.
        generation: counts instances; what was in the memory of an earlier one is gone.
        notices: what was done to the files that people should know of.
    """

    writes = True

    def __init__(self, layout: Layout):
        self._layout = layout
        self._paths = {"workspace": layout.workspace, "derived": layout.derived}
        self._attached: set[str] = set()
        self._audit: tuple[int, int] | None = None
        self._broken = False
        self.generation = 0
        self.notices: list[str] = []
        self._instance = _instance()

    def open(self, wanted: Mapping[str, Access]) -> None:
        """Attach files; waits for those that another process has.

        Raises:
            StoreError: one is absent, of another format, damaged, or held for too long, or the disk is full or fails; none
            is attached then.
        """
        # DuckDB's locks go to whoever happens to ask when one is free; who has come first asks first here.
        with turn(self._layout.turn):
            self._open_when_free(wanted)

    def _open_when_free(self, wanted: Mapping[str, Access]) -> None:
        deadline, wait = time.monotonic() + LOCK_PATIENCE_SECONDS, SHORTEST_WAIT
        while True:
            try:
                self._open(wanted)
                return
            except _LockedError as locked:
                self.release()
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{locked.path}: another process{holder(locked.reason)} holds it; close that program "
                        "or its connection, then try again"
                    ) from None
                # Programs that know of no turns wait too: at different times, lest they meet for ever.
                time.sleep(random.uniform(0.5, 1.5) * wait)
                wait = min(1.5 * wait, LONGEST_WAIT)
            except duckdb.Error as error:
                self.broke(error)
                self.release()
                raise as_store_error(self._layout.root, error) or error from error
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Let go of the files, whatever state they are in; ``audit``, which nobody writes to, stays."""
        for name in list(self._attached):
            try:
                self._detach(name)
            except duckdb.Error:
                # It cannot be detached, so that it could never be attached again: only a new instance helps. What
                # was committed is in its log.
                self._broken = True
        if self._broken:
            self._renew()

    def close(self) -> None:
        """Let go of everything, for good."""
        self._instance.close()

    def cursor(self) -> Cursor:
        """A connection of its own to the instance."""
        return self._instance.cursor()

    def broke(self, error: BaseException) -> None:
        """Take note of an error: after some the instance is of no use any more."""
        if isinstance(error, duckdb.FatalException | duckdb.InternalException):
            self._broken = True

    def replaced(self) -> bool:
        """Whether a build has put another ``audit.duckdb`` in the place of the one that is attached."""
        return self._audit is not None and self._audit != identity_of(self._layout.audit)

    def settle(self, name: str) -> None:
        """Put what was committed into the file itself, which does not change any more then until it is let go."""
        # What is committed is in the log, and counts, also if there is no room to settle it.
        with suppress(duckdb.Error):
            self._instance.execute(f"CHECKPOINT {name}")

    def taken(self, name: str) -> tuple[int, int]:
        """Bytes of a file: in use, and free to be used again."""
        used, free = only_row(
            self._instance.execute(
                """SELECT block_size * used_blocks, block_size * free_blocks FROM pragma_database_size()
                   WHERE database_name = ?""",
                [name],
            )
        )
        return used, free

    def copy(self, name: str, target: Path) -> None:
        """Write what is committed of a file into another; as `copy_database`."""
        copy_database(self._instance, name, target)

    def compact(self, name: str) -> None:
        """Give the file's free room back; it has to be attached for writing.

        The new file takes the place of the old one while this process holds that one: see `_attach_file`.
        """
        path = self._paths[name]
        # A log that could not be settled is of the old file; it must not meet the new one.
        if not log_of(path).exists():
            self.copy(name, path)

    def replace(self, name: str, new: Path) -> None:
        """Put another file in the place of one that is attached for writing, and seen by nobody else meanwhile.

        Raises:
            StoreError: the log of the old one is not settled, and would meet the new one.
        """
        self.settle(name)
        path = self._paths[name]
        if log_of(path).exists():
            raise StoreError(f"{path}: could not be brought to rest; free some space and try again")
        new.replace(path)

    def _open(self, wanted: Mapping[str, Access]) -> None:
        if "audit" in wanted:
            self._attach_audit()
        for name in ("workspace", "derived"):
            if name in wanted:
                self._attach(name, wanted[name])

    def _attach(self, name: str, access: Access) -> None:
        path = self._paths[name]
        # A process that was killed may have left a log, which only a writer can put in order.
        if access == "read" and path.exists() and not log_of(path).exists():
            self._attach_file(name, read_only=True)
            if self._format(name) == self._wanted(name):
                return
            self._detach(name)
        try:
            self._attach_file(name, read_only=False)
        except StoreError:
            if access != "read" or path.exists():
                raise
            # Nothing can be written there, and nothing is there.
            self._attach_empty(name)
            return
        if access == "raw":
            return
        if self._format(name) != self._wanted(name):
            self._prepare(name)
        if access == "read":
            self._detach(name)
            self._attach_file(name, read_only=True)

    def _attach_empty(self, name: str) -> None:
        """Attach what is as good as an empty file."""
        self._instance.execute(f"ATTACH ':memory:' AS {name}")
        self._attached.add(name)
        self._prepare(name)

    def _wanted(self, name: str) -> int:
        return schema.WORKSPACE_FORMAT if name == "workspace" else schema.DERIVED_FORMAT

    def _format(self, name: str) -> int | None:
        """The format of an attached file; None if nothing is in it.

        Raises:
            StoreError: a newer version wrote it.
        """
        there = self._instance.execute(
            "SELECT 1 FROM duckdb_tables() WHERE database_name = ? AND schema_name = 'base' AND table_name = 'meta'",
            [name],
        ).fetchone()
        found = there and self._instance.execute(f"SELECT value FROM {name}.base.meta WHERE key = 'format'").fetchone()
        # Early versions wrote their number last: tables without one are theirs.
        number = int(found[0]) if found else 1 if there else None
        if name == "workspace" and number is not None and number > schema.WORKSPACE_FORMAT:
            raise StoreError(f"{self._layout.workspace}: {newer(number, schema.WORKSPACE_FORMAT)}")
        return number

    def _prepare(self, name: str) -> None:
        """Bring a file that is attached for writing to the present format."""
        before = self._format(name)
        if name == "derived":
            if before is not None and before > self._wanted(name):
                # Another version's: it is made again faster than it is understood.
                self._detach(name)
                self._remove("derived")
                self._attach_file(name, read_only=False)
                before = None
            self._transact(lambda cursor: migrations.bring_derived(cursor, before), name)
        elif before is None:
            self._with_views(migrations.make)
        else:
            self._migrate(before)

    def _migrate(self, before: int) -> None:
        """Bring a workspace of an earlier version to the present format; a copy of it as it was is kept."""
        self._attach("derived", "write")
        backup = backup_path(self._layout, f"format-{before}")
        self.copy("workspace", backup)
        try:
            if before < migrations.APART:
                self._transact(lambda cursor: migrations.move_derived(cursor, self._layout.shards), "derived")
            self._detach("derived")
            self._with_views(lambda cursor: migrations.bring(cursor, before))
        except BaseException:
            # All is as it was: nobody needs the copy.
            backup.unlink(missing_ok=True)
            raise
        self.notices.append(
            f"{self._layout.workspace}: brought to the format of this version; as it was it is kept in {backup}"
        )
        self.settle("workspace")
        self.compact("workspace")
        self._detach("workspace")
        self._attach_file("workspace", read_only=False)

    def _with_views(self, change: Callable[[Cursor], None]) -> None:
        """Change the workspace's tables and make its views, which must find the tables of ``derived`` somewhere."""
        self._instance.execute("ATTACH ':memory:' AS derived")
        self._attached.add("derived")
        self._transact(migrations.make_derived, "derived")
        self._transact(change, "workspace")
        self._detach("derived")

    def _transact(self, change: Callable[[Cursor], None], name: str) -> None:
        cursor = self.cursor()
        try:
            cursor.execute(f"USE {name}")
            cursor.execute("BEGIN")
            change(cursor)
            cursor.execute("COMMIT")
        except BaseException as error:
            self.broke(error)
            roll_back(cursor)
            raise
        finally:
            cursor.close()

    def _attach_audit(self) -> None:
        """Attach ``audit.duckdb``, again if a build has replaced it."""
        path = self._layout.audit
        identity = identity_of(path)
        if identity is None:
            raise StoreError(
                f"{self._layout.root}: the audit is not finished (no audit.duckdb); run "
                "`concept-audit build` again with the same options, it goes on where it was"
            )
        if identity == self._audit:
            return
        if self._audit is not None:
            self._audit = None
            self._detach("audit")
        self._paths["audit"] = path
        self._attach_file("audit", read_only=True)
        try:
            number = self._format("audit")
            if is_short(self._instance, path, "audit"):
                raise duckdb.IOException("the end of the file is missing")
        except duckdb.Error as error:
            self._detach("audit")
            raise StoreError(f"{path}: damaged ({first_line(error)}); {self._way_out('audit')}") from error
        if number != schema.FORMAT:
            self._detach("audit")
            if number is not None and number > schema.FORMAT:
                raise StoreError(f"{path}: {newer(number, schema.FORMAT)}")
            raise StoreError(
                f"{path}: written in format {number}, this version reads {schema.FORMAT}; run the same "
                "`concept-audit build` (or `demo`) again, which writes the store anew from what it has found"
            )
        self._attached.discard("audit")
        self._audit = identity

    def _attach_file(self, name: str, read_only: bool) -> None:
        """Attach a file by its path.

        Files are replaced by whoever holds them (`compact`, a restored backup). The file that is attached is
        therefore the one at the path if the path has not changed meanwhile: from then on it cannot.
        """
        path = self._paths[name]
        if not read_only and not path.exists():
            make_database(self._instance, path)
        before = identity_of(path)
        try:
            self._instance.execute(f"ATTACH {quoted(path)} AS {name}" + (" (READ_ONLY)" if read_only else ""))
        except duckdb.Error as error:
            self.broke(error)
            if isinstance(error, duckdb.IOException) and any(words in str(error).lower() for words in LOCKED):
                raise _LockedError(path, str(error)) from error
            refused = as_store_error(path, error)
            if refused is None and name == "derived" and path.exists() and self.writes:
                # Nothing in it is lost that could not be made again.
                self._remove(name)
                raise _LockedError(path, "damaged, and made anew") from error
            raise refused or StoreError(
                f"{path}: cannot be opened ({first_line(error)}); {self._way_out(name)}"
            ) from error
        self._attached.add(name)
        after = identity_of(path)
        if before is not None and (after is None or after[0] != before[0]):
            raise _LockedError(path, "it was replaced meanwhile")

    def _way_out(self, name: str) -> str:
        if name == "workspace":
            return (
                f"if it is damaged, move it away, keep it, and put back a copy with `concept-audit restore` "
                f"(those made by itself are in {self._layout.backups})"
            )
        return (
            f"`{check_command(self._layout.root)}` makes it again from what the build has found; labels, probes and "
            "flags are kept"
        )

    def _remove(self, name: str) -> None:
        path = self._paths[name]
        path.unlink(missing_ok=True)
        log_of(path).unlink(missing_ok=True)

    def _detach(self, name: str) -> None:
        self._instance.execute(f"DETACH {name}")
        self._attached.discard(name)

    def _renew(self) -> None:
        with suppress(duckdb.Error):
            self._instance.close()
        self._instance = _instance()
        self._attached.clear()
        self._audit, self._broken = None, False
        self.generation += 1


def _instance() -> Cursor:
    instance = duckdb.connect(config={"allow_community_extensions": False})
    instance.execute("SET preserve_insertion_order = true")
    return instance
