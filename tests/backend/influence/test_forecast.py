"""The forecast against brute force, and against the mean of the rows' influence scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from concept_audit.influence import forecast as forecast_module
from concept_audit.influence.curvature import LayerCurvature, eigenbasis, kfac_eigenvalues
from concept_audit.influence.fitting import Covariances, Fisher, accumulate
from concept_audit.influence.forecast import changes, gradient_sum, mean_derivative
from concept_audit.influence.forecast_intervals import GroupForecasts, intervals
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, precondition, query_gradient
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import FeatureActivation, Projection
from concept_audit.model import gradients
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from tests.conftest import small_model, small_tokenizer

LAYER, DEEPEST, DAMPING = 2, 3, 10.0


class Sae:
    """Encodes as an SAE does that keeps the k largest: the gates depend on the token."""

    def __init__(self, dtype=torch.float32):
        random = np.random.default_rng(5)
        self.W_enc = torch.from_numpy(random.normal(size=(32, 48))).to(dtype)
        self.W_dec = self.W_enc.T

    def encode(self, stream):
        before = (stream - 0.1) @ self.W_enc
        return torch.where(before >= before.topk(12).values[..., -1:], before, 0).relu()


def model(double: bool = False):
    made = small_model("llama")
    return as_language_model("small", made.double() if double else made, small_tokenizer())


def rows(lengths=(12, 30, 7, 19, 25, 9), seed=0) -> Rows:
    random = np.random.default_rng(seed)
    ids = [random.integers(3, 390, length) for length in lengths]
    return Rows(ids, [np.arange(length) >= 4 for length in lengths])


def direction() -> np.ndarray:
    v = np.random.default_rng(1).normal(size=32).astype(np.float32)
    return v / np.linalg.norm(v)


def curvatures(lm, layers, data):
    covariances = Covariances(layers, lm.wide_dtype, lm.device)
    accumulate(lm, layers, covariances, data, list(map(str, range(len(data)))), Fisher("sampled", 7), budget=64)
    found = []
    for k in range(len(layers)):
        a, s = eigenbasis(covariances.inputs(k)), eigenbasis(covariances.outputs(k))
        found.append(LayerCurvature(a.vectors, s.vectors, kfac_eigenvalues(a, s), a.values, s.values))
    return found


def forecast(lm, layers, step, prompts, sae, budget=64):
    found = {}
    for batch in changes(lm, layers, step, prompts, (LAYER, DEEPEST), sae.encode, LAYER, budget):
        found |= {each.index: each for each in batch}
    return [found[i] for i in range(len(prompts))]


def test_the_change_on_a_prompt_equals_brute_force_in_float64():
    """Sum of `torch.func` gradients, then the derivative of the plain model along it."""
    lm, data, prompts, sae = model(double=True), rows(), rows((14, 11, 21), seed=4), Sae(torch.float64)
    layers = linear_layers(lm, 1, DEEPEST)
    weights = {f"{layer.name}.weight": layer.module.weight.detach() for layer in layers}

    def loss(w, i):
        logits = functional_call(lm.model, w, kwargs={"input_ids": torch.from_numpy(data.ids[i])[None]}).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(1, torch.from_numpy(data.ids[i])[1:, None])[:, 0]
        return nll[torch.from_numpy(data.response[i][1:])].mean()

    brute = torch.func.grad(lambda w: sum(loss(w, i) for i in range(len(data))))(weights)
    curvature = curvatures(lm, layers, data)
    wanted_step = {name: -curvature[k].solve(brute[name].detach(), DAMPING) for k, name in enumerate(weights)}
    total, added = gradient_sum(lm, layers, data, [1.0] * len(data), range(len(data)), budget=64)
    assert added == set(range(len(data)))
    step = [-matrix for matrix in precondition(total, curvature.__getitem__, DAMPING)]
    for each in forecast(lm, layers, step, prompts, sae):
        ids, mask = torch.from_numpy(prompts.ids[each.index])[None], torch.from_numpy(prompts.response[each.index])

        def read(w, ids=ids, mask=mask):
            output = functional_call(
                lm.model, w, kwargs={"input_ids": ids, "output_hidden_states": True, "use_cache": False}
            )
            at = {layer: output.hidden_states[layer][0][mask] for layer in (LAYER, DEEPEST)}
            return at[LAYER].mean(0), at[DEEPEST].mean(0), sae.encode(at[LAYER]).mean(0)

        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            _, wanted = jvp(read, (weights,), (wanted_step,))
        found = each.streams[LAYER], each.streams[DEEPEST], each.features
        for ours, exact in zip(found, wanted, strict=True):
            assert np.abs(ours - exact.numpy()).max() <= 1e-6 * float(exact.abs().max())


def test_the_forecast_along_a_concept_is_the_mean_of_the_rows_scores():
    """In float32, by a probe at a layer above the SAE's, and by features through the encoder."""
    lm, data, prompts, sae = model(), rows(), rows((14, 11, 21), seed=4), Sae()
    layers = linear_layers(lm, 1, DEEPEST)
    curvature = curvatures(lm, layers, data)
    total, _ = gradient_sum(lm, layers, data, [1.0] * len(data), range(len(data)), budget=64)
    step = [-matrix for matrix in precondition(total, curvature.__getitem__, DAMPING)]
    found = forecast(lm, layers, step, prompts, sae)
    features = np.mean([each.features for each in found], 0) / len(data)
    strongest = np.argsort(-np.abs(features))[:3]
    cases = [(Projection(DEEPEST, direction()), np.mean([e.streams[DEEPEST] for e in found], 0) @ direction())]
    cases += [(FeatureActivation(LAYER, sae, int(i)), features[i] * len(data)) for i in strongest]
    for target, ours in cases:
        reach = linear_layers(lm, 1, target.layer)
        gradient = query_gradient(lm, reach, NegatedConcept(target), prompts, [1 / 3] * 3, budget=64)
        query = DenseQueries([precondition(gradient, curvature.__getitem__, DAMPING)], torch.float32)
        scores = [row.scores[0] for batch in score_rows(lm, reach, query, data, budget=64) for row in batch]
        assert ours / len(data) == pytest.approx(np.mean(scores), rel=1e-3)


