"""The same scores by an implementation that shares no code with ours.

On SmolLM2-135M and real rows the comparison is in tests/benchmarks/README.md; here a
small model keeps it quick.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from concept_audit.influence.fitting import Fisher
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, precondition, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from tests.benchmarks.influence import fit, score
from tests.conftest import small_model, small_tokenizer

pytest.importorskip(
    "kronfluence", reason="kronfluence is absent: pip install --no-deps kronfluence einconv opt-einsum einops"
)


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.filterwarnings("ignore")
def test_concept_influence_ranks_as_kronfluence_does(strategy):
    from tests.peers import kronfluence_scores

    lm = as_language_model("small", small_model("llama"), small_tokenizer())
    random = np.random.default_rng(0)
    ids = [random.integers(3, 390, length) for length in random.integers(10, 60, 24)]
    # The peer counts tokens after the last response too: end every row with its response.
    rows = Rows(ids, [np.arange(len(row)) >= 5 for row in ids])
    query = Rows(rows.ids[:3], rows.response[:3])
    direction = random.normal(size=32).astype(np.float32)
    direction /= np.linalg.norm(direction)
    layers = linear_layers(lm, 1, 3)
    names = [layer.name for layer in layers]
    theirs = kronfluence_scores(lm, names, 3, direction, query, rows, strategy, damping=0.1).scores
    gradient = query_gradient(lm, layers, NegatedConcept(Projection(3, direction)), query, [1 / 3] * 3)
    if strategy == "ekfac":
        curvature = fit(lm, layers, rows, Fisher("empirical"))
        gradient = precondition(gradient, curvature.__getitem__, 0.1)
    ours = score(lm, layers, DenseQueries([gradient], torch.float32), rows)[:, 0]
    assert spearmanr(ours, theirs).statistic >= 0.99
