"""Flags on rows, and their log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from concept_audit.audit.opened import DEFAULTS, OpenAudit, user_name
from concept_audit.audit.rankings import Rankings
from concept_audit.influence.options import InfluenceOptions
from concept_audit.store import flags as store_flags
from concept_audit.store.cursor import Cursor
from concept_audit.store.filters import RowFilter
from concept_audit.store.flags import FlagChange

WITHOUT_FLAGS = frozenset(
    {
        "agreement",
        "asked",
        "concept",
        "concepts",
        "elsewhere",
        "feature",
        "features",
        "index",
        "label_counts",
        "labels",
        "points",
        "probes",
        "similar",
        "summary",
        "versions",
        "views",
    }
)
"""What is remembered and does not depend on flags."""


class Flags:
    """What people decide about rows; every change is in the log and can be undone."""

    def __init__(self, opened: OpenAudit, rankings: Rankings):
        self._opened = opened
        self._rankings = rankings

    def set(
        self, content_hashes: Sequence[str], flag: str = "remove", note: str | None = None, by: str = ""
    ) -> FlagChange:
        """Flag rows by content; copies of a row share its flag.

        The flag ``keep`` says that a row has been seen and stays: it counts as not flagged.

        Args:
            note: what the flag goes with; None leaves each row the note that it has.
        """
        who = by or user_name()
        return self._change(lambda cursor: store_flags.set_flags(cursor, content_hashes, flag, note, who))

    def clear(self, content_hashes: Sequence[str], by: str = "") -> FlagChange:
        """Take the flags off rows."""
        who = by or user_name()
        return self._change(lambda cursor: store_flags.set_flags(cursor, content_hashes, None, "", who))

    def set_matching(
        self,
        where: RowFilter,
        flag: str | None,
        concept: str | None = None,
        method: str | None = None,
        note: str | None = None,
        by: str = "",
        options: InfluenceOptions = DEFAULTS,
        top: int | None = None,
        how: str = "",
    ) -> FlagChange:
        """Flag every row that passes a filter, or take its flag off where `flag` is None.

        Args:
            note: what the flag goes with; None leaves each row the note that it has.
            top: only the first so many of them, by rank.
            how: in words, how they were chosen, for the log.
        """
        return self._matching(
            lambda cursor, ranking, where, who, how: store_flags.flag_matching(
                cursor, ranking, where, flag, note, who, how, top
            ),
            *(where, concept, method, by, options, top, how),
        )

    def note_matching(
        self,
        where: RowFilter,
        note: str,
        concept: str | None = None,
        method: str | None = None,
        by: str = "",
        options: InfluenceOptions = DEFAULTS,
        top: int | None = None,
        how: str = "",
    ) -> FlagChange:
        """Write a note on every flagged row that passes a filter; each keeps its flag, and rows without stay as they are.

        Args:
            top, how: as for `set_matching`.
        """
        return self._matching(
            lambda cursor, ranking, where, who, how: store_flags.note_matching(
                cursor, ranking, where, note, who, how, top
            ),
            *(where, concept, method, by, options, top, how),
        )

    def _matching(
        self,
        change: Callable[[Cursor, int | None, RowFilter, str, str], FlagChange],
        where: RowFilter,
        concept: str | None,
        method: str | None,
        by: str,
        options: InfluenceOptions,
        top: int | None,
        how: str,
    ) -> FlagChange:
        """Make a change of the rows that pass a filter: given the ranking, the filter, who makes it and how in words."""
        where = self._opened.searched(where)
        who, how = by or user_name(), how or (f"first {top:,} that match" if top else "all that match")

        def made(ranking: int | None = None) -> FlagChange:
            return self._opened.change(
                lambda cursor: change(cursor, ranking, where, who, how), WITHOUT_FLAGS, ranked=ranking is not None
            )

        return self._rankings.using([(concept, method, options)] if concept else [], made)

    def undo(self, event_id: int, by: str = "") -> FlagChange:
        """Undo a change of flags; texts that somebody has changed since keep what they have.

        Raises:
            StoreError: no such change.
        """
        return self._change(lambda cursor: store_flags.undo(cursor, event_id, by or user_name()))

    def of(self, content_hashes: Sequence[str]) -> dict[str, str]:
        """The flags of texts, by content; those without one are left out."""
        return self._opened.read(lambda cursor: store_flags.flags_of(cursor, content_hashes))

    def verdicts(
        self,
        where: RowFilter,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        top: int | None = None,
    ) -> dict[str | None, int]:
        """How many of the rows that pass a filter have which flag; None stands for those that nobody has judged.

        Args:
            top: only the first so many of them, by rank.
        """
        where = self._opened.searched(where)

        def counted(ranking: int | None = None) -> dict[str | None, int]:
            key = ("verdicts", ranking, repr(where), top)
            return dict(self._opened.cached_read(key, lambda cursor: store_flags.verdicts(cursor, ranking, where, top)))

        return self._rankings.using([(concept, method, options)] if concept else [], counted)

    def log(self, limit: int = 100) -> pd.DataFrame:
        """The latest changes, newest first: event_id, action, n_texts, how, note, undoes, undone, made_by, made_at."""
        return self._opened.cached_read(("log", limit), lambda cursor: store_flags.log(cursor, limit))

    def undoable(self, by: str = "") -> pd.DataFrame:
        """The latest change that somebody has made and not undone, as a row of `log`; empty if there is none."""
        who = by or user_name()
        return self._opened.cached_read(("undoable", who), lambda cursor: store_flags.undoable(cursor, who))

    def latest(self) -> tuple[int, str]:
        """The number of the latest change, and who made it; 0 and nobody if there is none."""
        return self._opened.cached_read("latest", store_flags.latest)

    def _change(self, change: Callable) -> FlagChange:
        return self._opened.change(change, WITHOUT_FLAGS)