def test_a_row_without_a_finite_loss_is_left_out_and_so_is_the_other_side_of_its_pair(monkeypatch):
    lm, data = model(), rows((12, 14, 16))
    layers = linear_layers(lm, 1, 2)
    alone, _ = gradient_sum(lm, layers, Rows(data.ids[2:], data.response[2:]), [1.0], [1])
    plain = gradients.LanguageModelHead.token_losses
    first = set(data.ids[0].tolist()[5:])

    def broken(self, batch, draw=None):
        """The first row, which the pass that undoes its other side does not see."""
        owners = gradients.supervised(batch).nonzero()[:, 0].tolist()
        bad = [set(batch.ids[i].tolist()) > first for i in range(len(batch.rows))]
        return plain(self, batch, draw) * torch.tensor([float("nan") if bad[i] else 1.0 for i in owners])

    monkeypatch.setattr(gradients.LanguageModelHead, "token_losses", broken)
    said: list[str] = []
    _, added = gradient_sum(lm, layers, data, [1.0, 1.0, 1.0], [0, 1, 2], say=said.append)
    assert added == {1, 2} and said == ["1 rows have a loss that is not finite; the forecast is without them"]
    total, added = gradient_sum(lm, layers, data, [1.0, -1.0, 1.0], [0, 0, 1])
    assert added == {1}
    for ours, wanted in zip(total, alone, strict=True):
        assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_an_encoder_is_differentiated_in_pieces_as_at_once(monkeypatch):
    sae = Sae(torch.float64)
    random = torch.Generator().manual_seed(0)
    stream, along = torch.randn(2, 9, 32, dtype=torch.float64, generator=random)
    _, wanted = jvp(sae.encode, (stream,), (along,))
    assert torch.allclose(mean_derivative(sae.encode, stream, along), wanted.mean(0))
    monkeypatch.setattr(forecast_module, "CELLS_AT_ONCE", 100)
    assert torch.allclose(mean_derivative(sae.encode, stream, along), wanted.mean(0))


def drawn(effect: float, noise: float, seed: int, groups: int = 16) -> GroupForecasts:
    random = np.random.default_rng(seed)
    counts = random.integers(20, 40, groups).astype(float)
    of_rows = np.array([random.normal(effect, noise, (int(n), 1)).sum(0) for n in counts])
    prompts = 1 + random.normal(0, 0.1, (1, 24, 1))
    return GroupForecasts((of_rows[:, None] * prompts).astype(np.float32), counts)


def test_a_common_push_leaves_the_null_band_and_noise_alone_does_not():
    seeds = range(40)
    pushed = [intervals([(1.0, drawn(1.0, 2.0, seed))], seed) for seed in seeds]
    assert all(each.forecast[0] > each.null_high[0] and each.low[0] > 0 for each in pushed)
    # The band says what chance leaves, whatever the push is: 1.96 standard errors of the mean of 480 rows.
    widths = [(each.null_high - each.null_low)[0] / 2 for each in pushed]
    assert np.mean(widths) == pytest.approx(1.96 * 2.0 / 480**0.5, rel=0.15)
    noise = [intervals([(1.0, drawn(0.0, 2.0, seed))], seed) for seed in seeds]
    outside = sum(not each.null_low[0] <= each.forecast[0] <= each.null_high[0] for each in noise)
    assert outside <= 6
    covered = sum(each.low[0] <= 1.0 <= each.high[0] for each in pushed)
    assert covered >= 33


def test_a_difference_of_parts_is_of_their_means_and_a_rest_is_what_the_sums_leave():
    whole, part = drawn(1.0, 1.0, 0), drawn(0.5, 1.0, 0)
    part = GroupForecasts(part.sums / 4, part.rows / 4)
    rest = whole.less(part)
    assert rest.rows.sum() == whole.rows.sum() - part.rows.sum()
    found = intervals([(1.0, part), (-1.0, rest)])
    assert found.forecast == pytest.approx(part.means() - rest.means())
    assert found.low[0] < found.forecast[0] < found.high[0]
    few = GroupForecasts(whole.sums[:3], whole.rows[:3])
    assert np.isnan(intervals([(1.0, few)]).low).all() and np.isfinite(intervals([(1.0, few)]).forecast).all()
