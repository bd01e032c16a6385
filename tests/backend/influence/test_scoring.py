"""Scoring rows with a model in memory: batches, what fits into memory, and weights of other kinds."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from concept_audit import ModelError
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, query_gradient
from concept_audit.influence.scoring import plan, score_rows
from concept_audit.influence.targets import Projection
from concept_audit.model import gradients
from concept_audit.model.linear import linear_layers, resolve_weights
from concept_audit.model.load import as_language_model, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.progress import Progress
from tests.conftest import small_model, small_tokenizer


@pytest.fixture(scope="module")
def data() -> Rows:
    random = np.random.default_rng(3)
    ids = [random.integers(3, 390, length) for length in random.integers(8, 60, 20)]
    return Rows(ids, [np.arange(len(row)) >= 5 for row in ids])


def scores(lm, query, data, budget=None, **options) -> np.ndarray:
    found = np.full(len(data), np.nan)
    for batch in score_rows(lm, *query, data, budget=budget, **options):
        for row in batch:
            found[row.index] = row.scores[0]
    return found


def test_scores_do_not_depend_on_batches_or_order_or_padding(lm, query, data):
    alone = scores(lm, query, data, budget=1)
    scale = np.abs(alone).max()
    for budget in (100, 400, 10_000):
        assert np.abs(scores(lm, query, data, budget) - alone).max() <= 1e-4 * scale
    order = np.random.default_rng(0).permutation(len(data))
    mixed = Rows([data.ids[i] for i in order], [data.response[i] for i in order])
    assert np.abs(scores(lm, query, mixed, 300) - alone[order]).max() <= 1e-4 * scale
    longer = Rows(
        [np.concatenate([ids, ids[:7]]) for ids in data.ids],
        [np.concatenate([mask, np.zeros(7, bool)]) for mask in data.response],
    )
    assert np.abs(scores(lm, query, longer, 300) - alone).max() <= 1e-4 * scale


def test_the_plan_takes_the_token_sum_while_a_row_fits_and_forward_mode_beyond(lm, query):
    layers, queries = query
    ample = plan(lm, layers, queries, memory=1 << 30)
    token = ample.bytes["token_sum"]
    assert ample.mode == "token_sum" and ample.bytes["forward"] < token
    assert ample.longest == (1 << 30) // token
    for memory, longest in ((100 * token, 100), (100 * token - 1, 99), (0, 0)):
        found = plan(lm, layers, queries, memory)
        assert (found.mode, found.longest) == ("token_sum", longest)
    for mode in ("token_sum", "forward"):
        assert (plan(lm, layers, queries, 0, mode).mode, plan(lm, layers, queries, 0, mode).longest) == (mode, None)
    many = DenseQueries([[m[0] for m in queries.matrices]] * 3, torch.float32)
    cost = plan(lm, layers, many, 1 << 30).operations
    assert cost["forward"] > cost["token_sum"]


def test_a_batch_that_does_not_fit_into_memory_is_halved(lm, query, data, monkeypatch):
    wanted = scores(lm, query, data)
    plain = gradients.GradientPass.losses

    def greedy(self, batch, *rest, **options):
        if len(batch.rows) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return plain(self, batch, *rest, **options)

    monkeypatch.setattr(gradients.GradientPass, "losses", greedy)
    said: list[str] = []
    found = scores(lm, query, data, say=said.append)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert any(line.startswith("Out of memory on a batch of") for line in said)
    monkeypatch.setattr(
        gradients.GradientPass, "losses", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(ModelError, match="out of memory on a batch of one row"):
        scores(lm, query, data)


@pytest.mark.parametrize("broken", [False, True], ids=["all losses finite", "one is not"])
def test_the_sums_of_a_pass_leave_memory_when_nobody_has_them_any_more(lm, data, broken, monkeypatch):
    """They are as large as the square of a model's width, and garbage is collected seldom."""
    from concept_audit.influence.fitting import Covariances, Fisher, accumulate

    plain = gradients.LanguageModelHead.token_losses

    def losses(self, batch, draw=None):
        found = plain(self, batch, draw)
        return found * float("nan") if broken and len(batch.rows) == 1 else found

    monkeypatch.setattr(gradients.LanguageModelHead, "token_losses", losses)
    gc.collect()
    gc.disable()
    try:
        into = Covariances(linear_layers(lm, 1, 3), torch.float64, lm.device)
        accumulate(
            lm, linear_layers(lm, 1, 3), into, data, list(map(str, range(len(data)))), Fisher("empirical"), budget=100
        )
        left = weakref.ref(into)
        del into
        assert left() is None
    finally:
        gc.enable()


