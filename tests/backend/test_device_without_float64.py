"""On a device without float64 (Apple's MPS), emulated: everything runs, to the numbers of the CPU."""

from __future__ import annotations

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

from concept_audit import Audit, InfluenceOptions, LabelledExample, Message
from concept_audit.concepts import sae_training
from concept_audit.concepts.sae import SparseAutoencoder
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.training import fine_tuned, mean_losses
from concept_audit.influence import projection
from concept_audit.influence.curvature import LayerCurvature, eigenbasis
from concept_audit.influence.fitting import Covariances, Fisher, SquaredGradients, accumulate
from concept_audit.influence.learning import Learner
from concept_audit.influence.options import IndexOptions
from concept_audit.influence.queries import (
    DenseQueries,
    Loss,
    LowRankQueries,
    NegatedConcept,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.scoring import score_rows, score_rows_for_many
from concept_audit.influence.targets import Projection
from concept_audit.model.activations import response_activations
from concept_audit.model.exact import exact_device, in_float64
from concept_audit.model.generate import answers
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import LanguageModel, as_language_model
from concept_audit.progress import Progress
from concept_audit.store import shard_files
from tests.conftest import chat_rows, small_model, small_tokenizer
from tests.emulated import DEVICE, There, device_without_float64, put_there

BOTH = pytest.mark.parametrize("models", ["llama", "gpt2"], indirect=True)
KEYS = [f"row {i}" for i in range(6)]


@pytest.fixture(scope="module")
def data() -> Rows:
    random = np.random.default_rng(3)
    ids = [random.integers(3, 390, length) for length in (8, 30, 21, 17, 30, 12)]
    return Rows(ids, [np.arange(len(row)) >= 5 for row in ids])


@pytest.fixture(params=["llama"], scope="module")
def models(request) -> tuple[LanguageModel, LanguageModel]:
    """A model on the CPU, and the same to be used on the emulated device."""
    here, there = small_model(request.param), put_there(small_model(request.param))
    return tuple(as_language_model("small", model, small_tokenizer()) for model in (here, there))


def same(compute, models, monkeypatch, tolerance=1e-5) -> None:
    """Whether something comes to the same numbers on both devices; not to the bit, since shapes may be reduced apart."""
    here, there = models
    expected = compute(here)
    with device_without_float64(monkeypatch):
        found = compute(there)
    assert len(found) == len(expected) and len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def test_the_emulated_device_refuses_what_mps_refuses(monkeypatch):
    with device_without_float64(monkeypatch):
        there = torch.ones(2, 2, device=DEVICE)
        assert isinstance(there + 1, There) and not isinstance(there.cpu(), There)
        for refused in (
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
            lambda: torch.from_numpy(np.ones(2)).to(DEVICE),
            lambda: torch.linalg.eigh(there),
            lambda: torch.linalg.qr(there),
            lambda: there + torch.ones(2, 2),
            lambda: there.numpy(),
        ):
            with pytest.raises((TypeError, NotImplementedError, RuntimeError)):
                refused()
        assert in_float64(there).dtype == torch.float64
    assert exact_device(torch.device("mps")) == torch.device("cpu")
    for able in ("cpu", "cuda:1"):
        assert exact_device(torch.device(able)) == torch.device(able)


def gradient(lm: LanguageModel, layers, rows: Rows, quantity=None):
    v = np.random.default_rng(0).normal(size=32).astype(np.float32)
    quantity = quantity or NegatedConcept(Projection(3, v))
    return query_gradient(lm, layers, quantity, Rows(rows.ids[:2], rows.response[:2]), [0.5, 0.5])


def scores(lm: LanguageModel, rows: Rows, prepare, **options) -> np.ndarray:
    layers = linear_layers(lm, 1, 3)
    found = np.zeros(len(rows))
    for batch in score_rows(lm, layers, prepare(gradient(lm, layers, rows)), rows, **options):
        for row in batch:
            found[row.index] = row.scores[0]
    return found


def dense(query):
    return DenseQueries([query], torch.float32)


@BOTH
@pytest.mark.parametrize("options", [{}, {"unit_normalised": True}, {"mode": "forward"}], ids=str)
def test_scores(models, data, monkeypatch, options):
    same(lambda lm: [scores(lm, data, dense, **options)], models, monkeypatch)


def test_scores_of_a_query_of_low_rank(models, data, monkeypatch):
    # Random directions differ with the device; the best approximation does not.
    same(lambda lm: [scores(lm, data, lambda q: LowRankQueries([q], 30, torch.float32))], models, monkeypatch, 1e-4)


def test_scores_of_many_queries(models, data, monkeypatch):
    def compute(lm):
        layers = linear_layers(lm, 1, 4)
        queries = [gradient(lm, layers, data), gradient(lm, layers, data, Loss())]
        return [score_rows_for_many(lm, layers, [torch.stack(both) for both in zip(*queries, strict=True)], data)]

    same(compute, models, monkeypatch)


def fitted(lm: LanguageModel, rows: Rows) -> list[LayerCurvature]:
    """The curvature of the first three blocks, as the pipeline fits it."""
    layers = linear_layers(lm, 1, 3)
    sums = Covariances(layers, lm.wide_dtype, lm.device)
    accumulate(lm, layers, sums, rows, KEYS, Fisher())
    inputs = [eigenbasis(sums.inputs(i)) for i in range(len(layers))]
    outputs = [eigenbasis(sums.outputs(i)) for i in range(len(layers))]
    bases = [(a.vectors, s.vectors) for a, s in zip(inputs, outputs, strict=True)]
    squares = SquaredGradients(layers, bases)
    accumulate(lm, layers, squares, rows, KEYS, Fisher())
    return [
        LayerCurvature(a.vectors, s.vectors, squares.eigenvalues(i), a.values, s.values)
        for i, (a, s) in enumerate(zip(inputs, outputs, strict=True))
    ]


@BOTH
def test_curvature_with_labels_drawn_from_the_model(models, data, monkeypatch):
    def compute(lm):
        curvature = fitted(lm, data)
        assert all(c.inputs.device == lm.device for c in curvature)
        query = gradient(lm, linear_layers(lm, 1, 3), data)
        solved = precondition(query, lambda i: curvature[i], 10.0)
        return [matrix.cpu().numpy() for matrix in solved]

    same(compute, models, monkeypatch, 1e-4)


def test_the_index(models, data, monkeypatch):
    """A projection is learned, and rows and queries are compressed by one that was learned on the CPU."""
    many = Rows([*data.ids] * 8, [*data.response] * 8)

    def learned(lm):
        curvature = fitted(lm, data)
        learner = Learner(lm, linear_layers(lm, 1, 3), lambda i: curvature[i], (2, 3), 10.0, 0, Progress())
        sides = learner.sides(data)
        return curvature, sides, learner.numbers(sides, many, data, 60)

    def compute(lm):
        def here(tensor):
            return tensor.to(lm.device)

        layers = linear_layers(lm, 1, 3)
        curvature, sides, kept = learned(lm)
        assert all(s.left.device == lm.device and torch.isfinite(s.left).all() for s in sides)
        assert len(kept.spread) == int(kept.ends[-1])
        assert 56 <= kept.packing.row_bytes <= 60
        curvature = [LayerCurvature(*(here(getattr(c, f.name)) for f in fields(c))) for c in reference[0]]
        projections = [
            projection.LayerProjection(
                *map(here, (*projection.row_maps(c, s), *projection.query_maps(c, s))), here(reference[2].places[i])
            )
            for i, (c, s) in enumerate(zip(reference[0], reference[1], strict=True))
        ]
        query = projection.compress_query(
            gradient(lm, layers, data), lambda i: curvature[i], lambda i: projections[i], 10.0, lm.dtype
        )
        found = np.zeros((len(data), len(reference[2].spread)), np.float32)
        for batch in projection.compress_rows(lm, layers, dict(enumerate(projections)), data):
            for row in batch:
                found[row.index] = row.numbers
        return found, query.cpu().numpy()

    reference = learned(models[0])
    same(compute, models, monkeypatch, 1e-3)


@BOTH
def test_activations_and_own_answers(models, data, monkeypatch):
    def compute(lm):
        means = {}
        for batch in response_activations(lm, data.ids, data.response, [2]):
            means |= {row.index: row.mean[2] for row in batch}
        prompts = [ids[:5] for ids in data.ids]
        made: dict[int, np.ndarray] = {}
        for seeds in (None, list(range(6))):
            for batch in answers(lm, prompts, 6, seeds):
                made |= {i + (6 if seeds else 0): ids for i, ids in batch.items()}
        return [*(means[i] for i in range(6)), *(made[i] for i in range(12))]

    same(compute, models, monkeypatch)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_steps_of_training(models, data, monkeypatch, weights):
    recipe = Recipe(weights=weights, rank=2, learning_rate=1e-2, max_steps=2, batch=3, max_tokens=30)

    def compute(lm):
        before = mean_losses(lm, data)
        with fine_tuned(lm, data, KEYS, recipe, seed=0) as training:
            assert training.steps == 2
            during = mean_losses(lm, data)
        assert (during != before).all()
        np.testing.assert_array_equal(mean_losses(lm, data), before)
        return [before, during]

    same(compute, models, monkeypatch, 1e-4)


def test_the_quality_of_an_sae(monkeypatch):
    class Sae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W_dec = torch.nn.Parameter(torch.eye(8)[:5], requires_grad=False)

        def encode(self, inputs):
            return torch.relu(inputs @ self.W_dec.T)

        def decode(self, features):
            return features @ self.W_dec

    tokens = np.random.default_rng(0).normal(size=(320, 8)).astype(np.float32)
    feed = sae_training.TokenFeed([(320, lambda: tokens)], 10, 0)
    expected = sae_training._measure(SparseAutoencoder(Sae(), 1, "small"), feed)
    with device_without_float64(monkeypatch):
        found = sae_training._measure(SparseAutoencoder(put_there(Sae()), 1, "small"), feed)
    assert found == expected and found.n_tokens == 20


def test_an_audit_is_indexed_and_ranked(built, tmp_path, monkeypatch):
    """All stages on demand, on the model of an audit that was built on the CPU."""
    read = shard_files.load_file

    def load_there(path, device="cpu"):
        return {name: tensor.to(device) for name, tensor in read(path).items()}

    monkeypatch.setattr(shard_files, "load_file", load_there)
    made = chat_rows(8, seed=5)
    examples = [
        LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)
    ]
    index = IndexOptions(row_bytes=200, samples=40, precision="float32")
    exact = InfluenceOptions.of(precision="float32", curvature_tokens=600, engine="exact")

    def compute(name, move):
        audit = Audit(shutil.copytree(built, tmp_path / name))
        model = move(audit.opened.model().model)
        audit.opened._lm = as_language_model("small", model, audit.opened.model().tokenizer)
        return audit

    def rank(audit):
        audit.train_probe("tone", examples, layer=2)
        audit.build_index(index)
        tables = [audit.rank("tone", "concept_influence", options=o) for o in (InfluenceOptions(), exact)]
        tables += [audit.rank("tone", "influence_function", options=exact.changed(rank=8))]
        return [table.set_index("example_id").sort_index()["score"].to_numpy() for table in tables]

    here, there = compute("here", lambda model: model), compute("there", put_there)
    expected = rank(here)
    with device_without_float64(monkeypatch):
        found = rank(there)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(other).max())
    assert np.corrcoef(found[0], expected[0])[0, 1] > 0.99
