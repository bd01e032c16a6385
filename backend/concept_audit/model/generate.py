"""The model's own answers, decoded in batches: the most likely ones, or drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from concept_audit.model.batches import batches_by_length
from concept_audit.model.load import LanguageModel

PROMPT_TOKENS_PER_BATCH_CPU = 8192
PROMPT_TOKENS_PER_BATCH_ACCELERATOR = 65536


TEMPERATURE = 0.7
"""Of answers that are drawn."""


class _Generates(Protocol):
    """What every causal model does, though the class that they share does not say so."""

    def generate(self, **settings: Any) -> torch.Tensor:
        """Token ids [prompts, tokens], the prompts' own first."""


class _Drawn(LogitsProcessor):
    """Adds noise to log-probabilities so that the likeliest token is a draw (Gumbel-max; Maddison et al. 2014).

    The noise hangs on the seed and the step alone, not on the model: two models answer with the same
    chance (common random numbers), and their answers differ by as much as the models do.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        width = scores.shape[1]
        uniform = np.stack([g.random(width, np.float32) for g in self._generators])
        noise = -np.log(-np.log(np.clip(uniform, 1e-12, 1 - 1e-7)))
        return scores.float() / TEMPERATURE + torch.from_numpy(noise).to(scores.device)


def answers(
    lm: LanguageModel, prompts: Sequence[np.ndarray], max_new_tokens: int, seeds: Sequence[int] | None = None
) -> Iterator[dict[int, np.ndarray]]:
    """What the model itself would answer, batch by batch.

    Without seeds the most likely token is taken at every step. (Near ties may still
    fall differently in another batch or on another machine: keep what comes out.)

    Prompt and answer together have the positions that the model was made for: answers to long prompts
    end there, and a prompt that leaves no room at all is read as `with_room` has it.

    Args:
        prompts: one int array [tokens] a prompt, none empty, with the opening of the answer's turn.
        seeds: one a prompt, to draw its answer at `TEMPERATURE`; a prompt may come several times.

    Yields:
        place of each prompt of a batch → its answer, int32 [new tokens], with the token that ends it.
    """
    budget = PROMPT_TOKENS_PER_BATCH_CPU if lm.device.type == "cpu" else PROMPT_TOKENS_PER_BATCH_ACCELERATOR
    ends = _ends(lm)
    padding = lm.tokenizer.pad_token_id
    padding = padding if padding is not None else (ends[0] if ends else 0)
    read = [p if room_after(lm, p) else with_room(lm, p, max_new_tokens) for p in prompts]
    rooms = [min(max_new_tokens, room_after(lm, prompt)) for prompt in read]
    for room, batch in _batches(read, rooms, budget):
        longest = max(len(read[i]) for i in batch)
        ids = np.full((len(batch), longest), padding, np.int64)
        mask = np.zeros((len(batch), longest), np.int64)
        for place, i in enumerate(batch):
            ids[place, longest - len(read[i]) :] = read[i]
            mask[place, longest - len(read[i]) :] = 1
        drawn = [] if seeds is None else [_Drawn([seeds[i] for i in batch])]
        with lm.lock, torch.inference_mode():
            out = cast(_Generates, lm.model).generate(
                input_ids=torch.from_numpy(ids).to(lm.device),
                attention_mask=torch.from_numpy(mask).to(lm.device),
                max_new_tokens=room,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
                eos_token_id=ends or None,
                pad_token_id=padding,
                logits_processor=LogitsProcessorList(drawn),
            )
        found = out[:, longest:].cpu().numpy().astype(np.int32)
        yield {i: _until_end(found[place], ends) for place, i in enumerate(batch)}


def room_after(lm: LanguageModel, prompt: np.ndarray) -> int:
    """How many tokens an answer to a prompt may have before the model's positions end."""
    return sys.maxsize if lm.positions is None else max(0, lm.positions - len(prompt))


def with_room(lm: LanguageModel, prompt: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """A prompt that leaves room for an answer: one that is too long loses its beginning.

    The answer's room is at most half of the model's positions.
    """
    if lm.positions is None or len(prompt) + max_new_tokens <= lm.positions:
        return prompt
    return prompt[-max(lm.positions - max_new_tokens, lm.positions // 2, 1) :]


def _batches(prompts: Sequence[np.ndarray], rooms: Sequence[int], budget: int) -> Iterator[tuple[int, list[int]]]:
    """Prompts of like length whose answers may be equally long: that length, and their places."""
    for room in sorted(set(rooms), reverse=True):
        places = [place for place, of in enumerate(rooms) if of == room]
        # A prompt grows by its answer, and the cache with it.
        for batch in batches_by_length([len(prompts[place]) + room for place in places], budget):
            yield room, [places[i] for i in batch]


def _ends(lm: LanguageModel) -> list[int]:
    """The tokens that end an answer."""
    settings = lm.model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    if ends is None:
        ends = lm.tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _until_end(tokens: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    closing = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: closing[0] + 1] if len(closing) else tokens
