"""Flags on rows, their log, and views that have a name."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from concept_audit.api.base import DEFAULTS, user_name
from concept_audit.api.rankings import Rankings
from concept_audit.pipeline.attribution import InfluenceOptions
from concept_audit.store import flags, workspace
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


class Flags(Rankings):
    """What people decide about rows; every change is in the log and can be undone."""

    def flag(self, content_hashes: Sequence[str], flag: str = "remove", note: str = "", by: str = "") -> FlagChange:
        """Flag rows by content; copies of a row share its flag."""
        who = by or user_name()
        return self._change(lambda cursor: flags.set_flags(cursor, content_hashes, flag, note, who), WITHOUT_FLAGS)

    def unflag(self, content_hashes: Sequence[str], by: str = "") -> FlagChange:
        """Take the flags off rows."""
        who = by or user_name()
        return self._change(lambda cursor: flags.set_flags(cursor, content_hashes, None, "", who), WITHOUT_FLAGS)

    def flag_matching(
        self,
        where: RowFilter,
        flag: str | None,
        concept: str | None = None,
        method: str = "vector_filter",
        note: str = "",
        by: str = "",
        options: InfluenceOptions = DEFAULTS,
        top: int | None = None,
        how: str = "",
    ) -> FlagChange:
        """Flag every row that passes a filter, or take its flag off where `flag` is None.

        Args:
            top: only the first so many of them, by rank.
            how: in words, how they were chosen, for the log.
        """
        ranking, where = self.ranking(concept, method, options) if concept else None, self._searched(where)
        who, told = by or user_name(), how or (f"first {top:,} that match" if top else "all that match")
        return self._change(
            lambda cursor: flags.flag_matching(cursor, ranking, where, flag, note, who, told, top), WITHOUT_FLAGS
        )

    def undo_flags(self, event_id: int, by: str = "") -> FlagChange:
        """Undo a change of flags; texts that somebody has changed since keep what they have.

        Raises:
            StoreError: no such change.
        """
        return self._change(lambda cursor: flags.undo(cursor, event_id, by or user_name()), WITHOUT_FLAGS)

    def flag_log(self, limit: int = 100) -> pd.DataFrame:
        """The latest changes of flags, newest first: event_id, action, n_texts, how, note, undone, made_by, made_at."""
        return self._kept(("log", limit), lambda cursor: flags.log(cursor, limit))

    def undoable_flags(self, by: str = "") -> pd.DataFrame:
        """The latest change that somebody has made and not undone, as a row of `flag_log`; empty if there is none."""
        who = by or user_name()
        return self._kept(("undoable", who), lambda cursor: flags.undoable(cursor, who))

    def latest_flag_change(self) -> tuple[int, str]:
        """The number of the latest change of flags, and who made it."""
        return self._kept("latest", flags.latest)

    def save_view(self, name: str, page: str, query: str, by: str = "") -> None:
        """Keep a view under a name: a page's path and its query string."""
        self._change(lambda cursor: workspace.save_view(cursor, name.strip()[:80], page, query, by or user_name()))

    def saved_views(self) -> pd.DataFrame:
        """Views that have a name: name, page, query, saved_by, saved_at."""
        return self._kept("views", workspace.saved_views)

    def delete_view(self, name: str) -> None:
        """Forget a named view."""
        self._change(lambda cursor: workspace.delete_view(cursor, name))
