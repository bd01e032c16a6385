"""Adapters and precisions that people bring: mixed dtypes, trained heads, fresh adapters, float16, codes for weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from concept_audit.errors import ModelError
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.fitting import Covariances, Fisher
from concept_audit.influence.projection import Sides, row_maps
from concept_audit.influence.queries import DenseQueries, Loss, NegatedConcept, Rows, precondition, query_gradient
from concept_audit.influence.symmetric import from_upper
from concept_audit.influence.targets import Projection
from concept_audit.model.batches import Batch
from concept_audit.model.coverage import check_outside
from concept_audit.model.gradients import GradientPass, LanguageModelHead
from concept_audit.model.linear import linear_layers, resolve_weights
from concept_audit.model.load import as_language_model, fingerprint, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.model.precision import resolve_precision
from concept_audit.model.quantised import quantisation
from concept_audit.model.trainable import private_copy
from concept_audit.progress import Progress
from tests.architectures import adapted, packed, small
from tests.backend.influence.test_brute_force import BruteForce, close, engine, fitted, inner
from tests.backend.influence.test_models import brute_force
from tests.conftest import small_tokenizer

LENGTHS = (12, 20, 7)
DIRECTION = np.random.default_rng(1).normal(size=32).astype(np.float32)
CONCEPT = NegatedConcept(Projection(1, DIRECTION))


def language_model(model, name: str = "model"):
    return as_language_model(name, model, small_tokenizer())


@pytest.fixture(scope="module")
def data() -> Rows:
    random = np.random.default_rng(0)
    return Rows([random.integers(3, 390, n) for n in LENGTHS], [np.arange(n) >= 4 for n in LENGTHS])


def first(data: Rows) -> Rows:
    return Rows(data.ids[:1], data.response[:1])


def scored(lm, layers, gradient, data) -> np.ndarray:
    return np.array([row.scores[0] for row in engine(lm, layers, DenseQueries([gradient], lm.dtype), data)])


@pytest.mark.parametrize(("precision", "relative"), [("float32", 1e-4), ("bfloat16", 0.25)])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_float32_adapter_on_a_bfloat16_base_scores_as_in_float64(name, precision, relative, data):
    model = adapted(small(name, torch.bfloat16))
    for path, weight in model.named_parameters():
        if "lora_" in path:
            weight.data = weight.data.float()
    mixed = language_model(model)
    scorer = mixed.in_dtype(getattr(torch, precision))
    assert {p.dtype for p in scorer.model.parameters()} == {getattr(torch, precision)}
    exact = mixed.in_dtype(torch.float64)
    wanted = brute_force(exact, linear_layers(exact, 1, 1, "lora"), data, True)
    # The mixed model itself is scored too, without a copy.
    for lm, tolerance in ((scorer, relative), (mixed, 0.25)):
        layers = linear_layers(lm, 1, 1, "lora")
        gradient = query_gradient(lm, layers, CONCEPT, first(data), [1.0])
        close(scored(lm, layers, gradient, data), wanted, tolerance)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_loss_is_that_of_the_adapted_head(settings, fresh, data):
    model = adapted(small("Llama"), fresh, **settings)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "modules_to_save" in path:
                weight.add_(torch.randn_like(weight))
    lm = language_model(model)
    layers = linear_layers(lm, 1, 2, "lora")
    gradient = query_gradient(lm, layers, Loss(), first(data), [1.0])
    close(scored(lm, layers, gradient, data), brute_force(lm, layers, data, False))
    check_outside(lm, loss=False)
    with pytest.raises(ModelError, match=r"also trains weights outside the blocks \(.*lm_head.*% of its weights"):
        check_outside(lm, loss=True)


def test_trained_embeddings_are_refused_by_name():
    lm = language_model(adapted(small("Llama"), modules_to_save=["embed_tokens"]))
    with pytest.raises(ModelError, match=r"outside the blocks \(.*embed_tokens.modules_to_save.default.weight"):
        check_outside(lm, loss=False)


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
def test_a_fresh_adapter_has_the_scores_of_brute_force(corrected, data):
    lm = language_model(adapted(small("Llama"), fresh=True, target_modules=["q_proj", "down_proj"]))
    layers = linear_layers(lm, 1, 2, "lora")
    brute = BruteForce(lm, layers, data)
    query, solved = brute.loss_gradient(0), []
    for H, g in zip(brute.curvature("sampled", corrected), query, strict=True):
        damped = H + 0.1 * H.trace() / len(H) * torch.eye(len(H), dtype=H.dtype)
        # The matrices A have no gradient while B is 0.
        assert bool(H.any()) == bool(g.any())
        solved.append(torch.linalg.solve(damped, g.reshape(-1)).view_as(g) if H.any() else torch.zeros_like(g))
    wanted = [inner(brute.loss_gradient(i), solved) for i in range(len(data))]
    curvature = fitted(lm, layers, data, Fisher("sampled", 7), corrected)
    gradient = precondition(query_gradient(lm, layers, Loss(), first(data), [1.0]), curvature.__getitem__, 0.1)
    assert np.isfinite(scored(lm, layers, gradient, data)).all()
    close(scored(lm, layers, gradient, data), wanted)


def test_a_layer_without_curvature_is_whitened_to_finite_numbers():
    eye, nothing = torch.eye(3), torch.zeros(3)
    curvature = LayerCurvature(eye, eye, torch.zeros(3, 3), nothing, nothing)
    assert all(torch.isfinite(side).all() for side in row_maps(curvature, Sides(eye, eye)))
    assert not curvature.solve(torch.zeros(3, 3), 10.0).any() and not curvature.solve(eye, 0.0).any()


def test_an_adapter_that_is_loaded_and_not_in_use_is_left_out(data):
    model = adapted(small("Llama"), target_modules=["q_proj"])
    model.add_adapter("other", model.peft_config["default"])
    lm = language_model(model)
    layers = linear_layers(lm, 1, 2, "lora")
    assert {layer.name.rsplit(".", 1)[1] for layer in layers} == {"default"}
    close(
        scored(lm, layers, query_gradient(lm, layers, Loss(), first(data), [1.0]), data),
        brute_force(lm, layers, data, False),
    )


def test_adapters_without_low_rank_matrices_are_refused(tmp_path, model_directory):
    from peft import IA3Config, PromptTuningConfig, get_peft_model

    lm = language_model(get_peft_model(small("Llama"), IA3Config(task_type="CAUSAL_LM")).eval())
    with pytest.raises(ModelError, match="its adapter \\(IA3\\) has no LoRA weights"):
        resolve_weights(lm, "auto")
    assert resolve_weights(lm, "linear") == "linear"
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(small("Llama", torch.float32), settings)
    prompted.peft_config["default"].base_model_name_or_path = str(model_directory)
    prompted.save_pretrained(tmp_path / "prompted")
    with pytest.raises(ModelError, match="virtual tokens before every row"):
        load_model(ModelOptions(str(tmp_path / "prompted")), tmp_path, Progress())


def test_influence_never_runs_in_float16(data):
    half = language_model(small("Llama", torch.float16))
    layers = linear_layers(half, 1, 1)
    with pytest.raises(ModelError, match="float16, in which gradients underflow"), GradientPass(half, layers):
        pass
    assert resolve_precision("auto", torch.float16, half.device) in ("float32", "bfloat16")
    wide = half.differentiable()
    assert wide.dtype in (torch.float32, torch.bfloat16)
    assert wide.differentiable() is wide
    exact = half.in_dtype(torch.float64)
    layers = linear_layers(wide, 1, 1)
    found = scored(wide, layers, query_gradient(wide, layers, CONCEPT, first(data), [1.0]), data)
    close(found, brute_force(exact, linear_layers(exact, 1, 1), data, True), 0.05)


def test_covariances_of_narrow_vectors_are_summed_in_float32():
    lm = language_model(small("Llama", torch.float32))
    layers = linear_layers(lm, 1, 1)[:1]
    sums = Covariances(layers, torch.float32, lm.device)
    torch.manual_seed(0)
    a, delta = torch.randn(4, 200, 32).bfloat16(), torch.randn(4, 200, 32).bfloat16()
    everything = torch.ones(4, 200, dtype=torch.bool)
    sums.visitor(Batch([0, 1, 2, 3], torch.ones(4, 200, dtype=torch.long), everything, everything))(0, a, delta)
    exact = torch.einsum("rti,rtj->ij", a.double(), a.double())
    found = from_upper(sums.tensors()["inputs.0"], len(exact))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_quantised_weights_stay_what_they_are_in_any_precision():
    lm = language_model(adapted(packed(small("Llama", torch.float32))))
    assert quantisation(lm.model) == "PackedLinear"
    assert lm.dtype == torch.float32
    for made in (lm.in_dtype(torch.bfloat16), private_copy(lm, torch.bfloat16)):
        kinds = {p.dtype for p in made.model.parameters()}
        assert kinds == {torch.uint8, torch.bfloat16}
        own = dict(made.model.named_parameters())
        for name, weight in lm.model.named_parameters():
            assert weight.dtype != torch.uint8 or own[name] is weight


def test_the_fingerprint_follows_codes_that_are_kept_in_buffers():
    class Coded(nn.Module):
        def __init__(self, code: int):
            super().__init__()
            self.register_buffer("qweight", torch.full((4, 4), code, dtype=torch.int32))

    assert fingerprint(Coded(1)) != fingerprint(Coded(2))
    assert fingerprint(Coded(1)) == fingerprint(Coded(1))


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_a_quantised_model_is_refused_by_the_name_of_its_method(method):
    model = packed(small("Llama", torch.float32))
    model.config.quantization_config = {"quant_method": method}
    with pytest.raises(ModelError, match=rf"its weights are quantised \({method}\), so they have no gradient"):
        linear_layers(language_model(model), 1, 2)


def test_a_quantised_layer_that_ends_the_backward_pass_is_refused(data):
    lm = language_model(adapted(packed(small("Llama"), derivative=False)))
    layers = linear_layers(lm, 1, 2, "lora")
    with pytest.raises(ModelError, match=r"the quantised layer .* \(PackedLinear\) passes no gradient on"):
        query_gradient(lm, layers, Loss(), first(data), [1.0])


def test_a_quantised_layer_that_computes_in_float16_is_refused():
    lm = language_model(adapted(packed(small("Llama", torch.float32))))
    for module in lm.model.modules():
        if hasattr(module, "scale"):
            module.scale = module.scale.half()
    with (
        pytest.raises(ModelError, match="quantised layers compute in float16"),
        GradientPass(lm, linear_layers(lm, 1, 1, "lora")),
    ):
        pass


def test_a_soft_cap_on_small_logits_is_seen():
    lm = language_model(small("Gemma 2"))
    ids = torch.arange(5, 25)[None]
    everything = torch.ones_like(ids, dtype=torch.bool)
    found = LanguageModelHead(lm).token_losses(Batch([0], ids, everything, everything))
    logits = lm.model(input_ids=ids, use_cache=False).logits[0, :-1]
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
