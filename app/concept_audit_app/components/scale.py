"""Scores that people can read: in standard deviations of the scores over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from concept_audit_app.components.methods import WITH_GRADIENTS

EFFECTS = (*WITH_GRADIENTS, "projection_difference")
"""Methods whose score of zero says that a row pushes neither way; of others zero is the data's mean."""
HELP = """**Rank 1** pushes the model most towards the concept.

**The scale.** SD is the standard deviation of this score over all rows of the data: +2 SD stands out, +5 SD is far out.
The raw score shows when the pointer rests on the value. {zero}

**The sign.** {sign}

**Why a short row may rank high.** Scores are averages over the tokens of the response: a few tokens that all point at
the concept weigh more than a long answer that does so once. Look at the colours before you judge.

**What it does not say.** A high score is a prediction, not a proof: the Evidence page shows how well it held when rows
were left out of training."""
EFFECT_SIGN = (
    "Above zero, training on the row pushes towards the concept; below, away from it. Dropping rows far below zero "
    "would strengthen the concept."
)
PLACE_SIGN = (
    "Above zero, the row shows more of the concept than the average row; below, less. Below zero is no proof that "
    "training on it pushes away."
)


@dataclass(frozen=True)
class Scale:
    """How a score becomes a number of standard deviations.

    Attributes:
        zero: the raw score that is shown as 0.
        unit: raw score that is 1 standard deviation; 0 where all scores are the same.
        effect: whether zero says that a row pushes neither way, rather than as much as the average row.
    """

    zero: float
    unit: float
    effect: bool

    def of(self, score: float) -> float:
        """The score in standard deviations; 0 for one that is no number."""
        value = (score - self.zero) / self.unit if self.unit else 0.0
        return round(value, 4) if math.isfinite(value) else 0.0

    def raw(self, value: float) -> float:
        """The score that is so many standard deviations."""
        return self.zero + value * self.unit

    def short(self, score: float) -> str:
        """The score in standard deviations, as text."""
        return f"{self.of(score):+.2f}"

    def told(self, score: float) -> str:
        """The score with both of its units, for a note on hover."""
        about = "of no effect" if self.effect else "of the average row"
        return f"score {score:+.4g}: {self.of(score):+.2f} standard deviations from that {about}"

    def help(self) -> str:
        """What users of scores ask, answered; Markdown."""
        if self.effect:
            return HELP.format(zero="Zero is a row that pushes neither way.", sign=EFFECT_SIGN)
        return HELP.format(zero="Zero is the average row.", sign=PLACE_SIGN)


def scale_of(method: str, summary: Mapping[str, float]) -> Scale:
    """The scale of a ranking.

    Args:
        summary: mean and deviation of its scores, from `Rankings.summary`.
    """
    effect = method in EFFECTS
    unit = float(summary["deviation"])
    return Scale(0.0 if effect else float(summary["mean"]), unit if math.isfinite(unit) else 0.0, effect)
