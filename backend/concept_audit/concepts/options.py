"""How a sparse autoencoder is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SaeTraining:
    """Settings of an SAE training.

    Attributes:
        expansion: features per dimension of the residual stream.
        k: features that fire at a token, on average.
        epochs: passes over the tokens, at least; small data get more, see `steps`.
        batch: tokens a step.
        min_steps: as many steps at least.
        max_steps: as many steps at most.
        lr: Adam's learning rate, which falls to a tenth at the end.
        seed: of the order of the tokens and the first weights.
    """

    expansion: int = 4
    k: int = 24
    epochs: int = 8
    batch: int = 1024
    min_steps: int = 300
    max_steps: int = 20_000
    lr: float = 1e-3
    seed: int = 0

    def steps(self, n_tokens: int) -> int:
        """How many steps a data set of `n_tokens` gets."""
        wanted = math.ceil(n_tokens * self.epochs / self.batch)
        return min(max(wanted, self.min_steps), self.max_steps)
