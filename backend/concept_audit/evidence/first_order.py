"""The first-order check: what influence predicts of one small step, against the step itself.

With identity curvature the score of row z is ⟨∇θL(z), ∇θ(−f_Q)⟩, so a step of
stochastic gradient descent on a subset S with learning rate η,
θ' = θ − η · mean_S ∇θL(z), changes the concept by

    f_Q(θ') − f_Q(θ) = η · mean_S score(z) + O(η²).

This is Taylor's theorem: a correlation that is not close to 1 means a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concept_audit.evidence.measures import projections
from concept_audit.evidence.training import add_gradient
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, query_gradient
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import Projection
from concept_audit.model.gradients import LanguageModelHead
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel
from concept_audit.model.trainable import weights_of

RELATIVE_STEP = 0.05
"""The step is as large as makes the largest predicted change this share of f's spread over the queries."""


@dataclass(frozen=True)
class Query:
    """The concept whose change is predicted.

    Attributes:
        layer, direction: of the concept; the direction is float32 [d_model].
        rows: the query examples.
        weights: one a query; 1/n each for the mean.
    """

    layer: int
    direction: np.ndarray
    rows: Rows
    weights: Sequence[float]

    def value(self, lm: LanguageModel) -> float:
        """Σ_q weight_q f(q)."""
        return float(projections(lm, self.rows, self.layer, self.direction) @ np.asarray(self.weights))


def identity_scores(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    query: Query,
    rows: Rows,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Concept influence with identity curvature, by the engine that ranks rows: float64 [rows]."""
    lack = NegatedConcept(Projection(query.layer, query.direction))
    gradient = query_gradient(lm, layers, lack, query.rows, query.weights)
    found = np.full(len(rows), np.nan)
    for batch in score_rows(lm, layers, DenseQueries([gradient], lm.dtype), rows):
        for row in batch:
            found[row.index] = row.scores[0]
        advance(len(batch))
    return found


def learning_rate(lm: LanguageModel, query: Query, predicted: np.ndarray) -> float:
    """η for a step that is small, yet large against rounding.

    Args:
        predicted: mean score of each subset, [subsets].
    """
    spread = float(np.std(projections(lm, query.rows, query.layer, query.direction)))
    return RELATIVE_STEP * (spread or 1.0) / max(float(np.abs(predicted).max()), np.finfo(np.float64).tiny)


def changes(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    query: Query,
    rows: Rows,
    subsets: Sequence[Sequence[int]],
    rate: float,
) -> Iterator[float]:
    """The concept's actual change after one step on each subset; the weights are put back each time."""
    before = query.value(lm)
    for subset in subsets:
        with weights_of(layers) as weights:
            add_gradient(lm, LanguageModelHead(lm), rows, list(subset))
            with torch.no_grad():
                for weight in weights:
                    assert weight.grad is not None, "the gradient was added to every one of these weights"
                    weight.sub_(rate * weight.grad)
            yield query.value(lm) - before
