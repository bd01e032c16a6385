"""Training on preference pairs: the DPO loss, minimised from the reference model on.

Of a prompt x with a chosen response y⁺ and a rejected one y⁻ (Rafailov et al. 2023, arXiv 2305.18290, equation 7)

    L(θ) = −log σ(β u(θ)),   u(θ) = log p_θ(y⁺|x) − log p_θ(y⁻|x) − m,   m = log p_ref(y⁺|x) − log p_ref(y⁻|x),

where a response's log-likelihood is the sum over its tokens, and the reference is the model before training. It is
what TRL's `DPOTrainer` minimises by default, and what `concept_audit.influence.pairs` takes the gradient of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from concept_audit.evidence.training import shorter, summed_losses, tokens_per_pass
from concept_audit.influence.queries import Rows
from concept_audit.model.batches import batches_by_length
from concept_audit.model.gradients import LanguageModelHead, supervised
from concept_audit.model.load import LanguageModel
from concept_audit.model.pairs import sequences


def dpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """−log σ(β (log p(y⁺) − log p(y⁻) − m)), [pairs].

    Args:
        chosen, rejected: log-likelihoods of the sides, in nats, [pairs].
        reference: m, the difference that the reference model has between them, [pairs].
        beta: how closely the model is held to the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected - reference))


def sides_of(rows: Rows, max_tokens: int) -> Rows:
    """The sides of n pairs, each cut at a number of tokens: 2n sequences, each chosen one before its rejected one."""
    parts = sequences(rows.ids, rows.response)
    return shorter(Rows(parts.ids, parts.response), max_tokens)


def reference_margins(lm: LanguageModel, sides: Rows) -> np.ndarray:
    """m of pairs by the model as it is, float64 [pairs]; NaN where a side has nothing to predict."""
    losses = summed_losses(lm, sides).reshape(-1, 2)
    return losses[:, 1] - losses[:, 0]


@dataclass(frozen=True)
class Preference:
    """The DPO loss of pairs.

    Attributes:
        sides: of `sides_of`.
        reference: of `reference_margins`, by the model before training.
        beta: of the loss.
    """

    sides: Rows
    reference: np.ndarray
    beta: float

    @property
    def usable(self) -> Sequence[int]:
        return np.flatnonzero(np.isfinite(self.reference)).tolist()

    def add_gradient(self, lm: LanguageModel, head: LanguageModelHead, chosen: Sequence[int]) -> float:
        """Both sides of a pair go through the model in one batch, since each one's weight depends on the other."""
        spans, total = self.sides.spans, 0.0
        longest = [max(spans[2 * pair], spans[2 * pair + 1]) for pair in chosen]
        for places in batches_by_length(longest, tokens_per_pass(lm) // 2):
            pairs = [chosen[place] for place in places]
            batch = self.sides.batch([2 * pair + side for side in (0, 1) for pair in pairs], lm)
            mask = supervised(batch)
            with lm.lock, torch.enable_grad():
                nll = head.token_losses(batch)
                sums = torch.zeros(len(mask), dtype=nll.dtype, device=nll.device)
                ours, theirs = sums.index_add(0, mask.nonzero()[:, 0].to(nll.device), -nll).split(len(pairs))
                reference = torch.as_tensor(self.reference[pairs], dtype=nll.dtype).to(nll.device)
                loss = dpo_losses(ours, theirs, reference, self.beta).sum() / len(chosen)
                loss.backward()
            total += float(loss.detach())
        return total
