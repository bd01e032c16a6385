"""Queries kept as factors of a low rank where those are smaller, a few blocks at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.influence import reduced_query
from concept_audit.influence.fitting import Fisher
from concept_audit.influence.own_queries import by_sign
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, precondition, query_gradient
from concept_audit.influence.reduced_query import Reducing, reduced, solved_by_blocks
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.pipeline import kept_queries
from concept_audit.store.layout import Layout
from tests.backend.influence.test_brute_force import DAMPING, LAYER, direction, engine, fitted, model, rows

WEIGHTS = [0.5, -1.0, 0.5]


@pytest.fixture(scope="module")
def case():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    curvature = fitted(lm, layers, data, Fisher("sampled", 7), True).__getitem__
    asked = Rows(data.ids[:3], data.response[:3])
    quantity = NegatedConcept(Projection(LAYER, direction()))
    parts = [(part, weights) for part, weights, _ in by_sign(asked, WEIGHTS)]
    dense = [precondition(query_gradient(lm, layers, quantity, *part), curvature, DAMPING) for part in parts]
    return lm, data, layers, curvature, quantity, parts, dense


def solved(case):
    lm, _, layers, curvature, quantity, parts, _ = case
    return solved_by_blocks(lm, layers, quantity, parts, curvature, DAMPING, torch.float64)


def same_scores(case, query, dense, tolerance) -> None:
    lm, data, layers, *_ = case
    found = engine(lm, layers, query, data)
    wanted = engine(lm, layers, DenseQueries([dense], torch.float64), data)
    most = max(np.abs(row.tokens).max() for row in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one.tokens - other.tokens).max() <= tolerance * most
    for one, other in zip(engine(lm, layers, query, data, "forward"), found, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-3, abs=1e-4 * float(most))


@pytest.mark.parametrize("room", [1, 2 << 30], ids=["block by block", "all blocks at once"])
def test_a_query_solved_by_blocks_is_the_whole_one(case, monkeypatch, room):
    monkeypatch.setattr(reduced_query, "GROUP_BYTES", room)
    together, each = solved(case)
    assert together.retained[0] == 1 and len(each) == 2
    for query, dense in zip(each, case[-1], strict=True):
        same_scores(case, query, dense, 1e-9)
    same_scores(case, together, [a + b for a, b in zip(*case[-1], strict=True)], 1e-9)


def test_the_work_can_be_ended_between_any_two_layers(case):
    lm, _, layers, curvature, quantity, parts, _ = case
    steps: list[int] = []
    solved_by_blocks(
        lm, layers, quantity, parts, curvature, DAMPING, torch.float64, step=lambda: steps.append(len(steps))
    )
    # A gradient of each part, then each layer solved, and reduced for each part and for their sum.
    assert len(steps) >= len(parts) + len(layers) * (2 * len(parts) + 1)

    def fuse():
        steps.pop()
        if not steps:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        solved_by_blocks(lm, layers, quantity, parts, curvature, DAMPING, torch.float64, step=fuse)


def test_factors_keep_the_share_that_is_named_and_no_score_is_off_by_more_than_is_told(case, monkeypatch):
    lm, data, layers, curvature, quantity, parts, _ = case
    monkeypatch.setattr(reduced_query, "SMALL", 0)
    monkeypatch.setattr(reduced_query, "SHARE", 0.9)
    query, _ = solved_by_blocks(lm, layers, quantity, parts[:1], curvature, 1e3, torch.float64)
    assert {len(form) for form in query.forms} == {2}
    assert 0.9 <= query.retained[0] < 1
    dense = precondition(query_gradient(lm, layers, quantity, *parts[0]), curvature, 1e3)
    lost = sum(float((a - b).square().sum()) for a, b in zip(query.gradient(), dense, strict=True))
    whole = sum(float(matrix.square().sum()) for matrix in dense)
    assert lost == pytest.approx((1 - query.retained[0]) * whole, rel=1e-3)
    found = engine(lm, layers, query, data, unit_normalised=True)
    wanted = engine(lm, layers, DenseQueries([dense], torch.float64), data, unit_normalised=True)
    for one, other in zip(found, wanted, strict=True):
        assert 0 < abs(one.scores[0] - other.scores[0]) <= lost**0.5


def test_the_rank_is_the_least_that_serves_and_no_more_than_the_most(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(500, 7, generator=generator) @ torch.randn(7, 400, generator=generator)
    form, kept = reduced(low)
    assert [part.shape[1] for part in form] == [7, 7] and kept == pytest.approx(float(low.square().sum()), rel=1e-5)
    assert torch.allclose(form[0] @ form[1].T, low, atol=1e-3)
    flat = torch.randn(500, 400, generator=generator)
    assert len(reduced(flat)[0]) == 1, "factors of more than half the size are not worth their loss"
    monkeypatch.setattr(reduced_query, "MOST", 20)
    form, kept = reduced(flat)
    assert form[0].shape == (500, 20) and kept < 0.2 * float(flat.square().sum())
    assert len(reduced(torch.zeros(500, 400))[0]) == 2 and len(reduced(low[:20, :20])[0]) == 1


def test_a_kept_query_of_either_form_is_read_as_it_was_written(tmp_path, monkeypatch):
    lm = model("llama")
    layers = linear_layers(lm, 1, 1)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(layer.d_out, 1, generator=generator) @ torch.ones(1, layer.d_in) for layer in layers]
    gradients[2] = torch.randn(layers[2].d_out, layers[2].d_in, generator=generator)
    monkeypatch.setattr(reduced_query, "SMALL", 0)
    reducing = Reducing(torch.float32)
    reducing.add(gradients)
    layout = Layout(tmp_path)
    about = {"concept_id": "x", "blocks": (1, 1), "weights": "linear", "unit_normalised": False}
    kept_queries.keep_reduced_query(layout, 5, reducing.query(), "float32", about)
    path = layout.shards.path("influence", f"{5:016x}", kept_queries.QUERY)
    opened = kept_queries.open_query(path, lm)
    for wanted, found in zip(gradients, opened.queries.gradient(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert opened.queries.retained[0] == pytest.approx(1, abs=1e-6)
    assert path.stat().st_size < 0.5 * sum(4 * matrix.numel() for matrix in gradients)
