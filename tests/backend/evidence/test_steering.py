"""Steering: exactly α σ v is added, in training alone, and the gradient is that of a model with the vector built in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.errors import ModelError
from concept_audit.evidence.measures import HeldOut
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.steering import Steering, spread
from concept_audit.evidence.training import Likelihood, minimised
from concept_audit.influence.queries import Rows
from concept_audit.model.gradients import LanguageModelHead
from concept_audit.model.steering import steered
from concept_audit.pipeline.validation import runs
from concept_audit.pipeline.validation.runs import Run, TrainingRuns, one_run
from concept_audit.pipeline.validation.shared import Arms, Shared
from tests.backend.evidence.test_training import direction, language_model, some_rows, values_of

RECIPE = Recipe(rank=2, learning_rate=1e-2, batch=3, epochs=2, precision="float32")


def read_by_blocks(lm, ids: np.ndarray) -> list[torch.Tensor]:
    """The residual stream as each block reads it: the ℓ-th (from 0) is after ℓ blocks."""
    read: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, given: read.append(given[0].clone())) for block in lm.blocks]
    with torch.no_grad():
        lm.model(input_ids=torch.tensor(ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return read


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_vector_is_added_at_its_layer_at_every_token_and_is_gone_afterwards(architecture):
    lm, ids = language_model(architecture), some_rows(1).ids[0]
    plain, vector = read_by_blocks(lm, ids), torch.from_numpy(3 * direction())
    with steered(lm, 2, vector):
        moved = read_by_blocks(lm, ids)
    assert all(torch.equal(moved[layer], plain[layer]) for layer in (0, 1))
    assert torch.equal(moved[2], plain[2] + vector), "what the third block reads is hidden_states[2]"
    assert not torch.allclose(moved[3], plain[3], atol=1e-3)
    with pytest.raises(KeyboardInterrupt), steered(lm, 2, vector):
        raise KeyboardInterrupt
    assert all(torch.equal(one, other) for one, other in zip(read_by_blocks(lm, ids), plain, strict=True))
    assert not any(block._forward_hooks for block in lm.blocks)
    with pytest.raises(ModelError, match="choose from 1 to 4"), steered(lm, 5, vector):
        pass


class WithBias(torch.nn.Module):
    """A block with the vector written into its output."""

    def __init__(self, block: torch.nn.Module, bias: torch.Tensor):
        super().__init__()
        self.block, self.bias = block, bias

    def forward(self, *given, **named):
        return self.block(*given, **named) + self.bias


def test_the_gradient_is_autograds_of_a_model_with_the_vector_built_in():
    lm, rows = language_model(dtype=torch.float64), some_rows(4)
    vector = torch.from_numpy(5 * direction())
    lm.model.requires_grad_(True)
    with steered(lm, 2, vector):
        said = Likelihood(rows).add_gradient(lm, LanguageModelHead(lm), [2, 0, 3])
    names = [name for name, p in lm.model.named_parameters() if p.grad is not None and "embed" not in name]
    found = {name: lm.model.get_parameter(name).grad.clone() for name in names}
    lm.model.zero_grad()
    plain_loss = written_out(lm, rows)
    lm.model.zero_grad()
    block = lm.model.model.layers[1]
    lm.model.model.layers[1] = WithBias(block, vector.double())
    loss = written_out(lm, rows)
    lm.model.model.layers[1] = block
    assert said == pytest.approx(loss, rel=1e-9) and abs(loss - plain_loss) > 1e-3
    assert len(found) > 20
    for name in names:
        np.testing.assert_allclose(found[name], lm.model.get_parameter(name).grad, rtol=1e-6, atol=1e-9)


def written_out(lm, rows: Rows) -> float:
    """The mean loss of three rows, one at a time from the logits of the whole model, and its gradient."""
    total = 0.0
    for row in (2, 0, 3):
        tokens, places = torch.tensor(rows.ids[row]), np.flatnonzero(rows.response[row])
        chances = lm.model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        total = total - sum(chances[p - 1, tokens[p]] for p in places) / len(places) / 3
    total.backward()
    return total.item()


def trained(lm, vector: np.ndarray | None) -> tuple[list[float], dict[str, torch.Tensor], bool]:
    """Losses of the steps, the LoRA weights that came out, and whether a hook was left for the body."""
    during = None if vector is None else steered(lm, 2, torch.from_numpy(vector))
    with minimised(lm, Likelihood(some_rows(6)), list("abcdef"), RECIPE, 0, during=during) as told:
        weights = {name: value for name, value in values_of(lm).items() if "lora" in name}
        return told.losses, weights, any(block._forward_hooks for block in lm.blocks)


def test_a_strength_of_0_is_plain_training_bit_for_bit_and_another_is_not():
    lm, steering = language_model(), Steering(direction(), 1.5)
    plain, zero, moved = (trained(lm, v) for v in (None, steering.vector(0.0), steering.vector(4.0)))
    assert plain[0] == zero[0] and len(plain[1]) > 20
    assert all(torch.equal(plain[1][name], zero[1][name]) for name in plain[1])
    assert plain[0][0] != moved[0][0] and not all(torch.equal(plain[1][name], moved[1][name]) for name in plain[1])
    assert not moved[2], "nothing is added once training is over"


def test_the_unit_is_the_spread_of_the_rows_and_chance_is_as_long_at_right_angles():
    v, along = direction(), np.random.default_rng(0).normal(size=50)
    by_hand = (sum((x - sum(along) / 50) ** 2 for x in along) / 50) ** 0.5
    assert spread(np.append(along, np.nan)) == pytest.approx(by_hand) and spread(np.full(2, np.nan)) == 0
    steering = Steering(3 * v, 0.5)
    np.testing.assert_allclose(steering.vector(4.0), 2 * v, atol=1e-6)
    drawn = [steering.at_random(4.0, seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.allclose(drawn[0], drawn[2])
    for each in drawn:
        assert np.linalg.norm(each) == pytest.approx(2, rel=1e-6) and abs(each @ v) < 1e-6


def test_a_run_is_trained_with_the_vector_and_measured_without(monkeypatch):
    lm, rows = language_model(), some_rows(6)
    prompts = [row[:4] for row in some_rows(2, 7).ids]
    held = HeldOut(2, direction(), prompts, some_rows(2, 8), some_rows(2, 9), some_rows(2, 10))
    shared = Shared(rows, held, Arms(steering=Steering(direction(), 1.0)))
    options = TrainingRuns(None, None, None, (), RECIPE, "float32", 3, 1)  # type: ignore[arg-type]
    hooked: dict[str, list[bool]] = {"measured": [], "trained": []}

    def noting(what, function):
        def noted(lm, *given, **named):
            hooked[what].append(any(block._forward_hooks for block in lm.blocks))
            return function(lm, *given, **named)

        return noted

    monkeypatch.setattr(runs, "measure", noting("measured", runs.measure))
    monkeypatch.setattr(runs, "projections", noting("measured", runs.projections))
    monkeypatch.setattr(
        LanguageModelHead,
        "token_losses",
        lambda head, batch, f=LanguageModelHead.token_losses: (
            hooked["trained"].append(any(block._forward_hooks for block in lm.blocks)) or f(head, batch)
        ),
    )
    given = tuple(range(6))
    whole = one_run(lm, shared, Run("whole", "", 1.0, 0, 0, given), options)
    assert not any(hooked["trained"]) and not any(hooked["measured"])
    steered_runs = [one_run(lm, shared, Run("steer", m, 2.0, 0, 0, given), options) for m in ("concept", "random")]
    assert any(hooked["trained"]) and not any(hooked["measured"]) and len(hooked["measured"]) == 6
    first = [made["training"]["losses"][0] for made in (whole, *steered_runs)]
    assert len(set(first)) == 3
    added = shared.arms.steering.vector(2.0), shared.arms.steering.at_random(2.0, 0)
    for vector, loss in zip(added, first[1:], strict=True):
        assert trained_loss(lm, rows, vector) == pytest.approx(loss, rel=1e-5)


def trained_loss(lm, rows: Rows, vector: np.ndarray) -> float:
    """The loss of the first step, from the same first weights."""
    with minimised(
        lm, Likelihood(rows), list(map(str, range(6))), RECIPE, 0, during=steered(lm, 2, torch.tensor(vector))
    ) as told:
        return told.losses[0]
