"""How a forecast is held against training runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from concept_audit.errors import ConceptError
from concept_audit.evidence.options import Recipe
from concept_audit.model.options import TRAINED, Trained

ALL_WEIGHTS_RATE = 0.1
"""Full fine-tuning wants about a tenth of the learning rate of LoRA."""


@dataclass(frozen=True)
class ForecastTrial:
    """Which runs a forecast is held against.

    Attributes:
        weights: kinds of runs: LoRA, and all weights of the linear layers, these at a tenth of the recipe's learning rate
            where both are trained.
        seeds: runs of each kind, which differ in the order of the rows and the first LoRA weights.
        recipe: of the fine-tuning; None for the usual one (quick: rank 8, 96 tokens a row).
        pool_rows: train on at most this many rows, drawn once, and forecast what these do; None for every row
            (quick: 96).
        quick: the reduced recipe: few and short rows.
    """

    weights: tuple[Trained, ...] = TRAINED
    seeds: int = 3
    recipe: Recipe | None = None
    pool_rows: int | None = None
    quick: bool = False

    def recipes(self, usual: Recipe) -> dict[Trained, Recipe]:
        """How each kind of run trains.

        Args:
            usual: where no recipe is given.

        Raises:
            ConceptError: a number makes no sense.
        """
        recipe = self.recipe or usual
        wrong = [f"--train {kind}: choose from {', '.join(TRAINED)}" for kind in self.weights if kind not in TRAINED]
        if not self.weights:
            wrong.append("weights: name at least one kind of run")
        if self.seeds < 1:
            wrong.append(f"--seeds {self.seeds}: must be 1 or more")
        if self.pool_rows is not None and self.pool_rows < 2:
            wrong.append(f"--rows {self.pool_rows}: must be 2 or more")
        if wrong:
            raise ConceptError("; ".join(wrong))
        recipe.check()
        both = len(self.weights) > 1
        rates = {"lora": recipe.learning_rate, "all": recipe.learning_rate * (ALL_WEIGHTS_RATE if both else 1)}
        return {kind: replace(recipe, weights=kind, learning_rate=rates[kind]) for kind in self.weights}
