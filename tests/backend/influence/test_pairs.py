"""Influence of preference pairs against float64 brute force: the gradient of the DPO loss, written out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from concept_audit.influence.fitting import Fisher
from concept_audit.influence.learning import Learner
from concept_audit.influence.pairs import compress_with_pairs, score_with_pairs, weighted_sequences
from concept_audit.influence.projection import LayerProjection, Sides, compress_rows, row_maps
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows
from concept_audit.influence.scoring import score_rows, score_rows_for_many
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.progress import Progress
from concept_audit.types import SEPARATOR
from tests.backend.influence.test_brute_force import (
    ARCHITECTURES,
    LAYER,
    BruteForce,
    close,
    direction,
    fitted,
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


def gradients_of_rows(brute: BruteForce) -> list:
    """Of the rows of `paired`, one at a time."""
    return [dpo_gradient(brute, *pair) for pair in PAIRS] + [brute.loss_gradient(4)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_index_keeps_the_projected_gradient_of_a_pairs_dpo_loss(architecture):
    lm, data = model(architecture), rows()
    layers = linear_layers(lm, 1, LAYER)
    random = torch.Generator().manual_seed(3)
    projections = []
    for layer in layers:
        left, right = (torch.randn(d, 5, generator=random).double() for d in (layer.d_out, layer.d_in))
        projections.append(LayerProjection(left, right, left, right, torch.randperm(25, generator=random)[:11]))
    gradients = gradients_of_rows(BruteForce(lm, layers, data))
    wanted = [
        torch.cat(
            [(p.row_left.T @ G @ p.row_right).flatten()[p.places] for p, G in zip(projections, of_row, strict=True)]
        )
        for of_row in gradients
    ]
    compress = partial(compress_rows, lm, layers, dict(enumerate(projections)), budget=40)
    batches = list(compress_with_pairs(compress, paired(data), BETA))
    assert sorted(row.index for batch in batches for row in batch) == [0, 1, 2, 3]
    assert [] in batches, "sides are met in different batches"
    found = {row.index: row for batch in batches for row in batch}
    close(np.stack([found[i].numbers for i in range(4)]), torch.stack(wanted).numpy(), 1e-5)
    # The squared norm of a difference is in neither side's; a row that is no pair has its own.
    squares = np.zeros(LAYER)
    for layer, G in zip(layers, gradients[3], strict=True):
        squares[layer.block - 1] += float(G.square().sum())
    assert all(np.isnan(found[i].squares).all() for i in range(3))
    close(found[3].squares, squares, 1e-5)


def test_no_number_is_kept_of_a_pair_of_which_a_side_has_nothing_to_predict():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    eye = [LayerProjection(*[torch.eye(d, 3).double() for d in (k.d_out, k.d_in) * 2], torch.arange(9)) for k in layers]
    made = paired(data)
    mask = made.response[0].copy()
    mask[len(data.ids[0]) :] = False
    compress = partial(compress_rows, lm, layers, dict(enumerate(eye)))
    both = Rows(made.ids[:2], [mask, made.response[1]])
    found = {row.index: row for batch in compress_with_pairs(compress, both, BETA) for row in batch}
    assert np.isnan(found[0].numbers).all() and np.isfinite(found[1].numbers).all()


def test_scores_for_many_queries_of_the_sides_sum_to_those_of_the_pairs():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    random = torch.Generator().manual_seed(4)
    queries = [torch.randn(2, k.d_out, k.d_in, generator=random).double() for k in layers]
    parts = weighted_sequences(paired(data), BETA)
    wanted = [
        [inner(of_row, [query[n] for query in queries]) for n in range(2)]
        for of_row in gradients_of_rows(BruteForce(lm, layers, data))
    ]
    close(parts.summed(score_rows_for_many(lm, layers, queries, parts.rows)), wanted)
    values = np.ones((7, 1))
    values[1] = np.nan
    assert np.isnan(parts.summed(values)[:, 0]).tolist() == [True, False, False, False]


def test_how_large_numbers_are_is_learned_from_pairs_and_not_from_their_sides():
    """E[x²] over pairs is what is stored of pairs: sides of the same text leave nothing."""
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    factors = fitted(lm, layers, data, Fisher("sampled", 7), True)
    random = torch.Generator().manual_seed(5)
    sides = [Sides(*(torch.randn(d, 4, generator=random).double() for d in (k.d_out, k.d_in))) for k in layers]
    learner = Learner(lm, layers, factors.__getitem__, (2, 3), 10.0, 0, Progress(), BETA)
    ends = np.arange(len(layers) + 1) * 16
    maps = [row_maps(factors[k], sides[k]) for k in range(len(layers))]
    of_rows = torch.stack(
        [
            torch.cat([(left.T @ G @ right).flatten() for (left, right), G in zip(maps, of_row, strict=True)])
            for of_row in gradients_of_rows(BruteForce(lm, layers, data))
        ]
    )
    found = learner._mean_squares(sides, paired(data), ends)
    np.testing.assert_allclose(found, of_rows.square().mean(0), rtol=1e-4)
    one = Rows([data.ids[2]], [data.response[2]])
    alone = learner._mean_squares(sides, one, ends)
    same = np.concatenate([data.ids[2], [SEPARATOR], data.ids[2]])
    mask = np.concatenate([data.response[2], [False], data.response[2]])
    assert learner._mean_squares(sides, Rows([same], [mask]), ends).max() < 1e-9 * alone.max()
