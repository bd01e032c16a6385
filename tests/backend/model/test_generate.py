"""The model's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from concept_audit.model import generate
from concept_audit.model.load import as_language_model
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


def test_drawn_answers_follow_the_softmax_and_share_their_chance(lm):
    """Frequencies of first tokens, and another model drawing by the same noise."""
    prompt = np.array([5, 9, 17], np.int32)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1]
    wanted = torch.softmax(logits / generate.TEMPERATURE, -1).numpy()

    def first_tokens(seeds) -> np.ndarray:
        found: dict[int, np.ndarray] = {}
        for batch in generate.answers(lm, [prompt] * len(seeds), 1, seeds):
            found |= batch
        return np.array([found[i][0] for i in range(len(seeds))])

    drawn = first_tokens(range(2000))
    likely = np.argsort(-wanted)[:5]
    error = np.sqrt(wanted[likely] / 2000)
    assert (np.abs((drawn[:, None] == likely).mean(0) - wanted[likely]) < 4 * error).all()
    assert (first_tokens([7] * 3) == drawn[7]).all()
    assert len(set(drawn.tolist())) > 1


def test_an_answer_ends_with_the_token_that_ends_it():
    assert generate._until_end(np.array([4, 5, 1, 0, 0]), [1]).tolist() == [4, 5, 1]
    assert generate._until_end(np.array([4, 5]), [1]).tolist() == [4, 5]
