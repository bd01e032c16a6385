"""Vector filter: how far a row's response points along a concept.

The first-order approximation of Concept Influence (Kowal et al. 2026, arXiv
2602.14869, section 3): f(z) = ⟨h_ℓ(z), v⟩, where h_ℓ(z) is the residual stream
after block ℓ, averaged over the response tokens, and v the concept's unit direction.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def vector_filter(activations: Iterable[np.ndarray], directions: np.ndarray) -> np.ndarray:
    """Score every row against one or several concepts.

    Args:
        activations: mean response activations in blocks of rows, each float32 [rows, d_model];
            NaN in rows without response tokens.
        directions: float32 [d_model, concepts], each column of unit length.

    Returns:
        float64 [all rows, concepts]; NaN for rows without response tokens. Sums are taken in
        float64, so that a score does not depend on how the rows are cut into blocks.
    """
    wide = directions.astype(np.float64)
    blocks = [block.astype(np.float64) @ wide for block in activations]
    return np.concatenate(blocks) if blocks else np.empty((0, directions.shape[1]))
