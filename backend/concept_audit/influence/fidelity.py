"""How faithful one way of scoring is to another on the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from concept_audit.metrics import spearman

TOP_SHARE = 0.2


def fidelity(guess: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Rank correlation and overlap of the top rows, over targets.

    Args:
        guess, truth: [rows, targets].

    Returns:
        ``spearman`` and ``overlap`` of the top fifth: median and least over the targets; and counts.
    """
    top = max(1, round(TOP_SHARE * len(truth)))
    correlations, overlaps = [], []
    for g, t in zip(guess.T, truth.T, strict=True):
        correlations.append(float(spearman(g, t)) if len(t) > 2 else float("nan"))
        overlaps.append(len({*np.argsort(-g)[:top]} & {*np.argsort(-t)[:top]}) / top)
    return {
        "rows": len(truth),
        "concepts": truth.shape[1],
        "spearman": float(np.median(correlations)),
        "spearman_least": float(np.min(correlations)),
        "top": top,
        "overlap": float(np.median(overlaps)),
        "overlap_least": float(np.min(overlaps)),
    }
