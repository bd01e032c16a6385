"""The three databases of an audit, open for as short as can be.

DuckDB lets one process write a file, or several read it. What people did and what was
computed on demand are therefore attached for single queries only, so that the app, the
command line and a person's own SQL can work on one audit side by side. Within a process
all threads share one instance, since DuckDB attaches a file only once.
"""

from __future__ import annotations

import atexit
import hashlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

from concept_audit.errors import StoreError
from concept_audit.files import as_store_error
from concept_audit.store import derived
from concept_audit.store.attaching import Access, Attachments
from concept_audit.store.cursor import Cursor
from concept_audit.store.database_files import roll_back
from concept_audit.store.filters import RowFilter
from concept_audit.store.layout import Layout
from concept_audit.store.sealed import SealedAttachments

SEARCHES_KEPT, SEARCH_LOCKS = 64, 16
READING: Mapping[str, Access] = {"audit": "read", "workspace": "read", "derived": "read"}
WRITING: Mapping[str, Access] = {"audit": "read", "workspace": "write"}
DERIVING: Mapping[str, Access] = {"audit": "read", "derived": "write"}
HOLDING: Mapping[str, Access] = {"workspace": "raw"}

_open: weakref.WeakValueDictionary[tuple[Path, bool], Database] = weakref.WeakValueDictionary()
_open_guard = threading.Lock()


def database(layout: Layout, sealed: bool = False) -> Database:
    """The process's one handle on an audit's databases.

    Args:
        sealed: nothing may be written; a handle of its own.
    """
    key = (layout.root.resolve(), sealed)
    with _open_guard:
        found = _open.get(key)
        if found is None:
            found = _open[key] = Database(Layout(key[0]), sealed)
        return found


@atexit.register
def _close_all() -> None:
    # DuckDB complains at length about instances that outlive the interpreter.
    for instance in list(_open.values()):
        instance.close()


