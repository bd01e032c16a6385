"""Two-sided bases from sketches of the moments, a few blocks at a time."""

from __future__ import annotations

import pytest
import torch

from concept_audit import ModelError
from concept_audit.influence import curvature, learning, moments, projection
from concept_audit.influence.fitting import Fisher
from concept_audit.influence.learning import AT_RANDOM, Learner
from concept_audit.influence.moments import Moments, SketchedMoment, WholeMoment
from concept_audit.influence.sides import SecondMoments, moment_bytes
from concept_audit.model.block_groups import block_groups
from concept_audit.model.linear import linear_layers
from concept_audit.progress import Progress
from tests.backend.influence.test_brute_force import fitted, model, rows

LEFT, RIGHT = 6, 3


@pytest.fixture
def few_directions(monkeypatch):
    monkeypatch.setattr(projection, "LEFT", LEFT)
    monkeypatch.setattr(projection, "RIGHT", RIGHT)


@pytest.fixture(scope="module")
def case():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, 3)
    return lm, data, layers, fitted(lm, layers, data, Fisher("sampled", 7), True)


def learner(case) -> Learner:
    lm, _, layers, factors = case
    return Learner(lm, layers, factors.__getitem__, (2, 3), 10.0, 0, Progress())


def summed(case) -> SecondMoments:
    lm, data, layers, factors = case
    found = SecondMoments(layers, factors.__getitem__, 10.0, lm)
    learner(case)._gradients(data, AT_RANDOM, found, 1, "moments")
    if found.begin_again():
        learner(case)._gradients(data, AT_RANDOM, found, 1, "moments")
    return found


def test_a_sketch_finds_what_the_whole_moment_would(case, few_directions, monkeypatch):
    whole = summed(case)
    assert all(isinstance(moment, WholeMoment) for moment in whole.left)
    monkeypatch.setattr(curvature, "WIDE", 8)
    monkeypatch.setattr(moments, "SPARE", 8)
    sketched = summed(case)
    kinds = {type(moment) for moment in (*sketched.left, *sketched.right)}
    assert kinds == {SketchedMoment, WholeMoment}, "keys and values are no wider than a sketch of theirs"
    for exact, found in ((whole.left, sketched.left), (whole.right, sketched.right)):
        for i, (one, other) in enumerate(zip(exact, found, strict=True)):
            count = LEFT if exact is whole.left else RIGHT
            best, basis = one.leading(count), other.leading(count)
            assert basis.shape == best.shape
            assert torch.allclose(basis.T @ basis, torch.eye(count, dtype=basis.dtype), atol=1e-6)
            captured, most = (torch.trace(U.T @ one.total @ U) for U in (basis, best))
            assert captured >= 0.98 * most, (i, type(other))


def test_a_moment_of_fewer_vectors_than_the_sketch_has_columns_is_found_exactly():
    moments_of = Moments(torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(30, 3000, generator=generator) * torch.logspace(0, -4, 30)[:, None]
    sketch = moments_of.of(3000, 20)
    assert isinstance(sketch, SketchedMoment)
    sketch.add(vectors, torch.eye(30), 2.0)
    assert sketch.begin_again()
    sketch.add(vectors, torch.eye(30), 2.0)
    wanted = torch.linalg.svd(vectors.double(), full_matrices=False).Vh[:20].T
    cosines = torch.linalg.svdvals(sketch.leading(20)[:, :10].double().T @ wanted[:, :10])
    assert cosines.min() > 0.9999


def test_gradients_that_overflow_are_named():
    sketch = Moments(torch.float32, torch.device("cpu")).of(3000, 20)
    sketch.add(torch.full((2, 3000), torch.inf), torch.eye(2), 1.0)
    with pytest.raises(ModelError, match="overflow.*--precision"):
        sketch.leading(20)


def test_bases_do_not_depend_on_how_many_blocks_are_learned_at_a_time(case, monkeypatch):
    _, data, layers, _ = case
    together = learner(case).sides(data)
    monkeypatch.setattr(learning, "SIDE_BYTES", 1)
    for one, other in zip(together, learner(case).sides(data), strict=True):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


def test_groups_are_whole_blocks_that_have_room(case):
    *_, layers, _ = case
    block = sum(moment_bytes(layer, 8) for layer in layers) // 3
    for room, sizes in ((1, [7, 7, 7]), (2 * block, [14, 7]), (3 * block, [21])):
        groups = list(block_groups(layers, lambda layer: moment_bytes(layer, 8), room))
        assert [len(group.layers) for group in groups] == sizes
        for group in groups:
            for i, layer in enumerate(group.layers):
                whole = layers[group.places[i]]
                assert layer.module is whole.module and group.places[layer.source] == whole.source
