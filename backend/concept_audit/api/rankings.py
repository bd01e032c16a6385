"""Rows by influence on a concept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.api.base import DEFAULTS, EVERY_ROW
from concept_audit.api.concepts import Concepts
from concept_audit.errors import StoreError
from concept_audit.export import with_metadata
from concept_audit.pipeline.attribution import InfluenceOptions
from concept_audit.pipeline.groups import against_group, group_table
from concept_audit.pipeline.index import IndexOptions, build_index, open_index, warm_index
from concept_audit.pipeline.rank import Request, finished, scores_of, scores_of_many
from concept_audit.progress import Progress
from concept_audit.store import compare, queries, workspace
from concept_audit.store import features as store_features
from concept_audit.store.filters import RowFilter
from concept_audit.store.index import index_files
from concept_audit.types import Concept

STALE_SECONDS = 120.0
RANK_COLUMNS = ["rank", "example_id", "score", "percentile", "prompt", "response"]


class Rankings(Concepts):
    """Rankings of the rows."""

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

        Ranks are among all rows, whatever the filter. The ranking is computed if it is not in the store.

        Args:
            method: one of `METHODS`.
            options: how influence is computed, for the methods that need to know.
        """
        ranking, where = self.ranking(concept, method, options), self._searched(where)
        key = ("rank", ranking, repr(where), top, offset)
        return self._kept(key, lambda cursor: queries.rows(cursor, ranking, where, top, offset))

    def rank_table(
        self,
        concept: str,
        method: str = "vector_filter",
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """`rank` as a table to take away: `RANK_COLUMNS`, then a column for each metadata field."""
        return with_metadata(self.rank(concept, method, top, where, options=options), RANK_COLUMNS)

    def rows(self, where: RowFilter = EVERY_ROW, limit: int | None = None, offset: int = 0) -> pd.DataFrame:
        """Rows in the order of the data."""
        where = self._searched(where)
        return self._read(lambda cursor: queries.rows(cursor, None, where, limit, offset))

    def sample(self, where: RowFilter, seed: str, limit: int) -> pd.DataFrame:
        """Rows in an order that looks random but is the same for a seed."""
        return self._read(lambda cursor: queries.sample(cursor, where, seed, limit))

    def count(
        self,
        where: RowFilter,
        concept: str | None = None,
        method: str = "vector_filter",
        options: InfluenceOptions = DEFAULTS,
    ) -> int:
        """How many rows pass a filter; with a concept, of those that it ranks."""
        ranking = self.ranking(concept, method, options) if concept else None
        where = self._searched(where)
        key = ("count", ranking, repr(where))
        return self._kept(key, lambda cursor: queries.count_rows(cursor, ranking, where))

    def histogram(
        self,
        concept: str,
        method: str = "vector_filter",
        where: RowFilter = EVERY_ROW,
        bins: int = 60,
        options: InfluenceOptions = DEFAULTS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bin edges, counts of all rows, and counts of the rows that pass the filter."""
        ranking, where = self.ranking(concept, method, options), self._searched(where)
        key = ("histogram", ranking, repr(where), bins)
        return self._kept(key, lambda cursor: queries.histogram(cursor, ranking, where, bins))

    def score_summary(
        self, concept: str, method: str = "vector_filter", options: InfluenceOptions = DEFAULTS
    ) -> dict[str, float]:
        """Mean, deviation and count of a ranking's scores."""
        ranking = self.ranking(concept, method, options)
        return self._kept(("summary", ranking), lambda cursor: queries.score_summary(cursor, ranking))

    def ranking(
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
        found = self.concept(concept)
        ranking, wanted, stored = self._asked(found, method, options)
        if stored:
            return ranking
        scores = scores_of(self._sources(), wanted, ranking, progress or self._progress)
        build = self._read(queries.build_id)
        self._write(lambda cursor: workspace.save_ranking(cursor, build, found, method, wanted.parameters, scores))
        finished(self._sources(), wanted, ranking)
        return ranking

    def has_ranking(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking is in the store, so that asking for it costs nothing.

        Raises:
            ConceptError: as `ranking`.
        """
        return self._asked(self.concept(concept), method, options)[2]

    def _asked(self, concept: Concept, method: str, options: InfluenceOptions) -> tuple[int, Request, bool]:
        """A ranking's id and what it depends on, and whether it is in the store; remembered."""

        def settle() -> tuple[int, Request, bool]:
            ranking, wanted = self._request(concept, method, options)
            return ranking, wanted, self._stored(ranking)

        return self._remembered(("asked", concept.concept_id, method, repr(options)), settle)

    def rank_many(
        self,
        concepts: Sequence[str],
        method: str = "concept_influence",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:
        """Put the rankings of several concepts into the store; the index answers them in one sweep.

        Raises:
            ConceptError, StoreError: as `ranking`.
        """
        missing = {}
        told = progress or self._progress
        with told.stage("Queries of the concepts", len(concepts), "concepts") as stage:
            for name in concepts:
                ranking, wanted, stored = self._asked(self.concept(name), method, options)
                if not stored:
                    missing[ranking] = wanted
                stage.advance()
        indexed = {ranking: wanted for ranking, wanted in missing.items() if wanted.index is not None}
        if indexed:
            scores = scores_of_many(self._sources(), list(indexed.values()), told)
            build = self._read(queries.build_id)

            def save(cursor) -> None:
                for place, wanted in enumerate(indexed.values()):
                    workspace.save_ranking(cursor, build, wanted.concept, method, wanted.parameters, scores[:, place])

            self._write(save)
        for wanted in missing.values():
            if wanted.index is None:
                self.ranking(wanted.concept.concept_id, method, options, progress)

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
        ranking = self.ranking(concept, method, options)
        second = self.ranking(concept, beside, beside_options or options) if beside else None
        return self._read(lambda cursor: group_table(cursor, ranking, by, second))

    def scores_elsewhere(self, concept: str, example_ids: Sequence[int]) -> pd.DataFrame:
        """What the stored rankings of a concept say of rows: method, parameters, example_id, score, rank, percentile."""
        found = self.concept(concept).concept_id
        ids = [int(i) for i in example_ids]
        return self._kept(("elsewhere", found, tuple(ids)), lambda cursor: compare.scores_elsewhere(cursor, found, ids))

    # Two rankings beside each other; a ranking is (concept, method, options)

    def agreement(self, one: tuple, other: tuple, where: RowFilter = EVERY_ROW) -> compare.Agreement:
        """Rank correlation and overlap of the first rows of two rankings, among the rows that pass a filter."""
        a, b, where = self.ranking(*one), self.ranking(*other), self._searched(where)
        return self._kept(("agreement", a, b, repr(where)), lambda cursor: compare.agreement(cursor, a, b, where))

    def points(self, one: tuple, other: tuple, where: RowFilter = EVERY_ROW, limit: int = 2000) -> pd.DataFrame:
        """At most `limit` rows with the scores, ranks and percentiles (a_… and b_…) that two rankings give them."""
        a, b, where = self.ranking(*one), self.ranking(*other), self._searched(where)
        key = ("points", a, b, repr(where), limit)
        return self._kept(key, lambda cursor: compare.points(cursor, a, b, where, limit))

    def disagreements(
        self, one: tuple, other: tuple, where: RowFilter = EVERY_ROW, higher: str = "either", limit: int = 10
    ) -> pd.DataFrame:
        """Rows on which two rankings differ most by percentile; `higher` is ``a``, ``b`` or ``either``."""
        a, b, where = self.ranking(*one), self.ranking(*other), self._searched(where)
        return self._read(lambda cursor: compare.disagreements(cursor, a, b, where, higher, limit))

    # What is known of the rows

    def against_group(self, concept: str, kind: str, name: str = "", value: str = "", k: int = 50) -> pd.DataFrame:
        """How well the stored rankings of a concept put a group of rows first; see `against_group` of the pipeline.

        Args:
            kind, name, value: the group, as for `separating_features`.
        """
        found = self.concept(concept).concept_id
        group, parameters = store_features.group_of(kind, name, value)
        return self._read(lambda cursor: against_group(cursor, found, group, parameters, k))

    def agreement_matrix(self, concept: str) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Spearman correlations among the stored rankings of a concept: (method, parameters) and [n, n]."""
        found = self.concept(concept).concept_id
        return self._read(lambda cursor: compare.matrix(cursor, found))

    # The gradient index

    def build_index(
        self, options: IndexOptions | None = None, layers: Sequence[int] | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Build the gradient index, or what is missing of it; see `IndexOptions`.

        Args:
            layers: where concepts may live; None for the layers that the audit keeps.

        Returns:
            its description, with the fidelity that was found.
        """
        lm = self.model()
        chosen = tuple(layers) if layers else self.layers
        lm.check_layers(chosen)
        data = self.manifest.stages["read"]["key"]
        return build_index(self._layout, lm, data, chosen, options or IndexOptions(), progress or self._progress)

    def index(self) -> dict[str, Any] | None:
        """The description of the gradient index, if there is one that fits this audit."""
        return self._remembered("index", self._index)

    def _index(self) -> dict[str, Any] | None:
        manifest = self._made
        try:
            return open_index(self._layout, manifest.fingerprints["model"], manifest.stages["read"]["key"])
        except StoreError:
            return None

    def index_progress(self) -> dict[str, Any] | None:
        """How far the building of the index is: stage, share, seconds_left; None if none is being built."""
        told = index_files(self._layout).reported()
        # A process that was killed leaves its last report behind.
        return told if told and time.time() - told["at"] < STALE_SECONDS else None

    def warm(self) -> None:
        """Load what a new concept's influence needs, so that the first one is as fast as the next."""
        if self.index() is not None:
            warm_index(self._layout, self.model(), self.index())

    def served_by_index(self, concept: str, method: str, options: InfluenceOptions = DEFAULTS) -> bool:
        """Whether a ranking that is not in the store yet would come from the gradient index, in seconds.

        Raises:
            ConceptError: as `ranking`.
        """
        return self._asked(self.concept(concept), method, options)[1].index is not None
