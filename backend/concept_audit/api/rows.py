"""What is computed for the few rows on screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.api.base import DEFAULTS
from concept_audit.api.rankings import Rankings
from concept_audit.concepts.heatmap import Heatmap, feature_heatmaps, influence_heatmap, probe_heatmaps
from concept_audit.errors import ConceptError
from concept_audit.pipeline.answers import own_answer
from concept_audit.pipeline.attribution import InfluenceOptions, token_influence
from concept_audit.pipeline.index import agreement
from concept_audit.pipeline.rank import NEED_GRADIENTS, Request, keep_query
from concept_audit.progress import Progress
from concept_audit.store import workspace
from concept_audit.store.shards import TokenizedExample, answered_rows, read_answers, read_texts


class Rows(Rankings):
    """Token values, exact scores and the model's own answers for chosen rows."""

    def heatmaps(self, concept: str, example_ids: Sequence[int]) -> dict[int, Heatmap]:
        """Token heatmaps of rows, by example id; a probe's take a forward pass the first time."""
        found = self.concept(concept)
        ids = [int(i) for i in example_ids]
        if not ids:
            return {}
        if found.kind == "sae_feature":
            key = ("heatmaps", concept, tuple(ids))
            return self._remembered(key, lambda: feature_heatmaps(self._layout, found, ids), of_build=True)
        return probe_heatmaps(self._layout, self._database, found, ids, self.model)

    def influence_heatmaps(
        self,
        concept: str,
        method: str,
        example_ids: Sequence[int],
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> dict[int, Heatmap]:
        """What each token of rows adds to their influence, by example id: the summands of the score.

        Computed for the rows that are asked for, and kept. Rows without a score are missing.

        Raises:
            ConceptError: the method has no token influences, or its ranking has not been computed.
        """
        ranking, wanted = self._ranked(concept, method, options)
        texts, known = self._token_influence(ranking, wanted, example_ids, progress or self._progress)
        return {
            i: influence_heatmap(i, row, known[row.content_hash])
            for i, row in texts.items()
            if row.content_hash in known
        }

    def exact_scores(
        self,
        concept: str,
        method: str,
        example_ids: Sequence[int],
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> dict[int, float]:
        """Exact influence of chosen rows, where a ranking came from the gradient index: example id → score.

        Kept, like the token influences that come with it.

        Raises:
            ConceptError: as `influence_heatmaps`.
        """
        ranking, wanted = self._ranked(concept, method, options)
        texts, known = self._token_influence(ranking, wanted, example_ids, progress or self._progress)
        return {
            i: float(known[row.content_hash].sum(dtype=np.float64))
            for i, row in texts.items()
            if row.content_hash in known
        }

    def check_exactly(
        self,
        concept: str,
        method: str = "concept_influence",
        top: int = 50,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Score the first rows of a ranking exactly, and tell how well the index agrees on them.

        Returns:
            rank, example_id, score, exact_score of these rows, by exact score; and their rank correlation and
            the overlap of the top fifths (see `agreement`).
        """
        rows = self.rank(concept, method, top, options=options)[["rank", "example_id", "score"]]
        exact = self.exact_scores(concept, method, rows["example_id"].tolist(), options, progress)
        rows["exact_score"] = [exact.get(int(i), np.nan) for i in rows["example_id"]]
        scored = rows.dropna()
        told = agreement(scored[["score"]].to_numpy(), scored[["exact_score"]].to_numpy())
        return rows.sort_values("exact_score", ascending=False, ignore_index=True), told

    def _ranked(self, concept: str, method: str, options: InfluenceOptions) -> tuple[int, Request]:
        if method not in NEED_GRADIENTS:
            raise ConceptError(f"{method}: has no token influences; {', '.join(sorted(NEED_GRADIENTS))} have")
        ranking, wanted = self._request(self.concept(concept), method, options)
        if not self._stored(ranking):
            raise ConceptError(f"{method}: not computed yet for {concept}; rank by it first")
        return ranking, wanted

    def _token_influence(
        self, ranking: int, wanted: Request, example_ids: Sequence[int], progress: Progress
    ) -> tuple[Mapping[int, Any], dict[str, np.ndarray]]:
        """Rows by id, and the influence of each of their tokens by content; computed where it is not kept."""
        texts = read_texts(self._layout, [int(i) for i in example_ids])
        identity = f"influence:{ranking}"
        hashes = [row.content_hash for row in texts.values()]
        known = self._read(lambda cursor: workspace.cached_projections(cursor, identity, hashes))
        missing = {
            row.content_hash: TokenizedExample(i, row.content_hash, row.input_ids, row.parts)
            for i, row in texts.items()
            if len(known.get(row.content_hash, ())) != len(row.input_ids)
        }
        if missing:
            keep_query(self._sources(), wanted, ranking, progress)
            with progress.stage("Exact influence of these rows"):
                found = token_influence(self._layout, self.model, ranking, list(missing.values()))
            fresh = {h: found[row.example_id] for h, row in missing.items() if row.example_id in found}
            self._write(lambda cursor: workspace.cache_projections(cursor, identity, fresh))
            known |= fresh
        return texts, known

    def own_answers(self, example_ids: Sequence[int]) -> dict[int, str]:
        """What the model itself answers to rows' prompts, where it has been asked already: example id → text."""
        ids = [int(i) for i in example_ids]
        texts = read_texts(self._layout, ids)
        model = self._made.fingerprints["model"]
        hashes = [row.content_hash for row in texts.values()]
        known = self._read(lambda cursor: workspace.own_answers(cursor, model, hashes))
        single = {i: known[row.content_hash] for i, row in texts.items() if row.content_hash in known}
        return single | read_answers(self._layout, ids)

    def answered_rows(self) -> int:
        """How many rows' prompts the model has answered itself, for projection difference."""
        return answered_rows(self._layout)

    def ask_model(self, example_id: int) -> str:
        """What the model itself would answer to a row's prompt; kept once it has been asked.

        Raises:
            ConceptError: the row has no prompt to answer.
        """
        found = self.own_answers([example_id])
        if example_id in found:
            return found[example_id]
        (row,) = read_texts(self._layout, [int(example_id)]).values()
        text = own_answer(self.model(), row)
        if text is None:
            raise ConceptError(f"row {example_id}: it has no prompt before its response, so there is nothing to answer")
        model = self._made.fingerprints["model"]
        self._write(lambda cursor: workspace.keep_own_answers(cursor, model, {row.content_hash: text}))
        return text
