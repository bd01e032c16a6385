"""Fine-tuning on some of the rows: what the counterfactual runs do again and again.

Two runs with one seed see the rows that they share in the same order, and begin from
the same weights: what differs between them is the rows alone. Differences between
runs are therefore taken seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from concept_audit.errors import ConceptError
from concept_audit.evidence.options import Recipe
from concept_audit.influence.queries import Rows
from concept_audit.model.batches import batches_by_length
from concept_audit.model.exact import in_float64
from concept_audit.model.gradients import LanguageModelHead, supervised
from concept_audit.model.load import LanguageModel
from concept_audit.model.trainable import trainable
from concept_audit.sampling import shuffled

TOKENS_PER_PASS_CPU = 2048
TOKENS_PER_PASS_ACCELERATOR = 16384


@dataclass
class Training:
    """What a run reports of its training.

    Attributes:
        steps: optimiser steps.
        rows: rows seen, counted each time.
        losses: mean L(z) of each step's rows, in nats, before the step.
    """

    steps: int = 0
    rows: int = 0
    losses: list[float] = field(default_factory=list)


def shorter(rows: Rows, max_tokens: int) -> Rows:
    """The rows cut at a number of tokens."""
    return Rows([ids[:max_tokens] for ids in rows.ids], [mask[:max_tokens] for mask in rows.response])


@contextmanager
def fine_tuned(
    lm: LanguageModel,
    rows: Rows,
    keys: Sequence[str],
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Training]:
    """The model after fine-tuning on rows; at the end of the body it is as it was.

    Args:
        lm: changed in place for the time being; see `concept_audit.model.trainable.private_copy`.
        rows: those to train on.
        keys: one a row, by which rows are shuffled.
        seed: of the order of the rows and of the first LoRA weights.
        advance: told the number of rows as they are done.

    Raises:
        ConceptError: no row has a response token within `recipe.max_tokens`.
    """
    with minimised(lm, Likelihood(shorter(rows, recipe.max_tokens)), keys, recipe, seed, advance) as report:
        yield report


class Objective(Protocol):
    """What a run minimises: the mean of a loss over rows."""

    @property
    def usable(self) -> Sequence[int]:
        """Places of the rows that have a loss."""

    def add_gradient(self, lm: LanguageModel, head: LanguageModelHead, chosen: Sequence[int]) -> float:
        """Add the gradient of the mean loss of the chosen rows to what is trained; gives that mean, in nats."""


@dataclass(frozen=True)
class Likelihood:
    """L(z), the mean negative log-likelihood of a row's response tokens."""

    rows: Rows

    @property
    def usable(self) -> Sequence[int]:
        return self.rows.scorable

    def add_gradient(self, lm: LanguageModel, head: LanguageModelHead, chosen: Sequence[int]) -> float:
        return add_gradient(lm, head, self.rows, chosen)


@contextmanager
def minimised(
    lm: LanguageModel,
    objective: Objective,
    keys: Sequence[str],
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], None] = lambda rows: None,
    during: AbstractContextManager[object] | None = None,
) -> Iterator[Training]:
    """As `fine_tuned`, for any loss of rows.

    Args:
        during: what is done to the model while it trains, and is over before the body begins.

    Raises:
        ConceptError: no row has one within `recipe.max_tokens`.
    """
    usable = usable_rows(objective, len(keys), recipe)
    with trainable(lm, recipe.weights, recipe.rank, seed) as parameters:
        with during or nullcontext():
            report = train(lm, parameters, objective, usable, keys, recipe, seed, advance)
        yield report


def usable_rows(objective: Objective, rows: int, recipe: Recipe) -> Sequence[int]:
    """Places of the rows that a run can train on.

    Raises:
        ConceptError: there are none.
    """
    usable = objective.usable
    if not usable:
        raise ConceptError(
            f"none of the {rows} rows to train on has a response within the first {recipe.max_tokens} "
            "tokens; raise the recipe's max_tokens, or take a larger share"
        )
    return usable


