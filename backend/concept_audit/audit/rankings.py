"""Rows by influence on a concept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.metadata import with_metadata
from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit
from concept_audit.errors import StoreError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.groups import group_table
from concept_audit.pipeline.rank import Request, claimed, finished, request, scores_of, scores_of_many
from concept_audit.progress import Progress
from concept_audit.store import compare, queries, workspace
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import RankingGoneError, refinement, require_rankings, save_ranking
from concept_audit.store.filters import RowFilter
from concept_audit.store.rankings import RankingIdentity, identify, ranked
from concept_audit.store.rollouts import ranks_in_groups
from concept_audit.types import usual_method

ATTEMPTS = 3
SCORES_AT_ONCE = 500_000
"""Rows times rankings that are saved in one lease: others wait for as long as that takes."""
Asked = tuple[str, str | None, InfluenceOptions]
"""A ranking, by concept, method (None for the usual one of its kind) and options."""
Found = TypeVar("Found")
RANK_COLUMNS = ["rank", "example_id", "score", "percentile", "prompt", "response"]
LAST_COLUMNS = ["is_query", "exact"]
IN_GROUP = "rank_in_group"
"""Among the first of `LAST_COLUMNS` where rows are rollouts: a row's place among those of its group."""


@dataclass(frozen=True)
class Ranking:
    """A ranking that was asked for.

    Attributes:
        identity: what it is of: the build, the concept's training, method and parameters.
        request: what it depends on.
        stored: whether it is in the store, so that asking for it costs nothing.
    """

    identity: RankingIdentity
    request: Request
    stored: bool

    @property
    def id(self) -> int:
        """What it has in the store; a hash of what it is of."""
        return self.identity.ranking_id


