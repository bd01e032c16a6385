"""The queue of rows to label: which one next, for a probe."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from concept_audit.audit.labels import Labels
from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.audit.probes import Probes
from concept_audit.audit.rankings import Rankings
from concept_audit.store import queries, workspace
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import require_rankings
from concept_audit.store.filters import RowFilter

KINDS = ("likely", "uncertain", "unlikely")


class Queue:
    """Rows that are worth a label."""

    def __init__(self, opened: OpenAudit, labels: Labels, probes: Probes, rankings: Rankings):
        self._opened = opened
        self._labels = labels
        self._probes = probes
        self._rankings = rankings

    def next(self, probe: str, where: RowFilter, kinds: Sequence[str] = KINDS) -> tuple[str, pd.Series] | None:
        """A row that has no label and was not skipped, and why it is offered; None if none is left.

        Before the probe is trained rows come in an order that looks random; then likely, uncertain and
        unlikely ones in turn: the highest scores, those nearest to the boundary, the lowest.

        Args:
            kinds: of `KINDS`, those to offer.
        """
        where = self._opened.searched(where)
        trained = self._probes.find(probe)
        if trained is None or not kinds:
            return self._first(probe, where, "shuffled")
        counts = self._labels.counts().set_index("probe")
        done = (
            int(counts.loc[[probe], ["positives", "negatives", "skipped"]].to_numpy().sum())
            if probe in counts.index
            else 0
        )
        boundary = float(trained.details.get("boundary", 0.0))
        asked = (f"probe:{probe}", "vector_filter", DEFAULTS)
        return self._rankings.using(
            [asked], lambda ranking: self._first(probe, where, kinds[done % len(kinds)], ranking, boundary)
        )

    def skip(self, probe: str, content_hashes: Sequence[str]) -> None:
        """Offer these texts no more."""
        name = workspace.check_probe_name(probe)
        self._opened.change(lambda cursor: workspace.skip(cursor, name, content_hashes))

    def unskip(self, probe: str, content_hash: str) -> None:
        """Offer a text again."""
        self._opened.change(lambda cursor: workspace.unskip(cursor, probe, content_hash))

    def _first(
        self, probe: str, where: RowFilter, kind: str, ranking: int | None = None, boundary: float = 0.0
    ) -> tuple[str, pd.Series] | None:

        def first(cursor: Cursor) -> pd.DataFrame:
            require_rankings(cursor, [] if ranking is None else [ranking])
            return queries.unlabelled(cursor, probe, where, ranking, kind, boundary)

        found = self._opened.read(first)
        return None if found.empty else (kind, found.iloc[0])
