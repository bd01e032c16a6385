"""How counterfactual runs fine-tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from concept_audit.errors import ConceptError
from concept_audit.model.options import TRAINED, Trained


@dataclass(frozen=True)
class Recipe:
    """How a run fine-tunes: AdamW without weight decay, the learning rate falling linearly to zero.

    Attributes:
        weights: ``lora`` for LoRA weights, or ``all`` weights of the linear layers.
        rank: of new LoRA weights (16, quick: 8).
        learning_rate: of the first step (5e-4, quick: 2e-3).
        epochs: passes over the rows.
        max_steps: stop after this many steps; None for all of the epochs.
        batch: rows a step (8, quick: 12). Each row counts alike: the loss is the mean of L(z) over them.
        max_tokens: rows are cut at this many tokens (512, quick: 96).
        precision: of the forward and backward passes; ``auto`` is bfloat16 where the processor computes in it and new
            LoRA weights are trained, else the model's own. What is trained is in float32 or wider.
    """

    weights: Trained = "lora"
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: int = 1
    max_steps: int | None = None
    batch: int = 8
    max_tokens: int = 512
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def check(self) -> None:
        """Raise ConceptError unless every number makes sense."""
        wrong = [
            f"{name} {getattr(self, name)}: must be 1 or more"
            for name in ("rank", "epochs", "max_steps", "batch", "max_tokens")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not self.learning_rate > 0:
            wrong.append(f"learning rate {self.learning_rate}: must be more than 0")
        if self.weights not in TRAINED:
            wrong.append(f"weights {self.weights}: choose from {', '.join(TRAINED)}")
        if wrong:
            raise ConceptError(f"recipe: {'; '.join(wrong)}")
