"""Scores of rows that are rollouts: weighed by their advantages, wherever scores or token influences come out.

What is kept in shards, the influence of rows and of their tokens, is as in fine-tuning, and so is the gradient index.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from concept_audit.errors import ConceptError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.influence.rollouts import weighted
from concept_audit.pipeline.sources import Sources
from concept_audit.store.rollouts import advantages


def by_advantage(sources: Sources, scores: np.ndarray, options: InfluenceOptions) -> np.ndarray:
    """Scores of all rows, float64 [rows, ...], as the rows weigh."""
    return weighted(scores, sources.read(advantages)) if sources.weighs(options) else scores


def weightless(sources: Sources, options: InfluenceOptions, n_rows: int) -> np.ndarray:
    """The rows whose score is 0 whatever they say, bool [rows]: rollouts with the advantage 0."""
    return sources.read(advantages) == 0 if sources.weighs(options) else np.zeros(n_rows, bool)


def tokens_by_advantage(
    sources: Sources, tokens: Mapping[int, np.ndarray], options: InfluenceOptions
) -> dict[int, np.ndarray]:
    """Token influences of some rows, example id → float32 [tokens], as the rows weigh."""
    if not sources.weighs(options):
        return dict(tokens)
    weights = sources.read(advantages)
    return {row: weighted(values, np.full(len(values), weights[row])) for row, values in tokens.items()}


def refuse_training(sources: Sources) -> None:
    """Raise ConceptError where rows are rollouts, which `validate` does not train on as they weigh."""
    if sources.rollouts is not None:
        raise ConceptError(
            "validate: trains on each response as fine-tuning does, and these rows are rollouts, which weigh by their "
            "advantage; to validate fine-tuning on them, build an audit without --rollouts and its columns"
        )
