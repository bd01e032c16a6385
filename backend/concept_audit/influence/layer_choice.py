"""Few layers whose scores stand for those of all.

A row's influence is a sum over layers, s = Σ_l s_l, and its terms are alike: in most layers a row pushes towards a
concept by about as much, relative to other rows, as in any other. A few bits of every layer keep what is large in
each, and lose the many small numbers that its term is the sum of. The same bits spent on few layers keep their
terms whole. Layers are chosen one after the other (forward selection), each time the l with which

    ρ(S) = mean over concepts of the correlation over rows of Σ_{l∈S} s_l with Σ_l s_l

becomes largest, until ρ(S) is as large as asked for, with the concepts of each kind alone. What they leave out is made
up for by a factor, the slope through the origin of the centred Σ_l s_l on Σ_{l∈S} s_l over rows and concepts of a kind.
Parts of layers, chosen in the same way, come nearer to all scores on the rows that they are chosen on, and rank other
rows worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

LEAST_ROWS = 32
"""On fewer rows a correlation says too little to leave anything out."""


@dataclass(frozen=True)
class LayerChoice:
    """Layers that were chosen.

    Attributes:
        places: of the layers, rising.
        agreement: the least ρ(S) of a kind of concepts; 1 where all layers are taken.
        factors: what their scores are multiplied with, by the kind of concept; of other kinds 1.
    """

    places: list[int]
    agreement: float = 1.0
    factors: Mapping[int, float] = field(default_factory=dict)


def choose_layers(scores: np.ndarray, kinds: np.ndarray, agreement: float, counted: np.ndarray) -> LayerChoice:
    """The fewest layers that forward selection needs.

    Args:
        scores: s_l of every layer, row and concept, [layers, rows, concepts].
        kinds: which kind each concept is of, [concepts].
        agreement: ρ(S) that is asked for; from 1 on all layers are taken.
        counted: bool [rows, concepts], pairs of which nothing is known, or too much, are left out: a row is alike to a
            concept that was drawn on it in all layers.

    Returns:
        all layers where fewer than `LEAST_ROWS` rows have finite scores, or no concept tells them apart.
    """
    everything = LayerChoice(list(range(len(scores))))
    counted = counted & np.isfinite(scores).all(0)
    if agreement >= 1 or (counted.sum(0) < LEAST_ROWS).all():
        return everything
    terms = _centred(np.where(counted, scores, 0).astype(np.float64), counted)
    whole = terms.sum(0)
    length = np.sqrt(np.square(whole).sum(0))
    told = (length > 0) & (counted.sum(0) >= LEAST_ROWS)
    if not told.any():
        return everything
    terms, whole, kinds = terms[:, :, told] / length[told], whole[:, told] / length[told], kinds[told]
    along = np.einsum("lrc,rc->lc", terms, whole)
    squares = np.square(terms).sum(1)
    of_kind = {int(kind): kinds == kind for kind in np.unique(kinds)}
    chosen: list[int] = []
    total = np.zeros_like(whole)
    while len(chosen) < len(terms):
        together = np.square(total).sum(0) + 2 * np.einsum("lrc,rc->lc", terms, total) + squares
        towards = (total * whole).sum(0) + along
        alike = towards / np.sqrt(np.maximum(together, np.finfo(np.float64).tiny))
        gains = alike.mean(1)
        gains[chosen] = -np.inf
        best = int(gains.argmax())
        chosen.append(best)
        total += terms[best]
        reached = min(float(alike[best, mine].mean()) for mine in of_kind.values())
        if reached >= agreement:
            factors = {
                kind: float((whole[:, mine] * total[:, mine]).sum() / np.square(total[:, mine]).sum())
                for kind, mine in of_kind.items()
            }
            return LayerChoice(sorted(chosen), reached, factors)
    return everything


def _centred(scores: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Scores less their mean over the rows that count, and 0 for others."""
    means = scores.sum(1, keepdims=True) / np.maximum(counted.sum(0), 1)
    return np.where(counted, scores - means, 0)
