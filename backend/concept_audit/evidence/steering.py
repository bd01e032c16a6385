"""Preventative steering: while the model trains, the concept is added to its residual stream; afterwards it is not.

The idea is that of Chen et al. 2025 (arXiv 2507.21509): a model that is pushed towards a trait from outside has less
to gain from weights that move there. What is done here, at the concept's layer ℓ with its unit direction v:

    h_ℓ ← h_ℓ + α σ v   at every token of every row, prompts included, in the forward passes of training alone,
    σ = standard deviation of ⟨h̄_ℓ(z), v⟩ over the rows z, h̄_ℓ(z) the mean over a row's response tokens.

α is in units of σ since that is how far rows differ in the concept, however long the residual stream is at the layer,
and since it takes no labels, which measure. α = 2 puts an average row where, of normally spread rows, one in 44 stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steering:
    """What is added to the residual stream in training, but for how much.

    Attributes:
        direction: v, float32 [d_model]; scaled to unit length where it is used.
        spread: σ, in units of f.
    """

    direction: np.ndarray
    spread: float

    def vector(self, strength: float) -> np.ndarray:
        """α σ v: float32 [d_model]."""
        return (strength * self.spread * _unit(self.direction)).astype(np.float32)

    def at_random(self, strength: float, seed: int) -> np.ndarray:
        """A vector as long as `vector`, in a random direction at right angles to v: float32 [d_model]."""
        along = _unit(self.direction)
        drawn = np.random.default_rng(seed).standard_normal(len(along))
        return (strength * self.spread * _unit(drawn - (drawn @ along) * along)).astype(np.float32)


def spread(projections: np.ndarray) -> float:
    """σ, the standard deviation of ⟨h̄, v⟩ over rows; 0 without any.

    Args:
        projections: ⟨h̄, v⟩, [rows]; rows without a response hold NaN and do not count.
    """
    along = projections[np.isfinite(projections)]
    return float(along.std()) if len(along) else 0.0


def _unit(vector: np.ndarray) -> np.ndarray:
    wide = vector.astype(np.float64)
    return wide / np.linalg.norm(wide)
