"""How much of a concept is in a model, measured on prompts that nothing was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from concept_audit.evidence.training import mean_losses
from concept_audit.influence.queries import Rows
from concept_audit.model.activations import response_activations
from concept_audit.model.generate import answers
from concept_audit.model.load import LanguageModel

QUANTITIES = ("own", "text", "shown", "preference", "loss", "judge")
"""What is measured of a model; see `Measured`."""


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on.

    Attributes:
        layer: how many blocks have run where the concept is read.
        direction: float32 [d_model], unit; fitted on other data than the rankings and the training rows.
        prompts: token ids up to where an answer begins, one int array [tokens] a prompt.
        shown: conversations that show the behaviour, to read with their given answers.
        plain: conversations that do not.
        natural: rows whose loss must not suffer.
    """

    layer: int
    direction: np.ndarray
    prompts: list[np.ndarray]
    shown: Rows
    plain: Rows
    natural: Rows


@dataclass(frozen=True)
class Measured:
    """A model's values: one number for each prompt or row.

    Attributes:
        own: f of the model's own answers, read by the model itself. [answers]
        shown: f of given answers that show the behaviour, which needs no generation. [shown]
        preference: L of given answers without the behaviour, on average, less L of each one with it, in
            nats: what the model would rather say, without the chance of one answer. [shown]
        loss: mean negative log-likelihood of natural rows, in nats. [natural]
        answers: token ids of the own answers, all prompts again for each draw.
    """

    own: list[float]
    shown: list[float]
    preference: list[float]
    loss: list[float]
    answers: list[list[int]]


def measure(
    lm: LanguageModel, held_out: HeldOut, answer_tokens: int, draws: int = 1, step: Callable[[], None] = lambda: None
) -> Measured:
    """Measure a model.

    Args:
        answer_tokens: the own answers are cut at this many tokens; 0 leaves them out.
        draws: own answers to each prompt, drawn with the same chance from every model; 1 is the likeliest answer.
        step: told whenever some prompts are answered.
    """
    made: dict[int, np.ndarray] = {}
    prompts = held_out.prompts * draws
    if answer_tokens:
        seeds = list(range(len(prompts))) if draws > 1 else None
        for batch in answers(lm, prompts, answer_tokens, seeds):
            made |= batch
            step()
    own = answered_rows(prompts, [made[i] for i in range(len(made))])
    return Measured(
        own=projections(lm, own, held_out.layer, held_out.direction).tolist(),
        shown=projections(lm, held_out.shown, held_out.layer, held_out.direction).tolist(),
        preference=(np.nanmean(mean_losses(lm, held_out.plain)) - mean_losses(lm, held_out.shown)).tolist(),
        loss=mean_losses(lm, held_out.natural).tolist(),
        answers=[made[i].tolist() for i in range(len(made))],
    )


def projections(lm: LanguageModel, rows: Rows, layer: int, direction: np.ndarray) -> np.ndarray:
    """f(x) = ⟨h_ℓ(x), v⟩ with h_ℓ the mean over the response tokens: float64 [rows]."""
    found = np.full(len(rows), np.nan)
    if len(rows):
        for batch in response_activations(lm, rows.ids, rows.response, [layer]):
            for row in batch:
                found[row.index] = row.mean[layer].astype(np.float64) @ direction.astype(np.float64)
    return found


def answered_rows(prompts: list[np.ndarray], made: list[np.ndarray]) -> Rows:
    """Prompts with their answers, the answers being the response."""
    pairs = list(zip(prompts, made, strict=False))
    ids = [np.concatenate([prompt, answer]) for prompt, answer in pairs]
    return Rows(ids, [np.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(ids, pairs, strict=True)])
