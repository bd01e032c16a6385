"""Many concepts on the same query rows: the numbers of each alone, for fewer passes over the model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from concept_audit import Audit
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.many_queries import (
    compress_concepts,
    compress_each,
    distinct_rows,
    parts_of_at_most,
    sharing,
)
from concept_audit.influence.own_queries import OwnQueries
from concept_audit.influence.projection import LayerProjection
from concept_audit.influence.queries import NegatedConcept, Rows, query_gradient
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.pipeline.index.query import OpenIndex, Target
from concept_audit.progress import Progress
from tests.backend.influence.test_brute_force import ARCHITECTURES, DAMPING, model, rows
from tests.backend.influence.test_index import FROM_INDEX, SMALL

SIGNED = [0.5, -1.0, 0.5, 0.25]
ASKED = [[0, 1, 2], [1], [], [2, 0], [0, 2, 1], [1]]


def near(found, wanted, relative):
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=relative * np.abs(wanted).max())


def directions(count: int) -> np.ndarray:
    v = np.random.default_rng(5).normal(size=(count, 32)).astype(np.float32)
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def drawn_parts(layers) -> tuple[list[LayerCurvature], list[LayerProjection]]:
    """A curvature and a projection for each layer, drawn at random in float64."""
    random = torch.Generator().manual_seed(3)
    curvatures, projections = [], []
    for number, layer in enumerate(layers):

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        values = draw(layer.d_out, layer.d_in).square()
        if number == 1:
            values = torch.zeros_like(values)  # as of A of a fresh adapter
        inputs, outputs = (torch.linalg.qr(draw(width, width)).Q for width in (layer.d_in, layer.d_out))
        inputs = curvatures[layer.source].inputs if layer.source < number else inputs
        curvatures.append(LayerCurvature(inputs, outputs, values, values.mean(0), values.mean(1)))
        left, right = draw(layer.d_out, 6), draw(layer.d_in, 4)
        projections.append(LayerProjection(left, right, left, right, torch.randperm(24, generator=random)[:7]))
    return curvatures, projections


def one_by_one(lm, layers, layer, direction, data, row, curvatures, projections) -> np.ndarray:
    """The kept numbers of Uᵀ [(Q_Sᵀ G Q_A) / (Λ + λ)] V, from the whole gradient of one row."""
    quantity = NegatedConcept(Projection(layer, direction))
    gradients = query_gradient(lm, layers, quantity, Rows([data.ids[row]], [data.response[row]]), [1.0])
    found = []
    for G, c, p in zip(gradients, curvatures, projections, strict=True):
        damped = c.eigenvalues + DAMPING * c.eigenvalues.mean()
        rotated = c.outputs.T @ G @ c.inputs
        solved = torch.zeros_like(G) if not damped.any() else rotated / damped
        found.append((p.query_left.T @ solved @ p.query_right).flatten()[p.places])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_concepts_that_share_rows_are_compressed_as_each_alone(architecture, layer):
    lm, data, v = model(architecture), rows(), directions(3)
    layers = linear_layers(lm, 1, layer)
    curvatures, projections = drawn_parts(layers)
    done = []
    with torch.no_grad():
        found = compress_concepts(
            lm,
            layers,
            layer,
            torch.from_numpy(v),
            data,
            ASKED,
            curvatures.__getitem__,
            projections.__getitem__,
            DAMPING,
            budget=64,
            advance=done.append,
        )
    assert sum(done) == sum(map(len, ASKED))
    for row, concepts in enumerate(ASKED):
        assert found[row].shape == (len(concepts), 7 * len(layers))
        for numbers, concept in zip(found[row].numpy(), concepts, strict=True):
            near(numbers, one_by_one(lm, layers, layer, v[concept], data, row, curvatures, projections), 1e-9)


def test_single_queries_of_any_quantity_are_compressed_as_each_alone():
    lm, data, (v,) = model("llama"), rows(), directions(1)
    layers = linear_layers(lm, 1, 3)
    curvatures, projections = drawn_parts(layers)
    quantity = NegatedConcept(Projection(2, v))  # which no layer of block 3 reaches
    found = compress_each(lm, layers, quantity, data, curvatures.__getitem__, projections.__getitem__, DAMPING, 64)
    for row in range(len(data)):
        near(found[row].numpy(), one_by_one(lm, layers, 2, v, data, row, curvatures, projections), 1e-9)


def test_single_queries_of_a_bfloat16_pass_are_those_of_float64_but_for_its_rounding():
    lm, data, (v,) = model("llama"), rows(), directions(1)
    layers = linear_layers(lm, 1, 3)
    curvatures, projections = drawn_parts(layers)
    quantity = NegatedConcept(Projection(3, v))
    wide = compress_each(lm, layers, quantity, data, curvatures.__getitem__, projections.__getitem__, DAMPING, 64)
    narrow = lm.in_dtype(torch.bfloat16)
    layers = linear_layers(narrow, 1, 3)
    found = compress_each(narrow, layers, quantity, data, curvatures.__getitem__, projections.__getitem__, DAMPING, 64)
    assert found.dtype == torch.float64, "the curvature's"
    for row in range(len(data)):
        assert np.corrcoef(found[row].numpy(), wide[row].numpy())[0, 1] > 0.995


def test_query_rows_are_found_again_where_concepts_share_them():
    data = rows()
    other = data.response[0].copy()
    other[-1] = False
    first = Rows([data.ids[0], data.ids[1], data.ids[0]], [data.response[0], data.response[1], other])
    second = Rows([data.ids[1].copy(), data.ids[4], data.ids[4]], [data.response[1].copy(), *[data.response[4]] * 2])
    distinct, asked, places = distinct_rows([first, second])
    assert len(distinct) == 4 and asked == [[0], [0, 1], [0], [1, 1]]
    assert places == [[(0, 0), (1, 0), (2, 0)], [(1, 1), (3, 0), (3, 1)]]
    for queries, mine in zip((first, second), places, strict=True):
        for number, (row, _) in enumerate(mine):
            assert np.array_equal(distinct.ids[row], queries.ids[number])
            assert np.array_equal(distinct.response[row], queries.response[number])
    third = Rows([data.ids[1], data.ids[3]], [data.response[0], data.response[3]])
    assert sharing([first, second, third]) == [True, True, False]
    assert parts_of_at_most(10, [4, 5, 6, 7], [4, 6, 11, 1]) == [[4, 5], [6], [7]]
    assert parts_of_at_most(10, [], []) == []


@pytest.fixture(scope="module")
def audit(built, tmp_path_factory):
    audit = Audit(shutil.copytree(built, tmp_path_factory.mktemp("many") / "small"))
    audit.build_index(SMALL)
    return audit


def drawn_targets() -> list[Target]:
    """Contrasts and means at two layers, with and without queries that are rows; they share some queries."""
    data, v = rows(), directions(7)
    shares = np.array([[0.5, 0.0], [0.0, 0.8]])
    own = OwnQueries(((3,), (5, 8)), (0, 1), (0, 1, -1, -1), shares)
    targets = []
    for number, (layer, first, mine) in enumerate(
        [(2, 0, own), (2, 0, None), (3, 2, None), (2, 2, own), (3, 1, own), (3, 0, None), (1, 0, None)]
    ):
        part = Rows(data.ids[first : first + 4], data.response[first : first + 4])
        targets.append(Target(NegatedConcept(Projection(layer, v[number])), part, SIGNED, layer, mine))
    return targets


@pytest.mark.parametrize("at_once", [1024, 9])
def test_targets_together_are_what_each_is_alone(audit, monkeypatch, at_once):
    monkeypatch.setattr("concept_audit.pipeline.index.query.QUERIES_AT_ONCE", at_once)
    opened = OpenIndex(audit.opened.sources(), audit.index.describe(), Progress())
    targets, done = drawn_targets(), []
    together = opened.compressed_together(targets, 0.1, done.append)
    assert sum(done) == sum(len(target.queries) for target in targets)
    for target, found in zip(targets, together, strict=True):
        alone = opened.compressed(target, 0.1)
        near(found.whole, alone.whole, 2e-5)
        assert len(found.own) == len(alone.own)
        for one, other in zip(found.own, alone.own, strict=True):
            near(one, other, 2e-5)


def test_a_row_runs_once_however_many_concepts_ask_for_it(audit):
    features = list(audit.concepts.spread(6))
    queries = [audit.rankings.find(name, "concept_influence", FROM_INDEX).request.queries for name in features]
    distinct = {example.content_hash for mine in queries for example in mine}
    assert len(distinct) < sum(map(len, queries))
    ran = 0

    def count(_module, _arguments, output):
        nonlocal ran
        # Without a graph the model is only asked how it is made.
        ran += torch.is_grad_enabled() and len(output[0] if isinstance(output, tuple) else output)

    handle = audit.model().blocks[0].register_forward_hook(count)
    try:
        audit.rank_many(features, options=FROM_INDEX)
    finally:
        handle.remove()
    assert ran == len(distinct)
