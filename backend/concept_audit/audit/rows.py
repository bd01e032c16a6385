"""The rows of an audit, and what is computed for the few on screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit
from concept_audit.audit.rankings import Ranking, Rankings
from concept_audit.concepts.heatmap import Heatmap, feature_heatmap, influence_heatmap, probe_heatmap, token_projections
from concept_audit.errors import ConceptError
from concept_audit.influence.baselines import likeness
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.answers import own_answer
from concept_audit.pipeline.kept_queries import token_influence
from concept_audit.pipeline.methods import NEED_GRADIENTS
from concept_audit.pipeline.rank import keep_query
from concept_audit.pipeline.rollouts import tokens_by_advantage
from concept_audit.progress import Progress
from concept_audit.store import derived, facets, queries
from concept_audit.store import features as store_features
from concept_audit.store.activations import (
    answered_rows,
    mean_of_rows,
    means_of,
    read_answers,
    read_firings,
    read_means,
)
from concept_audit.store.examples import TokenizedExample, TokenizedText, read_texts
from concept_audit.store.filters import RowFilter
from concept_audit.store.rankings import digest
from concept_audit.store.shard_store import RowShards
from concept_audit.store.skipped import skipped_rows
from concept_audit.types import Concept


class Rows:
    """Rows in the order of the data, their token values and exact scores, and the model's own answers."""

    def __init__(self, opened: OpenAudit, concepts: Concepts, rankings: Rankings):
        self._opened = opened
        self._concepts = concepts
        self._rankings = rankings

    @property
    def _tokens(self) -> RowShards:
        return self._opened.sources().shards("tokens")

    def list(self, where: RowFilter = EVERY_ROW, limit: int | None = None, offset: int = 0) -> pd.DataFrame:
        """Rows in the order of the data.

        Returns:
            example_id, content_hash, source, source_row, prompt, response, metadata (JSON), messages (JSON),
            n_tokens, n_response_tokens, truncated, duplicate_of, flag, note.
        """
        where = self._opened.searched(where)
        return self._opened.read(lambda cursor: queries.rows(cursor, None, where, limit, offset))

    def sample(self, where: RowFilter, seed: str, limit: int) -> pd.DataFrame:
        """As `list`, in an order that looks random but is the same for a seed."""
        where = self._opened.searched(where)
        return self._opened.read(lambda cursor: queries.sample(cursor, where, seed, limit))

    def count(
        self,
        where: RowFilter,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
    ) -> int:
        """How many rows pass a filter; with a concept, of those that it ranks."""
        where = self._opened.searched(where)

        def counted(ranking: int | None = None) -> int:
            key, wanted = ("count", ranking, repr(where)), [] if ranking is None else [ranking]
            return self._rankings.read(key, wanted, lambda cursor: queries.count_rows(cursor, ranking, where))

        return self._rankings.using([(concept, method, options)] if concept else [], counted)

    def metadata_fields(self) -> pd.DataFrame:
        """Metadata fields with their most frequent values: field, n_rows, n_values, top_values."""
        return self._opened.cached_read("metadata_fields", queries.metadata_fields, of_build=True)

    def facet(
        self,
        field: str | None,
        where: RowFilter = EVERY_ROW,
        search: str = "",
        limit: int = 12,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        always: Sequence[str] = (),
    ) -> pd.DataFrame:
        """The values of a metadata field among the rows that pass a filter, the most frequent first.

        What the filter asks of the field itself does not count, so that one sees what else there is to choose.

        Args:
            field: None for the sources that rows were read from.
            search: only values in which this occurs, whatever its case.
            always: values that come first, whatever is searched for.

        Returns:
            value, n_rows, n_flagged (rows with a flag other than keep), n_values (how many values there are in all).
        """
        key = ("facet", field, search, limit, tuple(always))
        asked = (field, search, limit, always)
        return self._facet(key, facets.values, asked, field, where, concept, method, options)

    def facet_histogram(
        self,
        field: str,
        where: RowFilter = EVERY_ROW,
        bins: int = 20,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """As `facet`, of a field of numbers, counted in equal bins between the least and the largest.

        Returns:
            bin (from 0; empty ones are missing), low and high (the least and the largest number in it), n_rows,
            n_flagged.
        """
        key = ("facet_histogram", field, bins)
        return self._facet(key, facets.numbers, (field, bins), field, where, concept, method, options)

    def _facet(
        self,
        key: tuple,
        query: Callable,
        arguments: tuple,
        field: str | None,
        where: RowFilter,
        concept: str | None,
        method: str | None,
        options: InfluenceOptions,
    ) -> pd.DataFrame:
        where = self._opened.searched(facets.apart_from(where, field))

        def counted(ranking: int | None = None) -> pd.DataFrame:
            wanted = [] if ranking is None else [ranking]
            return self._rankings.read(
                (*key, ranking, repr(where)), wanted, lambda cursor: query(cursor, ranking, where, *arguments)
            )

        return self._rankings.using([(concept, method, options)] if concept else [], counted)

    def sources(self) -> pd.DataFrame:
        """Where the rows came from: source, n_rows."""
        return self._opened.cached_read("sources", store_features.sources, of_build=True)

    def skipped(self, limit: int | None = None) -> pd.DataFrame:
        """Rows of the data that the build left out: place (from 0), source, source_row, reason."""
        return self._opened.cached_read(("skipped", limit), lambda cursor: skipped_rows(cursor, limit), of_build=True)

    def lengths(self, bins: int = 30) -> tuple[np.ndarray, np.ndarray]:
        """Histogram of the rows' tokens: edges and counts."""
        key = ("lengths", bins)
        return self._opened.cached_read(key, lambda cursor: store_features.lengths(cursor, bins), of_build=True)

    def longest(self) -> int:
        """Tokens of the longest row; 0 if there are no rows."""
        return self._opened.cached_read("longest", store_features.longest, of_build=True)

    def similar(self, example_id: int, layer: int, limit: int = 8) -> pd.DataFrame:
        """The rows nearest to a row by their mean response activations at a layer: cosine, about the mean of all rows.

        Returns:
            similarity, then the columns of `list`; nearest first. Neither the row nor copies of it are among them, and
            a text that stands in several rows is there once.

        Raises:
            ConceptError: the row has no response token, or the layer is not one of the audit's.
        """
        if layer not in self._opened.layers:
            raise ConceptError(f"layer {layer}: this audit keeps the layers {', '.join(map(str, self._opened.layers))}")
        means = self._opened.sources().shards("activations")
        row = means_of(means, layer, [example_id])[0]
        if np.isnan(row).any():
            raise ConceptError(f"row {example_id} has no response token, so there is nothing to be near to")
        mean = self._opened.remembered(("mean activation", layer), lambda: mean_of_rows(means, layer), of_build=True)
        near = likeness(lambda: read_means(means, layer), mean, row)
        near[[example_id, *np.flatnonzero(np.isnan(near))]] = -np.inf
        # Copies lie exactly as near as what they are copies of, so some more are looked at.
        first = [int(i) for i in np.argsort(-near, kind="stable")[: 4 * limit + 16] if np.isfinite(near[i])]
        where = RowFilter(example_ids=(example_id, *first))
        table = self._opened.read(lambda cursor: queries.rows(cursor, None, where)).set_index("example_id")
        others = table.loc[first]
        others = others[others["content_hash"] != table["content_hash"][example_id]].drop_duplicates("content_hash")
        others = others.head(limit).reset_index()
        others.insert(0, "similarity", near[others["example_id"].to_numpy(int)])
        return others

    def heatmaps(self, concept: str, example_ids: Sequence[int], projected: bool = False) -> dict[int, Heatmap]:
        """Token heatmaps of rows, by example id: a feature's activation, a probe's projection.

        Args:
            projected: of a feature too, the projection on its direction. Projections take a forward pass the first
                time.
        """
        found = self._concepts.get(concept)
        ids = [int(i) for i in example_ids]
        if not ids:
            return {}
        feature = found.feature_id
        if feature is None or projected:
            return self.probe_heatmaps(found, ids)
        key = ("heatmaps", concept, tuple(ids))
        return self._opened.remembered(key, lambda: self._feature_heatmaps(feature, ids), of_build=True)

    def probe_heatmaps(self, concept: Concept, example_ids: Sequence[int]) -> dict[int, Heatmap]:
        """As `heatmaps`, of a direction that need not be saved."""
        texts = read_texts(self._tokens, example_ids)

        def compute(missing: Mapping[str, int]) -> dict[str, np.ndarray]:
            return token_projections(self._opened.model(), concept, {h: texts[i] for h, i in missing.items()})

        values = self._token_values(f"{concept.layer}:{digest(concept.direction)}", texts, compute)
        return {i: probe_heatmap(i, row, values[row.content_hash]) for i, row in texts.items()}

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
        ranking = self._ranked(concept, method, options)
        texts = read_texts(self._tokens, [int(i) for i in example_ids])
        values = self._token_influence(ranking, texts, progress)
        return {i: influence_heatmap(i, texts[i], found) for i, found in values.items()}

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
        ranking = self._ranked(concept, method, options)
        texts = read_texts(self._tokens, [int(i) for i in example_ids])
        values = self._token_influence(ranking, texts, progress)
        return {i: float(found.sum(dtype=np.float64)) for i, found in values.items()}

    def own_answers(self, example_ids: Sequence[int]) -> dict[int, str]:
        """What the model itself answers to rows' prompts, where it has been asked already: example id → text."""
        ids = [int(i) for i in example_ids]
        texts = read_texts(self._tokens, ids)
        reader = self._opened.made.reader
        hashes = [row.content_hash for row in texts.values()]
        known = self._opened.read(lambda cursor: derived.own_answers(cursor, reader, hashes))
        single = {i: known[row.content_hash] for i, row in texts.items() if row.content_hash in known}
        return single | read_answers(self._opened.sources().shards("answers"), ids)

    def ask_model(self, example_id: int) -> str:
        """What the model itself would answer to a row's prompt; kept once it has been asked.

        Raises:
            ConceptError: the row has no prompt to answer.
        """
        found = self.own_answers([example_id])
        if example_id in found:
            return found[example_id]
        (row,) = read_texts(self._tokens, [int(example_id)]).values()
        text = own_answer(self._opened.model(), row)
        if text is None:
            raise ConceptError(f"row {example_id}: it has no prompt before its response, so there is nothing to answer")
        reader = self._opened.made.reader
        self._opened.cache(lambda cursor: derived.keep_own_answers(cursor, reader, {row.content_hash: text}))
        return text

    def answered(self) -> int:
        """How many rows' prompts the model has answered itself, for projection difference."""
        return answered_rows(self._opened.sources().shards("answers"))

    def _feature_heatmaps(self, feature: int, example_ids: Sequence[int]) -> dict[int, Heatmap]:
        texts = read_texts(self._tokens, example_ids)
        firings = read_firings(self._opened.sources().shards("features"), feature, example_ids)
        return {i: feature_heatmap(i, row, firings[i]) for i, row in texts.items()}

    def _ranked(self, concept: str, method: str, options: InfluenceOptions) -> Ranking:
        if method not in NEED_GRADIENTS:
            raise ConceptError(f"{method}: has no token influences; {', '.join(sorted(NEED_GRADIENTS))} have")
        ranking = self._rankings.find(concept, method, options)
        if not ranking.stored:
            raise ConceptError(f"{method}: not computed yet for {concept}; rank by it first")
        return ranking

    def _token_influence(
        self, ranking: Ranking, texts: Mapping[int, TokenizedText], progress: Progress | None
    ) -> dict[int, np.ndarray]:
        """The influence of each token of rows, by example id; rows without a score are missing."""
        reported = progress or self._opened.progress

        def compute(missing: Mapping[str, int]) -> dict[str, np.ndarray]:
            rows = [TokenizedExample(i, h, texts[i].input_ids, texts[i].parts) for h, i in missing.items()]
            keep_query(self._opened.sources(), ranking.request, ranking.id, reported)
            with reported.stage("Exact influence of these rows"):
                found = token_influence(self._opened.sources(), ranking.id, rows)
            return {h: found[i] for h, i in missing.items() if i in found}

        values = self._token_values(f"influence:{ranking.id}", texts, compute)
        found = {i: values[row.content_hash] for i, row in texts.items() if row.content_hash in values}
        # Kept by content as in fine-tuning: copies of a rollout may have advantages of their own.
        return tokens_by_advantage(self._opened.sources(), found, ranking.request.options)

    def _token_values(
        self,
        identity: str,
        texts: Mapping[int, TokenizedText],
        compute: Callable[[Mapping[str, int]], Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """A value for each token of rows, by content hash: what is kept, and what is computed now and kept.

        Args:
            identity: tells what the values are of.
            compute: given the rows that have none, content hash → example id; may leave some out.
        """
        hashes = [row.content_hash for row in texts.values()]
        known = self._opened.read(lambda cursor: derived.cached_projections(cursor, identity, hashes))
        # Rows may have been cut at another length when their values were kept.
        missing = {
            row.content_hash: i
            for i, row in texts.items()
            if len(known.get(row.content_hash, ())) != len(row.input_ids)
        }
        if missing:
            fresh = compute(missing)
            self._opened.cache(lambda cursor: derived.cache_projections(cursor, identity, fresh))
            known |= fresh
        return known
