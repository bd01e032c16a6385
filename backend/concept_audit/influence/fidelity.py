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


def difference_of_means(means: np.ndarray, seed_row: int, size: int) -> tuple[list[int], np.ndarray]:
    """A direction as a probe finds it, without labels: rows that are alike, against all others.

    The rows that are alike are those whose centred mean activations have the largest cosine with
    those of the seed row, which is one of them.

    Args:
        means: mean response activations, float32 [rows, d_model], of more than `size` rows.
        seed_row: which row the others are to be like.
        size: how many rows are alike.

    Returns:
        the places of the rows that are alike, and the unit direction from the mean of the others
        to theirs, float32 [d_model]; zero where the two means are the same.
    """
    centred = means.astype(np.float64) - means.mean(0, dtype=np.float64)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    cosines = unit @ unit[seed_row]
    cosines[seed_row] = np.inf
    alike = np.argsort(-cosines, kind="stable")[:size]
    direction = centred[alike].mean(0) - np.delete(centred, alike, axis=0).mean(0)
    direction /= max(float(np.linalg.norm(direction)), np.finfo(np.float64).tiny)
    return alike.tolist(), direction.astype(np.float32)
