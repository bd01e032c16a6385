"""Rows by influence on a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.metadata import with_metadata
from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.groups import group_table
from concept_audit.pipeline.rank import Request, claimed, finished, request, scores_of, scores_of_many
from concept_audit.progress import Progress
from concept_audit.store import compare, queries, workspace
from concept_audit.store.cursor import Cursor
from concept_audit.store.filters import RowFilter
from concept_audit.store.rankings import ranking_id

RANK_COLUMNS = ["rank", "example_id", "score", "percentile", "prompt", "response"]


@dataclass(frozen=True)
class Ranking:
    """A ranking that was asked for.

    Attributes:
        id: what it has in the store; a hash of what it is of.
        request: what it depends on.
        stored: whether it is in the store, so that asking for it costs nothing.
    """

    id: int
    request: Request
    stored: bool


class Rankings:
    """Rankings of the rows: computed when first asked for, and kept."""

    def __init__(self, opened: OpenAudit, concepts: Concepts):
        self._opened = opened
        self._concepts = concepts

    def rank(
        self,
        concept: str,
        method: str = "vector_filter",
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        offset: int = 0,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """Rows by influence on a concept: rank, score, percentile, then the row. Rank 1 pushes most.

        Ranks are among all rows, whatever the filter. The ranking is computed if it is not in the store. ``is_query``
        marks rows that are query examples: they are scored by the others, unless `QueryOptions` say otherwise.

        Args:
            method: one of `METHODS`.
            options: how influence is computed, for the methods that need to know.
        """
        ranking, where = self.ensure(concept, method, options), self._opened.searched(where)
        key = ("rank", ranking, repr(where), top, offset)
        return self._opened.cached_read(key, lambda cursor: queries.rows(cursor, ranking, where, top, offset))

    def table(
        self,
        concept: str,
        method: str = "vector_filter",
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """`rank` as a table to take away: `RANK_COLUMNS`, a column for each metadata field, then ``is_query``."""
        ranked = self.rank(concept, method, top, where, options=options)
        table = with_metadata(ranked, [*RANK_COLUMNS, "is_query"])
        return table[[*(name for name in table if name != "is_query"), "is_query"]]

    def ensure(
        self,
        concept: str,
        method: str = "vector_filter",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> int:
        """The id of a ranking in the store, where it is put if it is not there.

        A computation that is interrupted goes on where it was when it is asked for again.

        Raises:
            ConceptError: no such concept, method or layer, or no queries.
            ModelError: the model has no weights to attribute to, or a row does not fit into memory.
        """
        found = self.find(concept, method, options)
        if found.stored:
            return found.id
        wanted, sources = found.request, self._opened.sources()
        reported = progress or self._opened.progress
        with claimed(sources, wanted, found.id, reported):
            # Another process may have put it there while this one waited.
            if not self._opened.read(lambda cursor: queries.ranking_stored(cursor, found.id)):
                scores = scores_of(sources, wanted, found.id, reported)
                self._save([wanted], scores[:, None])
                finished(sources, wanted, found.id)
        return found.id

    def ensure_many(
        self,
        concepts: Sequence[str],
        method: str = "concept_influence",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:
        """Put the rankings of several concepts into the store; the index answers them in one sweep.

        Raises:
            ConceptError, ModelError: as `ensure`.
        """
        missing: dict[int, Request] = {}
        reported = progress or self._opened.progress
        with reported.stage("Queries of the concepts", len(concepts), "concepts") as stage:
            for name in concepts:
                found = self.find(name, method, options)
                if not found.stored:
                    missing[found.id] = found.request
                stage.advance()
        indexed = [wanted for wanted in missing.values() if wanted.index is not None]
        if indexed:
            self._save(indexed, scores_of_many(self._opened.sources(), indexed, reported))
        for wanted in missing.values():
            if wanted.index is None:
                self.ensure(wanted.concept.concept_id, method, options, progress)

    def find(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> Ranking:
        """A ranking's id, what it depends on, and whether it is in the store; nothing is computed.

        Raises:
            ConceptError: as `ensure`.
        """
        found = self._concepts.get(concept)

        def resolve() -> Ranking:
            wanted = request(self._opened.sources(), found, method, options)
            ranking = ranking_id(self._opened.build_id, found.concept_id, found.version, method, wanted.parameters)
            stored = self._opened.read(lambda cursor: queries.ranking_stored(cursor, ranking))
            return Ranking(ranking, wanted, stored)

        return self._opened.remembered(("asked", found.concept_id, method, repr(options)), resolve)

    def has(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking is in the store, so that asking for it costs nothing.

        Raises:
            ConceptError: as `ensure`.
        """
        return self.find(concept, method, options).stored

    def served_by_index(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking that is not in the store yet would come from the gradient index, in seconds.

        Raises:
            ConceptError: as `ensure`.
        """
        return self.find(concept, method, options).request.index is not None

    def histogram(
        self,
        concept: str,
        method: str = "vector_filter",
        where: RowFilter = EVERY_ROW,
        bins: int = 60,
        options: InfluenceOptions = DEFAULTS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bin edges, counts of all rows, and counts of the rows that pass the filter."""
        ranking, where = self.ensure(concept, method, options), self._opened.searched(where)
        key = ("histogram", ranking, repr(where), bins)
        return self._opened.cached_read(key, lambda cursor: queries.histogram(cursor, ranking, where, bins))

    def summary(
        self, concept: str, method: str = "vector_filter", options: InfluenceOptions = DEFAULTS
    ) -> dict[str, float]:
        """Mean, deviation and count of a ranking's scores."""
        ranking = self.ensure(concept, method, options)
        return self._opened.cached_read(("summary", ranking), lambda cursor: queries.score_summary(cursor, ranking))

    def scores_elsewhere(self, concept: str, example_ids: Sequence[int]) -> pd.DataFrame:
        """What the stored rankings of a concept say of rows.

        Returns:
            ranking_id, method, parameters (JSON), example_id, score, rank, percentile.
        """
        found, ids = self._concepts.get(concept).concept_id, [int(i) for i in example_ids]
        key = ("elsewhere", found, tuple(ids))
        return self._opened.cached_read(key, lambda cursor: compare.scores_elsewhere(cursor, found, ids))

    def groups(
        self,
        concept: str,
        method: str = "concept_influence",
        by: str = "sae_feature",
        options: InfluenceOptions = DEFAULTS,
        beside: str | None = None,
        beside_options: InfluenceOptions | None = None,
    ) -> pd.DataFrame:
        """Influence by group of rows: SAE features (rows in which one fires), sources, flags, or a metadata field.

        Args:
            by: ``sae_feature``, ``source``, ``flag``, or the name of a metadata field.
            beside: a second method, whose mean is put beside the first's.
            beside_options: its options; None for the same.

        Returns:
            group, label, n_rows, mean, low, high (95% bootstrap interval of the mean) and difference (of the
            mean from that of all rows, in standard deviations of the scores), by mean, largest first; with
            `beside`, also beside_mean, beside_low, beside_high.
        """
        ranking = self.ensure(concept, method, options)
        second = self.ensure(concept, beside, beside_options or options) if beside else None
        return self._opened.read(lambda cursor: group_table(cursor, ranking, by, second))

    def _save(self, wanted: Sequence[Request], scores: np.ndarray) -> None:
        """Keep scores, [rows, requests]."""
        build = self._opened.read(queries.build_id)

        def save(cursor: Cursor) -> None:
            for place, each in enumerate(wanted):
                workspace.save_ranking(cursor, build, each.concept, each.method, each.parameters, scores[:, place])

        self._opened.write(save)
