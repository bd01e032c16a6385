"""Influence of preference pairs against float64 brute force: the gradient of the DPO loss, written out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from concept_audit.influence.pairs import score_with_pairs
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.types import SEPARATOR
from tests.backend.influence.test_brute_force import (
    ARCHITECTURES,
    LAYER,
    BruteForce,
    close,
    direction,
    inner,
    model,
    queries_of,
    rows,
)

BETA = 0.3
PAIRS = [(0, 1), (2, 3), (5, 4)]
"""Which of the brute force's sequences are chosen and rejected."""


def paired(data: Rows) -> Rows:
    """The pairs as rows, and after them a row that is no pair."""
    ids, response = [], []
    for chosen, rejected in PAIRS:
        ids.append(np.concatenate([data.ids[chosen], [SEPARATOR], data.ids[rejected]]))
        response.append(np.concatenate([data.response[chosen], [False], data.response[rejected]]))
    return Rows([*ids, data.ids[4]], [*response, data.response[4]])


def dpo_gradient(brute: BruteForce, chosen: int, rejected: int):
    """Of −log σ(β[(log p(y⁺) − log p_ref(y⁺)) − (log p(y⁻) − log p_ref(y⁻))]) at the reference model."""
    at_reference = [-brute.nll(brute.weights, i).sum().detach() for i in (chosen, rejected)]

    def loss(weights):
        now = [-brute.nll(weights, i).sum() for i in (chosen, rejected)]
        margin = (now[0] - at_reference[0]) - (now[1] - at_reference[1])
        return -torch.nn.functional.logsigmoid(BETA * margin)

    return brute.gradient(loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_influence_of_a_pair_is_that_of_its_dpo_loss(architecture):
    lm, data = model(architecture), rows()
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)
    query = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    wanted = [inner(dpo_gradient(brute, *pair), query) for pair in PAIRS] + [inner(brute.loss_gradient(4), query)]
    queries, made = DenseQueries([query], torch.float64), paired(data)
    for mode in ("token_sum", "forward"):
        score = partial(score_rows, lm, layers, queries, mode=mode, budget=64)
        found = {row.index: row for batch in score_with_pairs(score, made, BETA) for row in batch}
        close([found[i].scores[0] for i in range(4)], wanted, 1e-6 if mode == "token_sum" else 1e-5)
        for i in range(4) if mode == "token_sum" else ():
            assert found[i].tokens.shape == (len(made.ids[i]), 1)
            assert found[i].tokens.sum() == pytest.approx(found[i].scores[0], rel=1e-4, abs=1e-9)


def test_a_pair_and_its_swap_have_opposite_scores():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    query = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    score = partial(score_rows, lm, layers, DenseQueries([query], torch.float64))

    def scored(chosen: int, rejected: int) -> float:
        ids = np.concatenate([data.ids[chosen], [SEPARATOR], data.ids[rejected]])
        mask = np.concatenate([data.response[chosen], [False], data.response[rejected]])
        (found,) = [row for batch in score_with_pairs(score, Rows([ids], [mask]), BETA) for row in batch]
        return found.scores[0]

    assert scored(0, 3) == pytest.approx(-scored(3, 0), rel=1e-9) and scored(2, 2) == pytest.approx(0, abs=1e-12)


def test_a_pair_of_which_a_side_has_nothing_to_predict_has_no_score():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    query = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    ids, mask = paired(data).ids[0], paired(data).response[0].copy()
    mask[len(data.ids[0]) :] = False
    score = partial(score_rows, lm, layers, DenseQueries([query], torch.float64))
    (found,) = [row for batch in score_with_pairs(score, Rows([ids], [mask]), BETA) for row in batch]
    assert np.isnan(found.scores[0])


def test_one_dpo_step_changes_the_concept_as_the_summed_scores_say():
    """Training on a subset by one small step of DPO moves the mean projection of the queries by −lr Σ scores."""
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)
    query = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    score = partial(score_rows, lm, layers, DenseQueries([query], torch.float64))
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    gradients = {pair: dpo_gradient(brute, *pair) for pair in pairs}
    ids = [np.concatenate([data.ids[a], [SEPARATOR], data.ids[b]]) for a, b in pairs]
    mask = [np.concatenate([data.response[a], [False], data.response[b]]) for a, b in pairs]
    scores = np.zeros(len(pairs))
    for batch in score_with_pairs(score, Rows(ids, mask), BETA):
        for row in batch:
            scores[row.index] = row.scores[0]

    def concept(weights) -> float:
        with torch.no_grad():
            return -float(sum(brute.lack(weights, i) for i in (0, 1)) / 2)

    random, rate, told, seen = np.random.default_rng(0), 1e-4, [], []
    for _ in range(12):
        chosen = random.choice(len(pairs), 8, replace=False)
        step = [sum(gradients[pairs[i]][k] for i in chosen) for k in range(len(layers))]
        moved = dict(brute.weights)
        for layer, change in zip(layers, step, strict=True):
            name = f"{layer.name}.weight"
            moved[name] = brute.weights[name] - rate * (change.T if layer.transposed else change)
        told.append(scores[chosen].sum())
        seen.append((concept(moved) - concept(brute.weights)) / rate)
    assert np.corrcoef(told, seen)[0, 1] > 0.999
    close(seen, told, 1e-2)
