"""The model's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backend.model import generate
from backend.model.load import as_language_model
from tests.conftest import small_model, small_tokenizer


@pytest.fixture(scope="module")
def lm():
    return as_language_model("small", small_model("llama").double(), small_tokenizer())


def greedy(lm, prompt: np.ndarray, count: int) -> list[int]:
    """One token at a time, without a cache."""
    ids = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_answers_are_the_likeliest_tokens_in_any_batch(lm, monkeypatch, budget):
    monkeypatch.setattr(generate, "PROMPT_TOKENS_PER_BATCH_CPU", budget)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 390, length).astype(np.int32) for length in (5, 11, 3, 20)]
    found: dict[int, np.ndarray] = {}
    for batch in generate.answers(lm, prompts, 9):
        found |= batch
    assert sorted(found) == [0, 1, 2, 3]
    for i, prompt in enumerate(prompts):
        wanted = greedy(lm, prompt, 9)
        assert found[i].tolist() == wanted[: len(found[i])]
        assert len(found[i]) == 9 or found[i][-1] == lm.tokenizer.eos_token_id


def test_an_answer_ends_with_the_token_that_ends_it():
    assert generate._until_end(np.array([4, 5, 1, 0, 0]), [1]).tolist() == [4, 5, 1]
    assert generate._until_end(np.array([4, 5]), [1]).tolist() == [4, 5]
