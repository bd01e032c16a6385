"""Models with a table of positions: rows, padding and answers end where the table ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from concept_audit import LabelledExample, Message, ModelError
from concept_audit.influence.queries import Loss, Rows, query_gradient
from concept_audit.model import generate
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import as_language_model
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.answers import ANSWER_TOKENS, answered
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions
from concept_audit.progress import Progress
from tests.conftest import sentence, small_model, small_tokenizer

POSITIONS = 42
"""Not a multiple of what batches are padded to."""


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).double().eval()
    with torch.no_grad():
        # Answers that hang on where they stand, and not on the last word alone.
        model.transformer.wpe.weight.mul_(20)
    tokenizer = small_tokenizer()
    model.generation_config.eos_token_id = None
    return as_language_model("small", model, tokenizer)


def greedy(lm, prompt: np.ndarray, count: int) -> list[int]:
    ids = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_answers_end_where_the_positions_end_in_any_batch(lm, monkeypatch, budget):
    monkeypatch.setattr(generate, "PROMPT_TOKENS_PER_BATCH_CPU", budget)
    random = np.random.default_rng(0)
    lengths = (5, 41, 33, 20, 38, 42, 60)
    prompts = [random.integers(3, 390, length).astype(np.int32) for length in lengths]
    found: dict[int, np.ndarray] = {}
    for batch in generate.answers(lm, prompts, 9):
        found |= batch
    ends = generate._ends(lm)
    for i, prompt in enumerate(prompts):
        read = prompt if len(prompt) < POSITIONS else prompt[-(POSITIONS - 9) :]
        wanted = greedy(lm, read, min(9, POSITIONS - len(read)))
        assert found[i].tolist() == generate._until_end(np.array(wanted), ends).tolist()
    assert len(found[1]) == 1


def test_a_prompt_that_is_too_long_loses_its_beginning(lm):
    prompt = np.arange(100)
    assert generate.with_room(lm, prompt[:33], 9).tolist() == list(range(33))
    assert generate.with_room(lm, prompt, 9).tolist() == list(range(67, 100))
    assert len(generate.with_room(lm, prompt, 1000)) == POSITIONS // 2
    assert generate.with_room(dataclasses.replace(lm, positions=None), prompt, 9) is prompt


def test_padding_ends_where_the_positions_end(lm):
    """A row of 41 tokens is padded to 48 elsewhere; here there are 42 positions."""
    ids = [np.arange(3, 3 + length) for length in (41, 42, 20)]
    rows = Rows(ids, [np.arange(len(row)) >= 5 for row in ids])
    assert rows.batch([0, 2], lm).ids.shape == (2, 42)
    assert rows.batch([2], lm).ids.shape == (1, 32)
    gradients = query_gradient(lm, linear_layers(lm, 1, 2), Loss(), rows, [1 / 3] * 3)
    assert all(bool(torch.isfinite(matrix).all()) for matrix in gradients)


def test_own_answers_to_queries_that_are_too_long_end_within_the_positions(lm):
    import random

    asked = [(Message("user", sentence(random.Random(words), words)),) for words in (4, 60)]
    rows = answered(lm, [LabelledExample(turns, 1) for turns in asked], POSITIONS, Progress())
    opening = lm.tokenizer("<|im_start|>assistant\n")["input_ids"]
    for ids, response in zip(rows.ids, rows.response, strict=True):
        assert len(ids) <= POSITIONS and 0 < response.sum() <= ANSWER_TOKENS
        # The end of the prompt is what is kept.
        assert ids[~response][-len(opening) :].tolist() == opening


def test_rows_longer_than_the_positions_are_refused(tmp_path, data_file):
    small_model("gpt2").save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    options = BuildOptions(
        data=str(data_file),
        out=tmp_path / "audit",
        model=ModelOptions(str(tmp_path / "model"), device="cpu"),
        sae="none",
        max_tokens=257,
    )
    with pytest.raises(ModelError, match=r"--max-tokens 257: .* made for 256 positions.*leave the option out"):
        build(options)
    assert not (tmp_path / "audit").exists()
