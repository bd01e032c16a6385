"""Influence of rollouts against float64 brute force: the gradient of the GRPO loss, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.influence.queries import DenseQueries, NegatedConcept
from concept_audit.influence.rollouts import weighted
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from tests.backend.influence.test_brute_force import (
    LAYER,
    BruteForce,
    close,
    direction,
    engine,
    inner,
    model,
    queries_of,
    rows,
)

ADVANTAGES = np.array([1.3, -0.7, 0.0, 2.0, -1.1, 0.4])


def grpo_gradient(brute: BruteForce, row: int, advantage: float):
    """Of −mean_t min(ρ_t A, clip(ρ_t, 0.8, 1.2) A), ρ_t = p(y_t) / p_old(y_t), at p = p_old."""
    old = -brute.nll(brute.weights, row).detach()

    def loss(weights):
        ratio = (-brute.nll(weights, row) - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    return brute.gradient(loss)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_influence_of_a_rollout_is_that_of_its_grpo_loss(architecture):
    lm, data = model(architecture), rows()
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)
    query = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    wanted = [inner(grpo_gradient(brute, i, float(ADVANTAGES[i])), query) for i in range(len(data))]
    found = engine(lm, layers, DenseQueries([query], torch.float64), data)
    ours = weighted(np.array([row.scores[0] for row in found]), ADVANTAGES)
    close(ours, wanted)
    for row, advantage, score in zip(found, ADVANTAGES, ours, strict=True):
        tokens = weighted(row.tokens[:, 0], np.full(len(row.tokens), advantage))
        assert tokens.sum() == pytest.approx(score, rel=1e-4, abs=1e-9)


def test_rows_without_a_score_have_none_and_rows_without_an_advantage_have_zero():
    scores = weighted(np.array([[np.nan, 1.0], [-2.0, np.nan], [3.0, -4.0]]), np.array([2.0, 0.0, -1.0]))
    np.testing.assert_array_equal(scores, [[np.nan, 2.0], [0.0, np.nan], [-3.0, 4.0]])
    assert not np.signbit(scores[1, 0])