def test_memory_that_runs_out_halfway_through_a_fit_counts_no_row_twice(lm, data, monkeypatch):
    from concept_audit.influence.fitting import Covariances, Fisher, accumulate

    layers = linear_layers(lm, 1, 3)
    keys = list(map(str, range(len(data))))

    def sums(fail: bool) -> dict[str, torch.Tensor]:
        into = Covariances(layers, torch.float64, lm.device)
        if fail:
            visitor = into.visitor

            def failing(batch):
                visit, seen = visitor(batch), []

                def sometimes(index, a, delta):
                    seen.append(index)
                    if len(batch.rows) > 1 and len(seen) == 9:
                        raise MemoryError
                    visit(index, a, delta)

                return sometimes

            into.visitor = failing
        accumulate(lm, layers, into, data, keys, Fisher("empirical"), budget=200)
        return into.tensors()

    plain, disturbed = sums(False), sums(True)
    for name, tensor in plain.items():
        assert (disturbed[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


def test_a_model_without_linear_layers_in_its_blocks_is_refused(lm):
    class Empty(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states

    bare = as_language_model("bare", small_model("llama"), small_tokenizer())
    for i in range(len(bare.blocks)):
        bare.blocks[i] = Empty()
    with pytest.raises(ModelError, match="no linear layers"):
        linear_layers(bare, 1, 2)


def test_an_adapter_is_attributed_to_its_lora_weights(tmp_path, model_directory, data):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_directory)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    lm = load_model(ModelOptions(str(tmp_path / "adapter"), device="cpu"), tmp_path, Progress())
    assert resolve_weights(lm, "auto") == "lora"
    lora, linear = linear_layers(lm, 1, 3, "lora"), linear_layers(lm, 1, 3, "linear")
    assert len(lora) == 3 * 2 * 2 and all("lora_" in layer.name for layer in lora)
    assert len(linear) == 3 * 7 and not any("lora_" in layer.name for layer in linear)
    v = np.ones(32, np.float32)
    few = Rows(data.ids[:2], data.response[:2])
    gradient = query_gradient(lm, lora, NegatedConcept(Projection(3, v)), few, [0.5, 0.5])
    found = scores(lm, (lora, DenseQueries([gradient], torch.float32)), few)
    for i in range(2):
        weights = [layer.module.weight.requires_grad_(True) for layer in lora]
        ids = torch.from_numpy(few.ids[i])[None]
        labels = torch.where(torch.from_numpy(few.response[i])[None], ids, -100)
        loss = lm.model(input_ids=ids, labels=labels).loss
        wanted = sum((g * q).sum() for g, q in zip(torch.autograd.grad(loss, weights), gradient, strict=True))
        assert found[i] == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(ModelError, match="has no LoRA weights"):
        resolve_weights(as_language_model("plain", small_model("llama"), small_tokenizer()), "lora")


def test_a_head_that_does_more_than_multiply_is_recognised(data):
    import transformers as hf

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(
        hf.Gemma2Config(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=1.0,
            attn_implementation="eager",
        )
    ).eval()
    model.lm_head.weight.data.mul_(30)
    lm = as_language_model("capped", model, small_tokenizer())
    layers = linear_layers(lm, 1, 2)
    few = Rows(data.ids[:3], data.response[:3])
    v = np.ones(32, np.float32)
    gradient = query_gradient(lm, layers, NegatedConcept(Projection(2, v)), Rows(few.ids[:1], few.response[:1]), [1.0])
    for batch in score_rows(lm, layers, DenseQueries([gradient], torch.float32), few):
        for row in batch:
            ids = torch.from_numpy(few.ids[row.index])[None]
            labels = torch.where(torch.from_numpy(few.response[row.index])[None], ids, -100)
            assert row.loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-4)
