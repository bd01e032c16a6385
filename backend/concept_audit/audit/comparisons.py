"""Rankings beside each other, and beside what is known of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.opened import EVERY_ROW, OpenAudit
from concept_audit.audit.rankings import Asked, Rankings
from concept_audit.influence.options import InfluenceOptions
from concept_audit.metrics import Estimate, auroc_interval
from concept_audit.pipeline.groups import against_group
from concept_audit.store import compare
from concept_audit.store.features import group_of
from concept_audit.store.filters import RowFilter
from concept_audit.types import ConceptKind, usual_method

Found = TypeVar("Found")
OWN_SHARE, MOST_OWN, FEWEST = 0.1, 1000, 5
"""Of the rows, those that read most as a concept; of them at most; and of fewer nothing is told."""
READS: dict[ConceptKind, str] = {"probe": "read most as the probe", "sae_feature": "the feature fires most on"}


@dataclass(frozen=True)
class OwnRows:
    """Where concept influence puts the rows that read most as the concept.

    Attributes:
        kind: of the concept.
        area: the AUROC of these rows among all, its interval, and how many they are.
    """

    kind: ConceptKind
    area: Estimate

    @property
    def below(self) -> bool:
        """Whether they stand below the others beyond doubt."""
        return self.area.high < 0.5

    def in_words(self) -> str:
        """What was found, and what it means where they stand below the others."""
        told = (
            f"The {self.area.n:,} rows that {READS[self.kind]} stand above the others with an AUROC of "
            f"{self.area.value:.2f} (95% interval {self.area.low:.2f} to {self.area.high:.2f})."
        )
        if self.below:
            told += (
                " That is below one half: to first order, training on such rows lowers the concept on its query "
                "examples. Rows that show the concept most are therefore not first here; its usual method puts them "
                "first, and Evidence tells what training without them does."
            )
        return told


class Comparisons:
    """Where two rankings agree, where they do not, and which of several is right about a group of rows."""

    def __init__(self, opened: OpenAudit, concepts: Concepts, rankings: Rankings):
        self._opened = opened
        self._concepts = concepts
        self._rankings = rankings

    def agreement(self, one: Asked, other: Asked, where: RowFilter = EVERY_ROW) -> compare.Agreement:
        """Rank correlation and overlap of the first rows of two rankings, among the rows that pass a filter."""
        return self._compared("agreement", one, other, where, compare.agreement)

    def points(self, one: Asked, other: Asked, where: RowFilter = EVERY_ROW, limit: int = 2000) -> pd.DataFrame:
        """At most `limit` rows with the scores, ranks and percentiles (a_… and b_…) that two rankings give them."""
        return self._compared("points", one, other, where, compare.points, limit)

    def disagreements(
        self, one: Asked, other: Asked, where: RowFilter = EVERY_ROW, higher: str = "either", limit: int = 10
    ) -> pd.DataFrame:
        """Rows on which two rankings differ most by percentile, with the columns of `points` and of the row.

        Args:
            higher: ``a`` for rows that the first puts higher, ``b`` for the second, ``either`` for both.
        """
        return self._compared("disagreements", one, other, where, compare.disagreements, higher, limit)

    def correlations(self, concept: str) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Spearman correlations among the stored rankings of a concept: (method, parameters) and [n, n]."""
        found = self._concepts.get(concept).concept_id
        key = ("correlations", found)
        return self._opened.cached_read(key, lambda cursor: compare.matrix(cursor, found))

    def against_group(self, concept: str, kind: str, name: str = "", value: str = "", k: int = 50) -> pd.DataFrame:
        """How well the stored rankings of a concept put a group of rows first; see `against_group` of the pipeline.

        Args:
            kind, name, value: the group, as for `Concepts.separating`.
        """
        found = self._concepts.get(concept).concept_id
        group, parameters = group_of(kind, name, value)
        key = ("against", found, kind, name, value, k)
        return self._opened.cached_read(key, lambda cursor: against_group(cursor, found, group, parameters, k))

    def labelled_rows(self, concept: str) -> int:
        """How many rows were labelled to train a probe; 0 for an SAE feature. `against_group` leaves them out."""
        found = self._concepts.get(concept).concept_id
        return self._opened.read(lambda cursor: compare.labelled_rows(cursor, found))

    def on_own_rows(self, asked: Asked) -> OwnRows | None:
        """How far concept influence puts the rows that read most as the concept above the others: an AUROC.

        These are the first tenth by the concept's usual method (1,000 at most): projections of a probe, activations of
        an SAE feature. Below one half, training on such rows lowers the concept on the query examples, to first order.

        Returns:
            None for other methods, with fewer than 5 rows, and where the usual method's ranking is not there and
            nothing may be computed.
        """
        concept = self._concepts.get(asked[0])
        if self._rankings.find(*asked).identity.method != "concept_influence":
            return None
        usual = (asked[0], usual_method(concept.kind, self._opened.manifest.pair is not None), InfluenceOptions())
        if self._opened.read_only and not self._rankings.has(*usual):
            return None

        def compared(ranking: int, reading: int) -> OwnRows | None:
            ranks, n_rows = self._rankings.read(
                ("own_rows", ranking, reading),
                [ranking, reading],
                lambda cursor: compare.ranks_of_first(cursor, ranking, reading, OWN_SHARE, MOST_OWN),
            )
            n_own, n_other = len(ranks), n_rows - len(ranks)
            if min(n_own, n_other) < FEWEST:
                return None
            # So many of the others stand above each, counted over all of them.
            above = int(ranks.sum()) - n_own * (n_own + 1) // 2
            area = 1 - above / (n_own * n_other)
            return OwnRows(concept.kind, Estimate(area, *auroc_interval(area, n_own, n_other), n=n_own))

        return self._rankings.using([asked, usual], compared)

    def _compared(
        self, name: str, one: Asked, other: Asked, where: RowFilter, query: Callable[..., Found], *more: Any
    ) -> Found:
        searched = self._opened.searched(where)

        def compared(a: int, b: int) -> Found:
            key = (name, a, b, repr(searched), *more)
            return self._rankings.read(key, [a, b], lambda cursor: query(cursor, a, b, searched, *more))

        return self._rankings.using([one, other], compared)
