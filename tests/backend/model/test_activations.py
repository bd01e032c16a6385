"""The activation pass against the slow obvious computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.model.activations import batches_by_length, residual_stream, response_activations
from concept_audit.model.load import as_language_model
from tests.conftest import small_model, small_tokenizer

ARCHITECTURES = ["llama", "qwen2", "gemma", "gpt2", "gpt_neox"]
LAYERS = (1, 2, 4)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request):
    return as_language_model(request.param, small_model(request.param), small_tokenizer())


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = [3, 40, 17, 17, 90, 8, 61]
    ids = [rng.integers(4, 390, n).astype(np.int32) for n in lengths]
    response = [np.arange(n) >= n // 2 for n in lengths]
    return ids, response


def plain_loop(lm, ids, response, layer):
    """One row at a time, no padding, every hidden state; the last layer before the final norm."""
    final = {}
    hook = lm.blocks[-1].register_forward_hook(
        lambda _m, _i, out: final.update(h=out[0] if isinstance(out, tuple) else out)
    )
    means = []
    with torch.no_grad():
        for row, mask in zip(ids, response, strict=True):
            out = lm.model(input_ids=torch.tensor(row[None].astype(np.int64)), output_hidden_states=True)
            states = final["h"] if layer == lm.n_layers else out.hidden_states[layer]
            means.append(states[0][torch.tensor(mask)].mean(0).numpy())
    hook.remove()
    return np.stack(means)


def collected(lm, ids, response, layers, stream=(), budget=None):
    batches = response_activations(lm, ids, response, layers, stream, budget)
    return {row.index: row for batch in batches for row in batch}


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_means_equal_a_plain_loop_for_any_batch_size(lm, rows, budget):
    ids, response = rows
    found = collected(lm, ids, response, LAYERS, budget=budget)
    for layer in LAYERS:
        ours = np.stack([found[i].mean[layer] for i in range(len(ids))])
        np.testing.assert_allclose(ours, plain_loop(lm, ids, response, layer), rtol=1e-4, atol=1e-5)


def test_streams_average_to_the_means(lm, rows):
    ids, response = rows
    for row in collected(lm, ids, response, [2], [2]).values():
        assert row.streams[2].shape == (len(ids[row.index]), lm.d_model)
        np.testing.assert_allclose(row.streams[2][response[row.index]].mean(0), row.mean[2], rtol=1e-4, atol=1e-5)


def test_nothing_above_the_deepest_layer_runs(lm, rows):
    ids, response = rows
    ran = []
    watched = [*lm.blocks[2:], lm.model.get_output_embeddings()]
    hooks = [module.register_forward_hook(lambda m, _i, _o: ran.append(m)) for module in watched]
    collected(lm, ids, response, [1, 2])
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_hooks_are_gone_afterwards_also_after_an_error(lm):
    before = [len(block._forward_hooks) for block in lm.blocks]
    with pytest.raises(RuntimeError, match="stop"), residual_stream(lm, [1, 3]):
        raise RuntimeError("stop")
    assert [len(block._forward_hooks) for block in lm.blocks] == before


def test_a_row_without_response_tokens_has_no_mean(lm, rows):
    ids, _ = rows
    found = collected(lm, ids[:2], [np.zeros(len(row), bool) for row in ids[:2]], [2])
    assert all(np.isnan(row.mean[2]).all() for row in found.values())


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [int(n) for n in np.random.default_rng(1).integers(1, 300, 200)]
    batches = batches_by_length(lengths, 1000)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches)


def test_a_row_longer_than_the_budget_goes_alone():
    assert batches_by_length([5000, 10, 10], 100) == [[0], [1, 2]]
