"""Copies of a model in another precision, made while other threads run it."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from concept_audit.influence.queries import Rows
from concept_audit.influence.scoring import dual_weights
from concept_audit.model.activations import residual_stream
from concept_audit.model.gradients import GradientPass
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from concept_audit.model.steering import steered
from concept_audit.model.trainable import private_copy
from tests.conftest import small_model, small_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def lm():
    return as_language_model("llama", small_model("llama"), small_tokenizer())


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=IDS, use_cache=False).logits


@contextmanager
def reading(lm):
    with residual_stream(lm, [1]) as run:
        yield
        assert run(IDS)[1].shape == (1, 6, lm.d_model)  # the hooks are still on the model itself


@contextmanager
def steering(lm):
    with steered(lm, 2, torch.full((lm.d_model,), 100.0)):
        yield


@contextmanager
def differentiating(lm):
    layers = linear_layers(lm, 1, 4)
    batch = Rows([IDS[0].numpy()], [np.arange(6) > 2]).batch([0], lm)
    seen = []
    with GradientPass(lm, layers) as run:
        yield
        run.losses(batch, lambda index, a, delta: seen.append(index))
    assert len(seen) == len(layers)


@pytest.mark.parametrize("doing", [reading, steering, differentiating])
@pytest.mark.parametrize("copied", [lambda lm: lm.in_dtype(torch.float64), lambda lm: private_copy(lm, torch.float64)])
def test_a_copy_takes_no_hooks_along(lm, doing, copied):
    expected = logits(lm)
    with doing(lm):
        copy = copied(lm)
        torch.testing.assert_close(logits(copy).float(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(copy).float(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(lm), expected)


def test_a_copy_waits_for_whoever_runs_the_model_and_is_made_once(lm):
    made = []
    threads = [threading.Thread(target=lambda: made.append(lm.in_dtype(torch.float64))) for _ in range(3)]
    layers = linear_layers(lm, 1, 1)
    tangents = [torch.ones(layer.d_out, layer.d_in) for layer in layers]
    with lm.lock, torch.autograd.forward_ad.dual_level(), dual_weights(layers, tangents):
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert not made
    for thread in threads:
        thread.join(20)
    assert len(made) == 3 and made[0] is made[1] is made[2]
    torch.testing.assert_close(logits(made[0]).float(), logits(lm), atol=1e-5, rtol=1e-5)