class Database:
    """Hands out cursors: to many readers at a time, or to one who writes.

    Leases do not nest in one thread: a writer would wait for its own reader to end.

    Args:
        sealed: hand out no cursor to write with, and write nothing else either.
    """

    def __init__(self, layout: Layout, sealed: bool = False):
        self._layout = layout
        self._sealed = sealed
        self._files = SealedAttachments(layout) if sealed else Attachments(layout)
        self._turn = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting_writers = 0
        self._mine = threading.local()
        self._searches = [threading.Lock() for _ in range(SEARCH_LOCKS)]
        self._searched: dict[str, int] = {}
        self._search_guard = threading.Lock()
        self._used: dict[int, datetime] = {}

    def close(self) -> None:
        """Let go of the files; no lease may be taken afterwards."""
        self._files.close()

    def notices(self) -> list[str]:
        """What was done to the files since this was asked last, that people should know of."""
        told, self._files.notices = self._files.notices, []
        return told

    @contextmanager
    def reading(self) -> Iterator[Cursor]:
        """A cursor on ``workspace``, for queries; ``audit`` and ``derived`` are beside it.

        Raises:
            StoreError: the audit is absent, or another process keeps a file locked.
        """
        self._refuse_nesting()
        with self._turn:
            self._turn.wait_for(self._may_read)
            if not self._readers:
                self._files.open(READING)
            self._readers += 1
        self._mine.lease = True
        try:
            with self._cursor("workspace") as cursor:
                yield cursor
        except BaseException as error:
            self._files.broke(error)
            raise
        finally:
            self._mine.lease = False
            with self._turn:
                self._readers -= 1
                if not self._readers:
                    self._files.release()
                self._turn.notify_all()

    @contextmanager
    def writing(self, ranked: bool = False, settled: Callable[[], None] | None = None) -> Iterator[Cursor]:
        """A cursor in a transaction on ``workspace``: committed at the end, undone by an error.

        Args:
            ranked: ``derived`` is beside it, for those who look at scores; others need not wait for it.
            settled: called once all is on disk, while nobody else can write yet.

        Raises:
            StoreError: as `reading`, or the disk is full.
        """
        wanted: Mapping[str, Access] = {**READING, **WRITING} if ranked else WRITING
        with self._alone(wanted):
            with self._cursor("workspace") as cursor, self._transaction(cursor, self._layout.workspace):
                yield cursor
            if settled is not None:
                self._files.settle("workspace")
                settled()

    @contextmanager
    def deriving(self, limit: int = derived.BYTES, keep: Collection[int] = ()) -> Iterator[Cursor]:
        """A cursor in a transaction on ``derived``, which afterwards takes no more room than it may.

        What people did is not touched, and may be read and written by other processes meanwhile.

        Args:
            limit: how large the file may grow, in bytes.
            keep: rankings that are being shown, and stay.

        Raises:
            StoreError: as `writing`.
        """
        since = derived.now()
        with self._alone(DERIVING):
            used, self._used = self._used, {}
            with self._cursor("derived") as cursor:
                with self._transaction(cursor, self._layout.derived):
                    derived.touch(cursor, used)
                    yield cursor
                self._bound(cursor, limit, keep, since)

    @contextmanager
    def holding(self) -> Iterator[Attachments]:
        """The workspace alone, whatever its format, kept from everybody else.

        Raises:
            StoreError: it cannot be opened, or another process keeps it locked.
        """
        with self._alone(HOLDING):
            yield self._files

    def used(self, rankings: Collection[int]) -> None:
        """Say that rankings are asked for: they stay longer than those that are not."""
        self._used |= dict.fromkeys(rankings, derived.now())

    def found(self, build: str, words: Sequence[str], text_in: Literal["", "prompt", "response"] = "") -> str:
        """The name of a table with the ids of the rows in which all these words occur.

        Texts do not change while a build stands, and reading them takes longer than anything else a page
        does: they are searched once, and the result is kept in memory for the queries that follow.

        Args:
            words: in lower case, as from `RowFilter.words`.
            text_in: where they have to occur; see `RowFilter`.
        """
        digest = hashlib.blake2b("\0".join([build, text_in, *words]).encode("utf-8", "surrogatepass"), digest_size=12)
        name = f"memory.main.found_{digest.hexdigest()}"
        # Two who look for the same words search once; most who look for others need not wait.
        search = self._searches[digest.digest()[0] % SEARCH_LOCKS]
        with search, self.reading() as cursor:
            if self._searched.get(name) != self._files.generation:
                condition, parameters = RowFilter(text=" ".join(f'"{word}"' for word in words), text_in=text_in).sql()
                query = f"SELECT example_id FROM audit.main.examples e WHERE {condition}"
                cursor.execute(f"CREATE OR REPLACE TABLE {name} AS {query}", parameters)
            self._remember(cursor, name)
        return name

    def _remember(self, cursor: Cursor, name: str) -> None:
        """Keep a search as the latest, and let the one go that nobody has asked for longest."""
        with self._search_guard:
            self._searched.pop(name, None)
            self._searched[name] = self._files.generation
            forgotten = next(iter(self._searched)) if len(self._searched) > SEARCHES_KEPT else None
            if forgotten is not None:
                del self._searched[forgotten]
                cursor.execute(f"DROP TABLE IF EXISTS {forgotten}")

    def _may_read(self) -> bool:
        # A reader who joins others sees the store that they see, which a build may have replaced.
        joins = not self._readers or not self._files.replaced()
        return joins and not self._writing and not self._waiting_writers

    @contextmanager
    def _alone(self, wanted: Mapping[str, Access]) -> Iterator[None]:
        if self._sealed:
            raise StoreError(
                f"{self._layout.root.name}: opened read-only, so nothing is computed or changed; open it without "
                "--read-only"
            )
        self._refuse_nesting()
        with self._turn:
            self._waiting_writers += 1
            try:
                self._turn.wait_for(lambda: not self._writing and not self._readers)
                self._files.open(wanted)
                self._writing = True
            finally:
                self._waiting_writers -= 1
                self._turn.notify_all()
        self._mine.lease = True
        try:
            yield
        except BaseException as error:
            self._files.broke(error)
            raise
        finally:
            self._mine.lease = False
            with self._turn:
                self._writing = False
                self._files.release()
                self._turn.notify_all()

    def _bound(self, cursor: Cursor, limit: int, keep: Collection[int], since: datetime) -> None:
        """Keep ``derived`` within its bound: the transaction is over, so what is in it counts already."""
        self._files.settle("derived")
        taken, free = self._files.taken("derived")
        if taken + free <= limit:
            return
        with self._transaction(cursor, self._layout.derived):
            derived.trim(cursor, taken, limit, keep, since)
        self._files.settle("derived")
        taken, free = self._files.taken("derived")
        # Room that is free is used again by what comes: only a file that is mostly air is worth writing anew.
        if taken + free > limit and free > taken:
            self._files.compact("derived")

    def _refuse_nesting(self) -> None:
        if getattr(self._mine, "lease", False):
            raise RuntimeError("this thread holds a lease on the database already")

    @contextmanager
    def _cursor(self, name: str) -> Iterator[Cursor]:
        cursor = self._files.cursor()
        try:
            cursor.execute(f"USE {name}")
            yield cursor
        finally:
            cursor.close()

    @contextmanager
    def _transaction(self, cursor: Cursor, path: Path) -> Iterator[None]:
        try:
            cursor.execute("BEGIN")
            yield
            cursor.execute("COMMIT")
        except Exception as error:
            self._files.broke(error)
            roll_back(cursor)
            refused = as_store_error(path, error)
            if refused is None:
                raise
            raise refused from error
        except BaseException:
            roll_back(cursor)
            raise
