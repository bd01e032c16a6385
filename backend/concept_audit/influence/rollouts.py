"""Influence of rollouts: the gradient of the policy-gradient loss at the model that is audited.

Of a response y to a prompt x with the advantage A, group relative policy optimisation minimises (Shao et al. 2024,
arXiv 2402.03300, equation 3, without its KL term)

    L(θ) = −(1/n) Σ_t min(ρ_t(θ) A, clip(ρ_t(θ), 1 − ε, 1 + ε) A),   ρ_t(θ) = p_θ(y_t|x, y_<t) / p_old(y_t|x, y_<t),

with n the response's tokens. At θ = old every ρ_t is 1, nothing is clipped, and ∇ρ_t = ∇log p_θ(y_t|x, y_<t), so

    ∇L = −(A/n) Σ_t ∇log p_θ(y_t|x, y_<t) = A ∇L̄,

with L̄ the mean negative log-likelihood, which is the loss of a single sequence here. All that is linear in ∇L̄, the
influence of a row and that of each of its tokens, is A times what it is in fine-tuning. What stands in for influence
to first order is weighed alike, so that of every method a larger score says that training pushes towards the concept:
a response that shows it, and that training makes less likely, pushes away.
"""

from __future__ import annotations

import numpy as np


def weighted(scores: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """A · s.

    Args:
        scores: of the rows as in fine-tuning, [rows, ...]; NaN where a row has none, and so has then.
        advantages: A, float64 [rows].
    """
    # Adding 0 makes of −0 what it is: no influence.
    return scores * advantages.reshape(-1, *[1] * (scores.ndim - 1)) + 0.0
