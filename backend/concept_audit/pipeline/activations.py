"""Stages 2 and 4: one pass over the model, and the SAE features of every token.

The pass writes mean response activations of the layers asked for. Where the SAE is
known beforehand, its features are written in the same pass; where it is still to
be trained, token activations are kept for it instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.sae import SparseAutoencoder
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import CONTENT, PROMPT
from concept_audit.model.load import LanguageModel
from concept_audit.progress import Stage
from concept_audit.store.layout import Layout
from concept_audit.store.shards import (
    TokenizedExample,
    read_token_activations,
    read_tokens,
    write_activations,
    write_features,
    write_token_activations,
)


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


def activation_stage(
    layout: Layout,
    lm: LanguageModel,
    layers: Sequence[int],
    sample: TokenSample | None,
    sae: SparseAutoencoder | None,
    stage: Stage,
) -> None:
    """Write the shards of activations that are missing, with those of tokens or features.

    Args:
        sample: token activations to keep, or None.
        sae: an SAE that is known already, or None.
    """
    for number in layout.shard_numbers("examples"):
        rows = read_tokens(layout, number)
        n_tokens = sum(len(row.input_ids) for row in rows)
        wanted = ["activations"] + ["tokens"] * (sample is not None) + ["features"] * (sae is not None)
        if all(layout.shard(kind, number).exists() for kind in wanted):
            stage.skip(n_tokens)
            continue
        means = {layer: np.full((len(rows), lm.d_model), np.nan, np.float32) for layer in layers}
        kept: dict[int, np.ndarray] = {}
        fired: dict[int, dict[str, np.ndarray]] = {}
        deep = {sample.layer} if sample else set()
        deep |= {sae.layer} if sae else set()
        for batch in _activations(lm, rows, layers, sorted(deep)):
            for row in batch:
                content = rows[row.index].parts == CONTENT
                for layer, mean in row.mean.items():
                    means[layer][row.index] = mean
                if sample is not None and sample.takes(rows[row.index]):
                    kept[row.index] = row.streams[sample.layer][content]
                if sae is not None:
                    fired[row.index] = _features(sae, rows[row.index], row.streams[sae.layer][content])
            stage.advance(sum(len(rows[row.index].input_ids) for row in batch), _pace(stage))
        if sae is not None:
            write_features(layout, number, _joined([fired[i] for i in range(len(rows))]))
        if sample is not None:
            _write_sample(layout, number, rows, kept, lm.d_model)
        write_activations(layout, number, means)


def feature_stage(layout: Layout, lm: LanguageModel, sae: SparseAutoencoder, stage: Stage) -> None:
    """Write the shards of features that are missing, from the token activations kept where there are any."""
    for number in layout.shard_numbers("examples"):
        rows = read_tokens(layout, number)
        if layout.shard("features", number).exists():
            stage.skip(len(rows))
            continue
        fired: dict[int, dict[str, np.ndarray]] = {}
        if layout.shard("tokens", number).exists():
            activations, owners = read_token_activations(layout, number)
            for index, row in enumerate(rows):
                mine = owners == row.example_id
                if mine.any():
                    fired[index] = _features(sae, row, activations[mine])
                    stage.advance()
        rest = [index for index in range(len(rows)) if index not in fired]
        for batch in _activations(lm, [rows[i] for i in rest], [], [sae.layer]):
            for found in batch:
                row = rows[rest[found.index]]
                stream = found.streams[sae.layer][row.parts == CONTENT]
                fired[rest[found.index]] = _features(sae, row, stream)
                stage.advance()
        write_features(layout, number, _joined([fired[i] for i in range(len(rows))]))


def count_tokens(layout: Layout) -> tuple[int, int]:
    """Tokens in all rows, and those of response text, which an SAE reads."""
    total = content = 0
    for number in layout.shard_numbers("examples"):
        for row in read_tokens(layout, number):
            total += len(row.input_ids)
            content += int((row.parts == CONTENT).sum())
    return total, content


def _activations(lm: LanguageModel, rows: Sequence[TokenizedExample], layers: Sequence[int], deep: Sequence[int]):
    if not rows:
        return
    ids, response = [row.input_ids for row in rows], [row.parts != PROMPT for row in rows]
    yield from response_activations(lm, ids, response, layers, deep)


def _features(sae: SparseAutoencoder, row: TokenizedExample, stream: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.flatnonzero(row.parts == CONTENT)
    token, feature, activation = sae.encode(stream)
    return {
        "example_id": np.full(len(token), row.example_id, np.int64),
        "token_position": positions[token].astype(np.int32),
        "token_id": row.input_ids[positions[token]],
        "feature_id": feature,
        "activation": activation,
    }


def _joined(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _write_sample(
    layout: Layout, number: int, rows: Sequence[TokenizedExample], kept: dict[int, np.ndarray], d_model: int
) -> None:
    blocks = [kept[i] for i in sorted(kept)]
    activations = np.concatenate(blocks) if blocks else np.empty((0, d_model), np.float32)
    owners = [np.full(len(kept[i]), rows[i].example_id, np.int64) for i in sorted(kept)]
    write_token_activations(layout, number, activations, np.concatenate(owners) if owners else np.empty(0, np.int64))


def _pace(stage: Stage) -> str:
    fresh = stage.done - stage.skipped
    return f"{fresh / max(stage.elapsed, 1e-3):,.0f} tokens/s" if fresh else ""
