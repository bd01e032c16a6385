"""Stages 3 and 5: one pass over the model, and the SAE features of every token.

The pass writes mean response activations of the layers asked for. Where the SAE is
known beforehand, its features are written in the same pass; where it is still to
be trained, token activations are kept for it instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.sae import SaeSource, SparseAutoencoder
from concept_audit.model.activations import RowActivations, response_activations
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.model.pairs import Sequences, sequences
from concept_audit.pipeline.engine import Worker
from concept_audit.store.activations import read_token_activations, write_firings, write_means, write_token_activations
from concept_audit.store.examples import TokenizedExample, read_tokens
from concept_audit.store.shard_store import RowShards, is_there
from concept_audit.types import CONTENT, PROMPT

Firings = dict[str, np.ndarray]
"""Columns of `FIRINGS`, of one row."""


@dataclass(frozen=True)
class TokenSample:
    """Which rows' token activations are kept on disk to train an SAE from.

    Attributes:
        layer: where the SAE will read.
        share: of the rows; chosen by content hash, so the same rows in any order of the data.
    """

    layer: int
    share: float

    def takes(self, row: TokenizedExample) -> bool:
        """Whether the row is in the sample."""
        return int(row.content_hash[:8], 16) < self.share * (1 << 32)


@dataclass(frozen=True)
class Opened:
    """What the shards of a pass over the model need."""

    lm: LanguageModel
    sae: SparseAutoencoder | None
    worker: Worker


@dataclass(frozen=True)
class RunningModel:
    """One pass over the model, no deeper than asked.

    Attributes:
        tokens: the rows as the model reads them.
        means: mean response activations of `layers`, to be made.
        sample, token_activations: which single tokens to keep, and where; None for none.
        sae, features: an SAE that is known already, and where its features go; None for none.
    """

    tokens: RowShards
    means: RowShards
    model: ModelSource
    layers: tuple[int, ...]
    sample: TokenSample | None = None
    token_activations: RowShards | None = None
    sae: SaeSource | None = None
    features: RowShards | None = None

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        # The means come last: where they are, the shard is complete.
        return tuple(s for s in (self.features, self.token_activations, self.means) if s is not None)

    def open(self, worker: Worker) -> Opened:
        lm = worker.model(self.model)
        return Opened(lm, self.sae.load(lm.device) if self.sae else None, worker)

    def run(self, opened: Opened, number: int) -> None:
        lm = opened.lm
        rows = read_tokens(self.tokens, number)
        means = {layer: np.full((len(rows), lm.d_model), np.nan, np.float32) for layer in self.layers}
        kept: dict[int, np.ndarray] = {}
        units = self._units(opened, number, rows, means, kept)
        if self.features is not None:
            write_firings(self.features, number, units)
        else:
            for _ in units:
                pass
        if self.token_activations is not None:
            _write_sample(self.token_activations, number, rows, kept, lm.d_model)
        write_means(self.means, number, means)

    def _units(
        self,
        opened: Opened,
        number: int,
        rows: Sequence[TokenizedExample],
        means: dict[int, np.ndarray],
        kept: dict[int, np.ndarray],
    ) -> Iterator[Firings]:
        """Run the model on one unit of rows after the other; yields the features that fire in each."""
        sae, sample = opened.sae, self.sample
        deep = sorted({part.layer for part in (sample, self.sae) if part is not None})
        started, done = time.monotonic(), 0
        for unit in self.tokens.partition.units(number):
            fired: dict[int, Firings] = {}
            parts = sequences([row.input_ids for row in rows[unit]], [row.parts != PROMPT for row in rows[unit]])
            for layer in self.layers:
                means[layer][unit.start + parts.owner[parts.paired]] = 0
            for batch in _of_sequences(opened.lm, parts, self.layers, deep):
                for found in batch:
                    place = unit.start + int(parts.owner[found.index])
                    if parts.paired[found.index]:
                        # Of a pair the difference of its sides; no SAE is read with pairs.
                        for layer, mean in found.mean.items():
                            means[layer][place] += parts.sign[found.index] * mean
                        continue
                    row = rows[place]
                    content = row.parts == CONTENT
                    for layer, mean in found.mean.items():
                        means[layer][place] = mean
                    if sample is not None and sample.takes(row):
                        kept[place] = found.streams[sample.layer][content]
                    if sae is not None and self.sae is not None:
                        fired[place] = _features(sae, row, found.streams[self.sae.layer][content])
                size = sum(len(parts.ids[found.index]) for found in batch)
                done += size
                pace = done / max(time.monotonic() - started, 1e-3)
                opened.worker.advance(size, f"{pace:,.0f} tokens/s")
            yield _joined([fired[place] for place in sorted(fired)]) if sae is not None else {}


@dataclass(frozen=True)
class FindingFeatures:
    """The features that fire at each token, from the token activations kept where there are any.

    Attributes:
        tokens: the rows as the model reads them.
        token_activations: what is kept of them; None if nothing was.
        features: to be made.
    """

    tokens: RowShards
    features: RowShards
    model: ModelSource
    sae: SaeSource
    token_activations: RowShards | None = None

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        return (self.features,)

    def open(self, worker: Worker) -> tuple[LanguageModel, SparseAutoencoder, Worker]:
        lm = worker.model(self.model)
        return lm, self.sae.load(lm.device), worker

    def run(self, opened: tuple[LanguageModel, SparseAutoencoder, Worker], number: int) -> None:
        write_firings(self.features, number, self._units(*opened, number))

    def _units(self, lm: LanguageModel, sae: SparseAutoencoder, worker: Worker, number: int) -> Iterator[Firings]:
        rows, layer = read_tokens(self.tokens, number), self.sae.layer
        activations, owners = np.empty((0, 0), np.float32), np.empty(0, np.int64)
        if self.token_activations is not None and is_there(self.token_activations.path(number)):
            activations, owners = read_token_activations(self.token_activations.path(number))
        for unit in self.tokens.partition.units(number):
            fired: dict[int, Firings] = {}
            for place, row in enumerate(rows[unit]):
                mine = owners == row.example_id
                if mine.any():
                    fired[place] = _features(sae, row, activations[mine])
                    worker.advance()
            rest = [place for place in range(len(rows[unit])) if place not in fired]
            for batch in _activations(lm, [rows[unit][place] for place in rest], (), [layer]):
                for found in batch:
                    row = rows[unit][rest[found.index]]
                    stream = found.streams[layer][row.parts == CONTENT]
                    fired[rest[found.index]] = _features(sae, row, stream)
                    worker.advance()
            yield _joined([fired[place] for place in sorted(fired)])


def _activations(
    lm: LanguageModel, rows: Sequence[TokenizedExample], layers: Sequence[int], deep: Sequence[int]
) -> Iterator[list[RowActivations]]:
    if rows:
        ids, response = [row.input_ids for row in rows], [row.parts != PROMPT for row in rows]
        yield from response_activations(lm, ids, response, layers, deep)


def _of_sequences(
    lm: LanguageModel, parts: Sequences, layers: Sequence[int], deep: Sequence[int]
) -> Iterator[list[RowActivations]]:
    if parts.ids:
        yield from response_activations(lm, parts.ids, parts.response, layers, deep)


def _features(sae: SparseAutoencoder, row: TokenizedExample, stream: np.ndarray) -> Firings:
    positions = np.flatnonzero(row.parts == CONTENT)
    token, feature, activation = sae.encode(stream)
    return {
        "example_id": np.full(len(token), row.example_id, np.int64),
        "token_position": positions[token].astype(np.int32),
        "token_id": row.input_ids[positions[token]],
        "feature_id": feature,
        "activation": activation,
    }


def _joined(rows: Sequence[Firings]) -> Firings:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _write_sample(
    shards: RowShards, number: int, rows: Sequence[TokenizedExample], kept: dict[int, np.ndarray], d_model: int
) -> None:
    blocks = [kept[place] for place in sorted(kept)]
    owners = [np.full(len(kept[place]), rows[place].example_id, np.int64) for place in sorted(kept)]
    write_token_activations(
        shards,
        number,
        np.concatenate(blocks) if blocks else np.empty((0, d_model), np.float32),
        np.concatenate(owners) if owners else np.empty(0, np.int64),
    )
