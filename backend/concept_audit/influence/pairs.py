"""Influence of preference pairs: the gradient of the DPO loss at the reference model.

The loss of a pair of responses y⁺ (chosen) and y⁻ (rejected) to a prompt x is (Rafailov et al. 2023,
arXiv 2305.18290, equation 7)

    L(θ) = −log σ(β u(θ)),   u(θ) = log p_θ(y⁺|x)/p_ref(y⁺|x) − log p_θ(y⁻|x)/p_ref(y⁻|x),

with ∇L = −β σ(−β u) ∇u. Training starts at θ = ref, where u = 0 and σ(0) = ½, so

    ∇L = −(β/2) (∇log p(y⁺|x) − ∇log p(y⁻|x)).

A response's log-likelihood is a sum over its n tokens, and the loss L̄ of a single sequence here is the mean:
log p = −n L̄. With s = ⟨∇L̄, G⟩, the score of a single sequence for a query G,

    ⟨∇L, G⟩ = (β/2) (n⁺ s⁺ − n⁻ s⁻).

The summands of s by token, weighted alike, add up to the pair's score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from concept_audit.influence.queries import Rows
from concept_audit.influence.scoring import RowScores
from concept_audit.model.pairs import sequences

Score = Callable[[Rows], Iterator[list[RowScores]]]
"""Scores of single sequences, batch by batch: ⟨∇L̄, G⟩."""


def pair_weight(response: np.ndarray, sign: int, beta: float) -> float:
    """±(β/2) n of a side with n predicted response tokens.

    Args:
        response: bool [tokens].
        sign: 1 for the chosen side, -1 for the rejected one.
    """
    return sign * beta / 2 * int(response[1:].sum())


def score_with_pairs(score: Score, rows: Rows, beta: float) -> Iterator[list[RowScores]]:
    """Scores of rows of which some are pairs.

    Args:
        beta: of the DPO loss; it scales the scores of all pairs alike.

    Yields:
        the rows of a batch, a pair with the later of its sides; pairs of which a side has nothing to predict
        are left out. Token influences of a pair are those of both sides, and 0 at the separator.
    """
    parts = sequences(rows.ids, rows.response)
    waiting: dict[int, RowScores] = {}
    for batch in score(Rows(parts.ids, parts.response)):
        done = []
        for found in batch:
            row = int(parts.owner[found.index])
            if not parts.paired[found.index]:
                done.append(replace(found, index=row))
                continue
            weighted = _weighted(found, pair_weight(parts.response[found.index], int(parts.sign[found.index]), beta))
            other = waiting.pop(row, None)
            if other is None:
                waiting[row] = weighted
                continue
            chosen, rejected = sorted((other, weighted), key=lambda side: side.index)
            done.append(_together(row, chosen, rejected))
        yield done


def _weighted(found: RowScores, weight: float) -> RowScores:
    tokens = None if found.tokens is None else (weight * found.tokens).astype(np.float32)
    return replace(found, scores=weight * found.scores, tokens=tokens)


def _together(row: int, chosen: RowScores, rejected: RowScores) -> RowScores:
    tokens = None
    if chosen.tokens is not None and rejected.tokens is not None:
        between = np.zeros((1, chosen.tokens.shape[1]), np.float32)
        tokens = np.concatenate([chosen.tokens, between, rejected.tokens])
    return RowScores(row, chosen.loss + rejected.loss, chosen.scores + rejected.scores, tokens)