def train(
    lm: LanguageModel,
    parameters: Sequence[torch.nn.Parameter],
    objective: Objective,
    usable: Sequence[int],
    keys: Sequence[str],
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Training:
    """Fine-tune parameters that are open for training, in place.

    Args:
        usable: places of the rows to train on (see `usable_rows`).
        keys: one a row, by which rows are shuffled.
    """
    steps = _steps([keys[i] for i in usable], recipe, seed)
    report = Training()
    # Small steps would be lost in bfloat16: they are taken on copies (Micikevicius et al. 2018).
    masters = [parameter.detach().to(lm.wide_dtype, copy=True) for parameter in parameters]
    optimiser = torch.optim.AdamW(masters, lr=recipe.learning_rate, weight_decay=0.0)
    head = LanguageModelHead(lm)
    for number, step in enumerate(steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * (1 - number / len(steps))
        chosen = [usable[place] for place in step]
        report.losses.append(objective.add_gradient(lm, head, chosen))
        _step(optimiser, masters, parameters)
        report.steps += 1
        report.rows += len(chosen)
        advance(len(chosen))
    return report


def _step(
    optimiser: torch.optim.Optimizer, masters: Sequence[torch.Tensor], parameters: Sequence[torch.nn.Parameter]
) -> None:
    """One step of the masters along the parameters' gradients, and the parameters after them."""
    for master, parameter in zip(masters, parameters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        parameter.grad = None
    optimiser.step()
    with torch.no_grad():
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)


def add_gradient(lm: LanguageModel, head: LanguageModelHead, rows: Rows, chosen: Sequence[int]) -> float:
    """Add the gradient of the mean of L(z) over the chosen rows to what is trained.

    Returns:
        that mean, in nats.
    """
    spans = rows.spans
    total = 0.0
    for places in batches_by_length([spans[i] for i in chosen], tokens_per_pass(lm)):
        batch = rows.batch([chosen[place] for place in places], lm)
        mask = supervised(batch)
        with lm.lock, torch.enable_grad():
            nll = head.token_losses(batch)
            each = (1 / mask.sum(1).to(nll.dtype).clamp(min=1))[mask.nonzero()[:, 0]]
            loss = (nll * each).sum() / len(chosen)
            loss.backward()
        total += float(loss.detach())
    return total


def tokens_per_pass(lm: LanguageModel) -> int:
    """Tokens of a batch, padding included, in training and in measuring losses."""
    return TOKENS_PER_PASS_CPU if lm.device.type == "cpu" else TOKENS_PER_PASS_ACCELERATOR


def _steps(keys: Sequence[str], recipe: Recipe, seed: int) -> list[list[int]]:
    """Places of the rows of each step."""
    steps = []
    for epoch in range(recipe.epochs):
        order = shuffled([f"{epoch}:{key}" for key in keys], seed)
        steps += [order[start : start + recipe.batch] for start in range(0, len(order), recipe.batch)]
    return steps[: recipe.max_steps]


def mean_losses(lm: LanguageModel, rows: Rows) -> np.ndarray:
    """L(z) of rows in nats, float64 [rows]; NaN without a response token to predict."""
    counts = np.array([max(int(mask[1:].sum()), 1) for mask in rows.response], float)
    return summed_losses(lm, rows) / counts


def summed_losses(lm: LanguageModel, rows: Rows) -> np.ndarray:
    """−log p(response | prompt) of rows in nats, float64 [rows]; NaN without a response token to predict."""
    found = np.full(len(rows), np.nan)
    usable = rows.scorable
    if not usable:
        return found
    head, spans = LanguageModelHead(lm), rows.spans
    with lm.lock, torch.no_grad():
        for places in batches_by_length([spans[i] for i in usable], tokens_per_pass(lm)):
            batch = rows.batch([usable[place] for place in places], lm)
            mask = supervised(batch)
            nll = in_float64(head.token_losses(batch))
            sums = torch.zeros(len(mask), dtype=torch.float64, device=nll.device)
            mask = mask.to(nll.device)
            sums.index_add_(0, mask.nonzero()[:, 0], nll)
            found[batch.rows] = sums.cpu().numpy()
    return found
