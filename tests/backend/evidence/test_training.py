"""Fine-tuning runs: the same for a seed, and without a trace; and the first-order theorem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.errors import ConceptError
from concept_audit.evidence.first_order import Query, changes, identity_scores, learning_rate
from concept_audit.evidence.measures import HeldOut, measure
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.training import fine_tuned, mean_losses, shuffled
from concept_audit.influence.queries import Rows
from concept_audit.metrics import correlation
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model, fingerprint
from concept_audit.model.trainable import private_copy, trainable
from tests.conftest import small_model, small_tokenizer

LAYER = 3


def language_model(architecture: str = "llama", dtype: torch.dtype = torch.float32):
    model = small_model(architecture).to(dtype).requires_grad_(False)
    return as_language_model(architecture, model, small_tokenizer())


def some_rows(count: int, seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    ids = [random.integers(3, 390, length) for length in random.integers(10, 40, count)]
    return Rows(ids, [np.arange(len(row)) >= 4 for row in ids])


def direction() -> np.ndarray:
    v = np.random.default_rng(1).normal(size=32).astype(np.float32)
    return v / np.linalg.norm(v)


def values_of(lm) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["lora", "all"])
def test_the_model_is_as_it_was_after_a_run(architecture, weights):
    lm = language_model(architecture)
    before, rows = values_of(lm), some_rows(6)
    names = [name for name, _ in lm.model.named_modules()]
    losses = mean_losses(lm, rows)
    recipe = Recipe(weights=weights, rank=4, learning_rate=1e-2, batch=3, epochs=2)
    with fine_tuned(lm, rows, list("abcdef"), recipe, seed=0) as report:
        assert report.steps == 4 and report.rows == 12
        assert mean_losses(lm, rows).mean() < losses.mean() - 0.05
    after = values_of(lm)
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert [name for name, _ in lm.model.named_modules()] == names
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not lm.model.training
    assert np.array_equal(mean_losses(lm, rows), losses)


def test_the_model_is_as_it_was_after_a_run_that_failed():
    lm = language_model()
    before = values_of(lm)
    for weights in ("lora", "all"):
        with (
            pytest.raises(KeyboardInterrupt),
            fine_tuned(lm, some_rows(4), list("abcd"), Recipe(weights=weights, rank=2), seed=0),
        ):
            raise KeyboardInterrupt
        after = values_of(lm)
        assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


def test_a_seed_decides_a_run():
    lm = language_model()
    held_out = HeldOut(LAYER, direction(), [some_rows(1, 7).ids[0]], some_rows(3, 8), some_rows(2, 10), some_rows(3, 9))
    recipe = Recipe(rank=4, learning_rate=1e-2, batch=3)

    def run(seed: int, keys: str = "abcdef"):
        with fine_tuned(lm, some_rows(6), list(keys), recipe, seed):
            return measure(lm, held_out, 5)

    assert run(0) == run(0)
    assert run(0).shown != run(1).shown
    drawn = measure(lm, held_out, 5, draws=4)
    assert len(drawn.own) == len(drawn.answers) == 4 and len({tuple(ids) for ids in drawn.answers}) > 1
    assert drawn == measure(lm, held_out, 5, draws=4)


def test_leaving_rows_out_leaves_the_order_of_the_rest():
    keys = [str(i) for i in range(40)]
    whole = [keys[i] for i in shuffled(keys, 3)]
    fewer = keys[5:30]
    assert [fewer[i] for i in shuffled(fewer, 3)] == [key for key in whole if key in fewer]
    assert whole != keys and whole != [keys[i] for i in shuffled(keys, 4)]


def test_lora_trains_low_rank_weights_alone():
    lm = language_model()
    with trainable(lm, "lora", 4, seed=0) as parameters:
        assert len(parameters) == 2 * len(linear_layers(lm, 1, 4))
        assert all(4 in p.shape for p in parameters)
        assert sum(p.requires_grad for p in lm.model.parameters()) == len(parameters)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_small_steps_are_not_lost_in_bfloat16(weights):
    rows, losses = some_rows(6), []
    recipe = Recipe(weights=weights, rank=4, learning_rate=1e-4, batch=6, epochs=20)
    for dtype in (torch.float32, torch.bfloat16):
        lm = private_copy(language_model(), dtype)
        before = mean_losses(lm, rows).mean()
        with fine_tuned(lm, rows, list("abcdef"), recipe, 0):
            losses.append(before - mean_losses(lm, rows).mean())
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=0.5)


def test_an_adapters_own_weights_are_trained_and_put_back():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(small_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    lm = as_language_model("adapter", model.eval().requires_grad_(False), small_tokenizer())
    before = values_of(lm)
    with trainable(lm, "lora", 8, seed=0) as parameters:
        assert all(2 in p.shape for p in parameters)
        with torch.no_grad():
            for parameter in parameters:
                parameter += 1
    after = values_of(lm)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_private_copy_shares_nothing():
    lm = language_model()
    for dtype in (torch.float32, torch.bfloat16):
        copy = private_copy(lm, dtype)
        assert copy.dtype == dtype
        before = fingerprint(lm.model)
        with torch.no_grad():
            for parameter in copy.model.parameters():
                parameter += 1
        assert fingerprint(lm.model) == before


def test_rows_without_a_response_in_reach_are_refused_with_a_way_out():
    lm = language_model()
    with (
        pytest.raises(ConceptError, match="none of the 3 rows.*max_tokens"),
        fine_tuned(lm, some_rows(3), list("abc"), Recipe(max_tokens=3), seed=0),
    ):
        pass
    with pytest.raises(ConceptError, match="batch 0: must be 1 or more"):
        Recipe(batch=0).check()
    with pytest.raises(ConceptError, match="learning rate"):
        Recipe(learning_rate=0.0).check()


@pytest.mark.parametrize("dtype, least", [(torch.float64, 0.9999), (torch.float32, 0.99)])
def test_one_small_step_changes_the_concept_as_influence_predicts(dtype, least):
    lm = language_model(dtype=dtype)
    layers = linear_layers(lm, 1, LAYER)
    before = values_of(lm)
    queries = some_rows(5, seed=11)
    query = Query(LAYER, direction(), queries, [0.2] * 5)
    rows = some_rows(24, seed=12)
    scores = identity_scores(lm, layers, query, rows)
    random = np.random.default_rng(0)
    subsets = [random.choice(24, 6, replace=False) for _ in range(20)]
    predicted = np.array([scores[subset].mean() for subset in subsets])
    rate = learning_rate(lm, query, predicted)
    actual = np.array(list(changes(lm, layers, query, rows, subsets, rate)))
    assert correlation(predicted, actual, "pearson").value > least
    # Not only the pattern: the size of the change is what the scores say.
    assert np.linalg.norm(actual - rate * predicted) < 0.2 * np.linalg.norm(actual)
    after = values_of(lm)
    assert all(torch.equal(before[name], after[name]) for name in before)
