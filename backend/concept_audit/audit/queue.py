"""The queue of rows to label: which one next, for a probe."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from concept_audit.audit.labels import Labels
from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.audit.probes import Probes
from concept_audit.audit.rankings import Rankings
from concept_audit.influence.options import InfluenceOptions
from concept_audit.store import queries, workspace
from concept_audit.store.bulk_labels import LabelChange, label_matching, undo_labels
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import require_rankings
from concept_audit.store.filters import RowFilter

KINDS = ("likely", "uncertain", "unlikely")


class Queue:
    """Rows that are worth a label, and labels for many at once."""

    def __init__(self, opened: OpenAudit, labels: Labels, probes: Probes, rankings: Rankings):
        self._opened = opened
        self._labels = labels
        self._probes = probes
        self._rankings = rankings

    def next(self, probe: str, where: RowFilter, kinds: Sequence[str] = KINDS) -> tuple[str, pd.Series] | None:
        """The first of `upcoming`; None if none is left."""
        return next(iter(self.upcoming(probe, where, 1, kinds)), None)

    def upcoming(
        self, probe: str, where: RowFilter, count: int, kinds: Sequence[str] = KINDS
    ) -> list[tuple[str, pd.Series]]:
        """The next rows that have no label and were not skipped, each with why it is offered.

        Before the probe is trained rows come in an order that looks random; then likely, uncertain and
        unlikely ones in turn: the highest scores, those nearest to the boundary, the lowest. Of copies the first.

        Args:
            count: rows at most.
            kinds: of `KINDS`, those to offer.
        """
        where = self._opened.searched(where)
        trained = self._probes.find(probe)
        if trained is None or not kinds:
            return self._opened.read(
                lambda cursor: _listed(
                    "shuffled", queries.unlabelled(cursor, probe, where, None, "shuffled", 0.0, limit=count)
                )
            )
        counts = self._labels.counts().set_index("probe")
        done = (
            int(counts.loc[[probe], ["positives", "negatives", "skipped"]].to_numpy().sum())
            if probe in counts.index
            else 0
        )
        turns = [kinds[(done + place) % len(kinds)] for place in range(count)]
        boundary = float(trained.details.get("boundary", 0.0))

        def in_turn(cursor: Cursor, ranking: int) -> list[tuple[str, pd.Series]]:
            require_rankings(cursor, [ranking])
            found: list[tuple[str, pd.Series]] = []
            for kind in turns:
                seen = [row["content_hash"] for _, row in found]
                found += _listed(kind, queries.unlabelled(cursor, probe, where, ranking, kind, boundary, seen))
            return found

        # A label is of what a rollout says, whatever its advantage, and so is the boundary.
        asked = (f"probe:{probe}", "vector_filter", DEFAULTS.changed(alike=True))
        return self._rankings.using([asked], lambda ranking: self._opened.read(lambda cursor: in_turn(cursor, ranking)))

    def skip(self, probe: str, content_hashes: Sequence[str]) -> None:
        """Offer these texts no more."""
        name = workspace.check_probe_name(probe)
        self._opened.change(lambda cursor: workspace.skip(cursor, name, content_hashes))

    def unskip(self, probe: str, content_hash: str) -> None:
        """Offer a text again."""
        self._opened.change(lambda cursor: workspace.unskip(cursor, probe, content_hash))

    def label_matching(
        self,
        probe: str,
        label: int,
        where: RowFilter,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        top: int | None = None,
    ) -> LabelChange:
        """Give every row that passes a filter a label of a probe: 1 where it shows the concept, 0 where it does not.

        Args:
            top: only the first so many of them, by rank.
        """
        name, where = workspace.check_probe_name(probe), self._opened.searched(where)

        def change(ranking: int | None = None) -> LabelChange:
            return self._opened.change(
                lambda cursor: label_matching(cursor, ranking, where, name, label, top), ranked=ranking is not None
            )

        return self._rankings.using([(concept, method, options)] if concept else [], change)

    def undo_labels(self, change: LabelChange) -> int:
        """Take back what `label_matching` did, the whole in one; returns how many texts have changed."""
        return self._opened.change(lambda cursor: undo_labels(cursor, change))


def _listed(kind: str, rows: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    return [(kind, row) for _, row in rows.iterrows()]
