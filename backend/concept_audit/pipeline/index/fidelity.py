"""How faithful an index is: its scores against exact ones, for rows and concepts that it was not learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from concept_audit.influence.fidelity import fidelity
from concept_audit.influence.queries import NegatedConcept
from concept_audit.influence.scoring import score_rows_for_many
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.index.query import OpenIndex, Target, index_scores
from concept_audit.pipeline.sampling import as_rows, drawn_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.shard_store import RowShards

FIDELITY_ROWS = 64
FIDELITY_CONCEPTS = 6
QUERY_ROWS = 8
"""Query examples of a concept that fidelity is measured with."""


def measure_fidelity(
    sources: Sources, about: Mapping[str, Any], lm: LanguageModel, layers: Sequence[LinearLayer], progress: Progress
) -> dict[str, Any]:
    """Rank correlation and overlap with exact scores; see `fidelity`.

    Args:
        about: the description of the index, whose rows are all there.
        lm, layers: in the precision of the index, and what it tracks.
    """
    tokens = sources.shards("tokens")
    rows = drawn_rows(tokens, FIDELITY_ROWS, "fidelity", about["seed"])
    targets = _targets(tokens, about, lm.d_model)
    opened = OpenIndex(sources, about, progress)
    exact: list[list[torch.Tensor]] = [[] for _ in layers]
    with progress.stage("Concepts to check the index with", len(targets), "concepts") as stage:
        for target in targets:
            solved = opened.solved(target, about["damping"])
            for i, layer in enumerate(layers):
                dense = solved[i] if i < len(solved) else torch.zeros(layer.d_out, layer.d_in)
                exact[i].append(dense.to(lm.device, lm.dtype))
            stage.advance()
    stacked = [torch.stack(same) for same in exact]
    del exact
    with progress.stage("Exact scores of a sample", len(rows), "rows") as stage:
        truth = score_rows_for_many(lm, layers, stacked, as_rows(rows), say=progress.say, advance=stage.advance)
    scores = index_scores(sources, about, targets, about["damping"], Progress())
    guess = scores[[row.example_id for row in rows]]
    there = np.isfinite(truth).all(1) & np.isfinite(guess).all(1)
    return {**fidelity(guess[there], truth[there]), "damping": about["damping"]}


def _targets(tokens: RowShards, about: Mapping[str, Any], d_model: int) -> list[Target]:
    """Directions drawn at random, each with query examples of its own."""
    generator = np.random.default_rng(about["seed"] + 77)
    targets = []
    for place in range(FIDELITY_CONCEPTS):
        queries = as_rows(drawn_rows(tokens, QUERY_ROWS, f"queries {place}", about["seed"]))
        v = generator.normal(size=d_model).astype(np.float32)
        layer = about["layers"][place % len(about["layers"])]
        quantity = NegatedConcept(Projection(layer, v / np.linalg.norm(v)))
        targets.append(Target(quantity, queries, [1 / len(queries)] * len(queries), layer))
    return targets