class Rankings:
    """Rankings of the rows: computed when first asked for, and kept."""

    def __init__(self, opened: OpenAudit, concepts: Concepts):
        self._opened = opened
        self._concepts = concepts

    def rank(
        self,
        concept: str,
        method: str | None = None,
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        offset: int = 0,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """Rows by influence on a concept: rank, score, percentile, then the row. Rank 1 pushes most.

        Ranks are among all rows, whatever the filter. The ranking is computed if it is not in the store. ``is_query``
        marks rows that are query examples: they are scored by the others, unless `QueryOptions` say otherwise.
        ``exact`` marks scores that are no approximation: all, unless the ranking came from the gradient index. Of such
        a one the answer is the index's alone, at once, until `Audit.refine` has scored its first rows exactly.

        Args:
            method: one of `METHODS`; None for `usual_method` of the concept.
            options: how influence is computed, for the methods that need to know.
        """
        where = self._opened.searched(where)
        return self.using([(concept, method, options)], lambda ranking: self._rows(ranking, where, top, offset))

    def table(
        self,
        concept: str,
        method: str | None = None,
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """`rank` as a table to take away: `RANK_COLUMNS`, a column for each metadata field, then `last_columns`."""
        where = self._opened.searched(where)
        last = self.last_columns()

        def rows(ranking: int) -> pd.DataFrame:
            return self.in_groups(ranking, self._rows(ranking, where, top, 0))

        table = with_metadata(self.using([(concept, method, options)], rows), [*RANK_COLUMNS, *last])
        return table[[*(name for name in table if name not in last), *last]]

    def _rows(self, ranking: int, where: RowFilter, top: int | None, offset: int) -> pd.DataFrame:
        key = ("rank", ranking, repr(where), top, offset)
        return self.read(key, [ranking], lambda cursor: queries.rows(cursor, ranking, where, top, offset))

    def last_columns(self) -> list[str]:
        """`LAST_COLUMNS`, and where rows are rollouts ``rank_in_group`` before them."""
        return [IN_GROUP, *LAST_COLUMNS] if self._opened.made.rollouts is not None else LAST_COLUMNS

    def in_groups(self, ranking: int, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows of a ranking, with their places among the rows of their groups where they are rollouts."""
        if self._opened.made.rollouts is None:
            return rows
        ids = rows["example_id"].tolist()

        def read(cursor: Cursor) -> dict[int, int]:
            require_rankings(cursor, [ranking])
            return ranks_in_groups(cursor, ranking, ids)

        places = self._opened.read(read)
        return rows.assign(**{IN_GROUP: [places[i] for i in ids]})

    def ensure(
        self,
        concept: str,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
        keep: Collection[int] = (),
    ) -> int:
        """The id of a ranking in the store, where it is put if it is not there.

        A computation that is interrupted goes on where it was when it is asked for again. One that ends when the
        probe has been trained again meanwhile is of the training that it was asked for, and is said to be.

        Args:
            keep: rankings that are needed beside it, which it must not put out.

        Raises:
            ConceptError: no such concept, method or layer, or no queries.
            ModelError: the model has no weights to attribute to, or a row does not fit into memory.
            StoreError: the audit has been built anew meanwhile, or it is to be computed and nothing may be.
        """
        found = self.find(concept, method, options)
        self._opened.database.used([found.id])
        if found.stored:
            return found.id
        if self._opened.read_only:
            raise StoreError(
                f"{concept} by {found.identity.method}: not computed yet, and the audit is opened read-only, so nothing is; ask for it "
                "once without --read-only, and it is there"
            )
        sources, reported = self._opened.sources(), progress or self._opened.progress
        with claimed(sources, found.request, found.id, reported):
            # Another process may have put it there while this one waited.
            if not self._opened.read(lambda cursor: queries.ranking_stored(cursor, found.id)):
                scores = scores_of(sources, found.request, found.id, reported)
                self._save([found], scores[:, None], [found.id, *keep])
                finished(sources, found.request, found.id)
        self._say_if_old(found, reported)
        return found.id

    def using(self, asked: Sequence[Asked], use: Callable[..., Found], progress: Progress | None = None) -> Found:
        """What comes of rankings, which are computed if they are not in the store.

        Args:
            asked: concept, method and options of each.
            use: given their ids. It is asked again if somebody threw one away meanwhile, as the bound of the file or
                a person may at any time.
        """
        for attempts_left in reversed(range(ATTEMPTS)):
            ids: list[int] = []
            for concept, method, options in asked:
                ids.append(self.ensure(concept, method, options, progress, ids))
            try:
                return use(*ids)
            except RankingGoneError:
                self._opened.forget()
                if not attempts_left:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def read(self, key: Hashable, rankings: Collection[int], query: Callable[[Cursor], Found]) -> Found:
        """As `OpenAudit.cached_read`, of rankings that have to be there.

        Raises:
            RankingGoneError: one is not.
        """

        def checked(cursor: Cursor) -> Found:
            require_rankings(cursor, rankings)
            return query(cursor)

        return self._opened.cached_read(key, checked)

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
        missing: dict[int, Ranking] = {}
        reported = progress or self._opened.progress
        with reported.stage("Queries of the concepts", len(concepts), "concepts") as stage:
            for name in concepts:
                found = self.find(name, method, options)
                if not found.stored:
                    missing[found.id] = found
                stage.advance()
        indexed = [found for found in missing.values() if found.request.index is not None]
        if indexed:
            requests = [found.request for found in indexed]
            self._save(indexed, scores_of_many(self._opened.sources(), requests, reported), list(missing))
        for found in missing.values():
            if found.request.index is None:
                self.ensure(found.identity.concept_id, method, options, progress, list(missing))

    def find(self, concept: str, method: str | None, options: InfluenceOptions = DEFAULTS) -> Ranking:
        """A ranking's id, what it depends on, and whether it is in the store; nothing is computed.

        Raises:
            ConceptError: as `ensure`.
        """
        found = self._concepts.get(concept)
        chosen = method or usual_method(found.kind, self._opened.manifest.pair is not None)

        def resolve() -> Ranking:
            wanted = request(self._opened.sources(), found, chosen, options)
            identity = identify(self._opened.build_id, found, chosen, wanted.parameters, wanted.concept)
            stored = self._opened.read(lambda cursor: queries.ranking_stored(cursor, identity.ranking_id))
            return Ranking(identity, wanted, stored)

        return self._opened.remembered(("asked", found.concept_id, chosen, repr(options)), resolve)

    def has(self, concept: str, method: str | None, options: InfluenceOptions = DEFAULTS) -> bool:
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

    def refinement(
        self, concept: str, method: str | None, options: InfluenceOptions = DEFAULTS
    ) -> dict[str, Any] | None:
        """How far the exact scores of a ranking from the gradient index are, and what they say of it.

        Returns:
            done; scored and wanted (rows of the second stage); exact (rows whose score is exact) and first (the first
            ranks that all are); selected and control (rows); seed; intercept and slope of the other scores'
            calibration; spearman (of index and exact scores on the control: value, low, high); recall (once done, for
            each top: top, value, low, high, rows of the true top that have been scored exactly). Undefined numbers
            are None. None for a ranking whose scores are exact anyway, or all from the index.
        """
        number = self.find(concept, method, options).id
        return self._opened.cached_read(("refinement", number), lambda cursor: refinement(cursor, number))

    def histogram(
        self,
        concept: str,
        method: str | None = None,
        where: RowFilter = EVERY_ROW,
        bins: int = 60,
        options: InfluenceOptions = DEFAULTS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bin edges, counts of all rows, and counts of the rows that pass the filter."""
        where = self._opened.searched(where)

        def counts(ranking: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            key = ("histogram", ranking, repr(where), bins)
            return self.read(key, [ranking], lambda cursor: queries.histogram(cursor, ranking, where, bins))

        return self.using([(concept, method, options)], counts)

    def summary(
        self, concept: str, method: str | None = None, options: InfluenceOptions = DEFAULTS
    ) -> dict[str, float]:
        """Mean, deviation and count of a ranking's scores."""

        def summary(ranking: int) -> dict[str, float]:
            key = ("summary", ranking)
            return self.read(key, [ranking], lambda cursor: queries.score_summary(cursor, ranking))

        return self.using([(concept, method, options)], summary)

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
        asked: list[Asked] = [(concept, method, options)]
        if beside:
            asked.append((concept, beside, beside_options or options))

        def table(ranking: int, second: int | None = None) -> pd.DataFrame:
            wanted = [ranking] if second is None else [ranking, second]
            key = ("groups", *wanted, by)
            return self.read(key, wanted, lambda cursor: group_table(cursor, ranking, by, second))

        return self.using(asked, table)

    def _save(self, found: Sequence[Ranking], scores: np.ndarray, keep: Collection[int]) -> None:
        """Keep scores, [rows, rankings], if they are of the build that they were asked for.

        Raises:
            StoreError: they are not.
        """
        sizes = self._opened.sources().shards("tokens").partition.sizes()
        if self._opened.build_id != found[0].identity.build_id or len(scores) != sum(sizes.values()):
            raise StoreError(
                f"{self._opened.name}: was built anew while its rows were ranked, so the ranking was of rows that are "
                "no more; ask for it again"
            )
        # Ranks are computed before others have to wait, and saved in several leases.
        for first in range(0, len(found), at_once := max(1, SCORES_AT_ONCE // max(len(scores), 1))):
            part = range(first, min(first + at_once, len(found)))
            whether = [np.full(len(scores), found[n].request.index is None) for n in part]
            rows = [
                ranked(np.array([found[n].id]), scores[:, [n]], exact) for n, exact in zip(part, whether, strict=True)
            ]

            def save(cursor: Cursor, part: range = part, rows: Sequence[pa.Table] = rows) -> None:
                for n, table in zip(part, rows, strict=True):
                    save_ranking(cursor, found[n].identity, table)

            self._opened.derive(save, keep)

    def _say_if_old(self, found: Ranking, progress: Progress) -> None:
        name, version = found.request.concept.name, found.identity.version
        present = self._opened.read(workspace.probes) if found.request.concept.kind == "probe" else []
        now = next((probe.version for probe in present if probe.name == name), version)
        if now != version:
            progress.say(
                f"{name}: was trained again meanwhile; this ranking is of version {version}, the present one is {now}"
            )
