"""Every gradient method against float64 brute force: per-row gradients by `torch.func`, curvature
matrices written out from their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

from concept_audit.influence.curvature import LayerCurvature, eigenbasis, kfac_eigenvalues
from concept_audit.influence.fitting import Covariances, Fisher, SquaredGradients, accumulate, uniform
from concept_audit.influence.queries import (
    DenseQueries,
    Loss,
    LowRankQueries,
    NegatedConcept,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import FeatureActivation, Projection
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from tests.conftest import small_model, small_tokenizer

ARCHITECTURES = ["llama", "qwen2", "gemma", "gpt2", "gpt_neox"]
LAYER = 3
DAMPING = 0.1
LENGTHS = (12, 30, 7, 19, 25, 9)


def model(architecture: str):
    """Grouped-query attention (llama, qwen2, gemma), biases (qwen2, gpt2, gpt_neox), Conv1D (gpt2)."""
    return as_language_model(architecture, small_model(architecture).double(), small_tokenizer())


def rows() -> Rows:
    random = np.random.default_rng(0)
    ids = [random.integers(3, 390, length) for length in LENGTHS]
    response = [np.arange(length) >= 4 for length in LENGTHS]
    response[1][10:15] = False  # two turns
    response[3][-4:] = False  # tokens after the last response
    return Rows(ids, response)


def direction() -> np.ndarray:
    v = np.random.default_rng(1).normal(size=32).astype(np.float32)
    return v / np.linalg.norm(v)


class BruteForce:
    """One row at a time, no padding, weights as they stand in the model."""

    def __init__(self, lm, layers, data: Rows):
        self.lm, self.layers, self.data = lm, layers, data
        self.weights = {f"{layer.name}.weight": layer.module.weight.detach() for layer in layers}

    def _call(self, weights, i, **wanted):
        ids = torch.from_numpy(self.data.ids[i])[None]
        return functional_call(self.lm.model, weights, kwargs={"input_ids": ids, "use_cache": False, **wanted})

    def nll(self, weights, i, labels=None):
        logits = self._call(weights, i).logits[0, :-1]
        targets = torch.from_numpy(self.data.ids[i])[1:] if labels is None else labels
        nll = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return nll[torch.from_numpy(self.data.response[i][1:])]

    def lack(self, weights, i):
        stream = self._call(weights, i, output_hidden_states=True).hidden_states[LAYER][0]
        return -(stream @ torch.from_numpy(direction()).double())[torch.from_numpy(self.data.response[i])].mean()

    def gradient(self, quantity, *arguments) -> list[torch.Tensor]:
        """[out, in] for each layer."""
        found = grad(quantity)(self.weights, *arguments)
        return [
            (found[f"{layer.name}.weight"].T if layer.transposed else found[f"{layer.name}.weight"]).detach()
            for layer in self.layers
        ]

    def loss_gradient(self, i):
        return self.gradient(lambda w: self.nll(w, i).mean())

    def token_vectors(self, i, kind):
        """(a [tokens, in], δ [tokens, out]) of each layer: δ is the gradient of what is added to an output."""
        inputs, added = {}, {}

        def keep(index):
            def hook(_module, arguments, output):
                inputs[index] = arguments[0].detach()[0]
                added[index] = torch.zeros_like(output, requires_grad=True)
                return output + added[index]

            return hook

        with torch.no_grad():
            labels = self._labels(i, kind)
        handles = [layer.module.register_forward_hook(keep(k)) for k, layer in enumerate(self.layers)]
        try:
            loss = self._fisher_loss(self.weights, i, kind, labels)
        finally:
            for handle in handles:
                handle.remove()
        outputs = torch.autograd.grad(loss, [added[k] for k in range(len(self.layers))])
        span = int(np.flatnonzero(self.data.response[i])[-1]) + 1
        return [(inputs[k][:span], outputs[k][0, :span]) for k in range(len(self.layers))]

    def curvature(self, kind, corrected) -> list[torch.Tensor]:
        """H of each layer written out: [out × in, out × in]."""
        n = len(self.data)
        vectors = [self.token_vectors(i, kind) for i in range(n)]
        labels = [self._labels(i, kind) for i in range(n)]
        gradients = [self.gradient(lambda w, i=i: self._fisher_loss(w, i, kind, labels[i])) for i in range(n)]
        found = []
        for k in range(len(self.layers)):
            tokens = torch.cat([vectors[i][k][0] for i in range(n)])
            A = sum(torch.outer(a, a) for a in tokens) / len(tokens)
            S = sum(torch.outer(d, d) for i in range(n) for d in vectors[i][k][1]) / n
            if not corrected:
                found.append(torch.kron(S, A))
                continue
            Q = torch.kron(torch.linalg.eigh(S).eigenvectors, torch.linalg.eigh(A).eigenvectors)
            squares = sum((Q.T @ gradients[i][k].reshape(-1)) ** 2 for i in range(n)) / n
            found.append(Q @ torch.diag(squares) @ Q.T)
        return found

    def _labels(self, i, kind):
        if kind == "empirical":
            return None
        probabilities = self._call(self.weights, i).logits[0, :-1].softmax(-1)
        mask = torch.from_numpy(self.data.response[i][1:])
        labels = torch.from_numpy(self.data.ids[i])[1:].clone()
        draws = uniform(str(i), 7, int(mask.sum()))
        for place, u in zip(mask.nonzero()[:, 0].tolist(), draws, strict=True):
            labels[place] = int((probabilities[place].cumsum(0) <= u).sum())
        return labels

    def _fisher_loss(self, weights, i, kind, labels):
        nll = self.nll(weights, i, labels)
        return nll.mean() if kind == "empirical" else nll.sum() / len(nll) ** 0.5


def inner(left, right) -> float:
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))


def engine(lm, layers, queries, data, mode="token_sum", **options) -> list:
    found = {}
    for batch in score_rows(lm, layers, queries, data, mode, budget=64, **options):
        found |= {row.index: row for row in batch}
    return [found[i] for i in range(len(data))]


def fitted(lm, layers, data, fisher, corrected) -> list[LayerCurvature]:
    keys = list(map(str, range(len(data))))
    covariances = Covariances(layers, torch.float64, lm.device)
    accumulate(lm, layers, covariances, data, keys, fisher, budget=64)
    inputs = [eigenbasis(covariances.inputs(k)) for k in range(len(layers))]
    outputs = [eigenbasis(covariances.outputs(k)) for k in range(len(layers))]
    if not corrected:
        return [
            LayerCurvature(a.vectors, s.vectors, kfac_eigenvalues(a, s), a.values, s.values)
            for a, s in zip(inputs, outputs, strict=True)
        ]
    squares = SquaredGradients(layers, [(a.vectors, s.vectors) for a, s in zip(inputs, outputs, strict=True)])
    accumulate(lm, layers, squares, data, keys, fisher, budget=64)
    return [
        LayerCurvature(a.vectors, s.vectors, squares.eigenvalues(k), a.values, s.values)
        for k, (a, s) in enumerate(zip(inputs, outputs, strict=True))
    ]


def close(found, wanted, relative=1e-6):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert np.abs(found - wanted).max() <= relative * np.abs(wanted).max()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    lm = model(request.param)
    return lm, rows()


def queries_of(lm, layers, quantity, data):
    """The mean over the first two rows."""
    return query_gradient(lm, layers, quantity, Rows(data.ids[:2], data.response[:2]), [0.5, 0.5], budget=32)


def test_gradient_dot_equals_brute_force(case):
    lm, data = case
    layers = linear_layers(lm, 1, lm.n_layers)
    brute = BruteForce(lm, layers, data)
    query = [(a + b) / 2 for a, b in zip(brute.loss_gradient(0), brute.loss_gradient(1), strict=True)]
    wanted = [inner(brute.loss_gradient(i), query) for i in range(len(data))]
    ours = DenseQueries([queries_of(lm, layers, Loss(), data)], torch.float64)
    close([row.scores[0] for row in engine(lm, layers, ours, data)], wanted)


def test_concept_influence_without_curvature_equals_brute_force(case):
    lm, data = case
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)
    query = [(a + b) / 2 for a, b in zip(*(brute.gradient(brute.lack, i) for i in (0, 1)), strict=True)]
    wanted = [inner(brute.loss_gradient(i), query) for i in range(len(data))]
    gradient = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    found = engine(lm, layers, DenseQueries([gradient], torch.float64), data)
    close([row.scores[0] for row in found], wanted)
    for row in found:
        assert row.loss == pytest.approx(float(brute.nll(brute.weights, row.index).mean()), rel=1e-6)
        assert row.tokens.shape == (LENGTHS[row.index], 1)
        assert row.tokens.sum() == pytest.approx(row.scores[0], rel=1e-4, abs=1e-9)
    forward = engine(lm, layers, DenseQueries([gradient], torch.float64), data, "forward")
    close([row.scores[0] for row in forward], [row.scores[0] for row in found], 1e-5)


@pytest.mark.parametrize("kind", ["empirical", "sampled"])
@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_curvature_equals_brute_force(architecture, corrected, kind):
    lm, data = model(architecture), rows()
    layers = linear_layers(lm, 2, LAYER)
    brute = BruteForce(lm, layers, data)
    query = [(a + b) / 2 for a, b in zip(*(brute.gradient(brute.lack, i) for i in (0, 1)), strict=True)]
    solved = []
    for H, g in zip(brute.curvature(kind, corrected), query, strict=True):
        damped = H + DAMPING * H.trace() / len(H) * torch.eye(len(H), dtype=H.dtype)
        solved.append(torch.linalg.solve(damped, g.reshape(-1)).view_as(g))
    wanted = [inner(brute.loss_gradient(i), solved) for i in range(len(data))]
    gradient = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    curvature = fitted(lm, layers, data, Fisher(kind, 7), corrected)
    ours = DenseQueries([precondition(gradient, curvature.__getitem__, DAMPING)], torch.float64)
    close([row.scores[0] for row in engine(lm, layers, ours, data)], wanted, 1e-6)


def test_influence_function_equals_brute_force():
    lm, data = model("qwen2"), rows()
    layers = linear_layers(lm, lm.n_layers, lm.n_layers)
    brute = BruteForce(lm, layers, data)
    query = [(a + b) / 2 for a, b in zip(brute.loss_gradient(0), brute.loss_gradient(1), strict=True)]
    solved = []
    for H, g in zip(brute.curvature("sampled", True), query, strict=True):
        damped = H + DAMPING * H.trace() / len(H) * torch.eye(len(H), dtype=H.dtype)
        solved.append(torch.linalg.solve(damped, g.reshape(-1)).view_as(g))
    wanted = [inner(brute.loss_gradient(i), solved) for i in range(len(data))]
    curvature = fitted(lm, layers, data, Fisher("sampled", 7), True)
    solution = precondition(queries_of(lm, layers, Loss(), data), curvature.__getitem__, DAMPING)
    close([row.scores[0] for row in engine(lm, layers, DenseQueries([solution], torch.float64), data)], wanted)


def test_unit_normalised_scores_are_divided_by_the_norm_of_the_row_gradient(case):
    lm, data = case
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)
    gradient = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    ours = DenseQueries([gradient], torch.float64)
    wanted = []
    for i in range(len(data)):
        row = brute.loss_gradient(i)
        wanted.append(inner(row, gradient) / inner(row, row) ** 0.5)
    close([row.scores[0] for row in engine(lm, layers, ours, data, unit_normalised=True)], wanted)


def test_a_full_rank_factorisation_changes_nothing_and_a_lower_one_says_what_it_loses():
    lm, data = model("llama"), rows()
    layers = linear_layers(lm, 1, LAYER)
    one = queries_of(lm, layers, NegatedConcept(Projection(LAYER, direction())), data)
    other = queries_of(lm, layers, NegatedConcept(Projection(LAYER, np.roll(direction(), 3))), data)
    dense = engine(lm, layers, DenseQueries([one, other], torch.float64), data)
    full = LowRankQueries([one, other], 64, torch.float64)
    assert full.retained == pytest.approx([1, 1])
    close([row.scores for row in engine(lm, layers, full, data)], [row.scores for row in dense], 1e-8)
    low = LowRankQueries([one, other], 2, torch.float64)
    exact = [float(torch.linalg.svdvals(g)[:2].square().sum()) for g in one]
    whole = sum(float(g.square().sum()) for g in one)
    assert low.retained[0] == pytest.approx(sum(exact) / whole, rel=1e-3)
    assert low.retained[0] < 1


def test_a_feature_activation_is_differentiated_through_its_encoder():
    from sae_lens import StandardSAE, StandardSAEConfig

    lm, data = model("llama"), rows()
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, dtype="float64"))
    torch.nn.init.normal_(sae.W_enc, std=0.3)
    sae.requires_grad_(False)
    layers = linear_layers(lm, 1, LAYER)
    brute = BruteForce(lm, layers, data)

    def lack(weights, i):
        stream = brute._call(weights, i, output_hidden_states=True).hidden_states[LAYER][0]
        pre = (stream - sae.b_dec) @ sae.W_enc[:, 5] + sae.b_enc[5]
        return -torch.relu(pre)[torch.from_numpy(data.response[i])].mean()

    wanted = brute.gradient(lack, 1)
    assert any(g.abs().max() > 0 for g in wanted)
    found = query_gradient(
        lm, layers, NegatedConcept(FeatureActivation(LAYER, sae, 5)), Rows(data.ids[1:2], data.response[1:2]), [1.0]
    )
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs)
