"""Influence of preference pairs: the gradient of the DPO loss at the reference model.

The loss of a pair of responses y⁺ (chosen) and y⁻ (rejected) to a prompt x is (Rafailov et al. 2023,
arXiv 2305.18290, equation 7)

    L(θ) = −log σ(β u(θ)),   u(θ) = log p_θ(y⁺|x)/p_ref(y⁺|x) − log p_θ(y⁻|x)/p_ref(y⁻|x),

with ∇L = −β σ(−β u) ∇u. Training starts at θ = ref, where u = 0 and σ(0) = ½, so

    ∇L = −(β/2) (∇log p(y⁺|x) − ∇log p(y⁻|x)).

A response's log-likelihood is a sum over its n tokens, and the loss L̄ of a single sequence here is the mean:
log p = −n L̄. With s = ⟨∇L̄, G⟩, the score of a single sequence for a query G,

    ⟨∇L, G⟩ = (β/2) (n⁺ s⁺ − n⁻ s⁻).

The summands of s by token, weighted alike, add up to the pair's score. What is linear in a gradient is of a pair's
what it is of its sides', weighted so: with x the numbers that the gradient index keeps of ∇L̄, a pair has

    (β/2) (n⁺ x⁺ − n⁻ x⁻).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from concept_audit.influence.projection import CompressedRow
from concept_audit.influence.queries import Rows
from concept_audit.influence.scoring import RowScores
from concept_audit.model.pairs import Sequences, sequences

Score = Callable[[Rows], Iterator[list[RowScores]]]
"""Scores of single sequences, batch by batch: ⟨∇L̄, G⟩."""
Compress = Callable[[Rows], Iterator[list[CompressedRow]]]
"""The index's numbers of single sequences, batch by batch."""
Found = TypeVar("Found", RowScores, CompressedRow)


def pair_weight(response: np.ndarray, sign: int, beta: float) -> float:
    """±(β/2) n of a side with n predicted response tokens.

    Args:
        response: bool [tokens].
        sign: 1 for the chosen side, -1 for the rejected one.
    """
    return sign * beta / 2 * int(response[1:].sum())


@dataclass(frozen=True)
class WeightedSequences:
    """Rows as the single sequences that they consist of. A row's gradient is Σ weight × ∇L̄ over its sequences.

    Attributes:
        rows: the sequences; a pair's chosen side comes before its rejected one.
        owner: int64 [sequences], the row that each is of.
        weights: float64 [sequences], of the sides of pairs as from `pair_weight`, else 1.
    """

    rows: Rows
    owner: np.ndarray
    weights: np.ndarray

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Σ weight × value over the sequences of each row.

        Args:
            values: [sequences, queries], of ∇L̄ of each sequence.

        Returns:
            float64 [rows, queries]; NaN where a sequence has NaN.
        """
        found = np.zeros((int(self.owner.max(initial=-1)) + 1, values.shape[1]))
        np.add.at(found, self.owner, self.weights[:, None] * values)
        return found


def weighted_sequences(rows: Rows, beta: float) -> WeightedSequences:
    """Rows, of which some are pairs, taken apart.

    Args:
        beta: of the DPO loss.
    """
    parts = sequences(rows.ids, rows.response)
    weights = [_weight(parts, place, beta) for place in range(len(parts.ids))]
    return WeightedSequences(Rows(parts.ids, parts.response), parts.owner, np.array(weights, np.float64))


def score_with_pairs(score: Score, rows: Rows, beta: float) -> Iterator[list[RowScores]]:
    """Scores of rows of which some are pairs.

    Args:
        beta: of the DPO loss; it scales the scores of all pairs alike.

    Yields:
        the rows of a batch, a pair with the later of its sides; pairs of which a side has nothing to predict have
        NaN. Token influences of a pair are those of both sides, and 0 at the separator.
    """
    parts = sequences(rows.ids, rows.response)
    return _by_row(score(Rows(parts.ids, parts.response)), parts, beta, _weighted_scores, _both_scores)


def compress_with_pairs(compress: Compress, rows: Rows, beta: float) -> Iterator[list[CompressedRow]]:
    """The index's numbers of rows of which some are pairs.

    Args:
        beta: of the DPO loss; it scales the numbers of all pairs alike.

    Yields:
        the rows of a batch, a pair with the later of its sides: no more is held than the first sides of pairs whose
        second is still to come. Pairs of which a side has nothing to predict have NaN. So have the squared norms of
        all pairs: that of a difference does not follow from those of the sides, and nothing asks for it, since pairs
        are not scored unit-normalised.
    """
    parts = sequences(rows.ids, rows.response)
    return _by_row(compress(Rows(parts.ids, parts.response)), parts, beta, _weighted_numbers, _both_numbers)


def _weight(parts: Sequences, place: int, beta: float) -> float:
    return pair_weight(parts.response[place], int(parts.sign[place]), beta) if parts.paired[place] else 1.0


def _by_row(
    batches: Iterable[list[Found]],
    parts: Sequences,
    beta: float,
    weighted: Callable[[Found, float], Found],
    together: Callable[[int, Found, Found], Found],
) -> Iterator[list[Found]]:
    """What was found of single sequences, row by row.

    Args:
        weighted: what was found of a side, times its weight.
        together: of a row the weighted chosen side and the weighted rejected one.
    """
    waiting: dict[int, Found] = {}
    for batch in batches:
        done = []
        for found in batch:
            row = int(parts.owner[found.index])
            if not parts.paired[found.index]:
                done.append(replace(found, index=row))
                continue
            side = weighted(found, _weight(parts, found.index, beta))
            other = waiting.pop(row, None)
            if other is None:
                waiting[row] = side
                continue
            chosen, rejected = sorted((other, side), key=lambda each: each.index)
            done.append(together(row, chosen, rejected))
        yield done


def _weighted_scores(found: RowScores, weight: float) -> RowScores:
    tokens = None if found.tokens is None else (weight * found.tokens).astype(np.float32)
    return replace(found, scores=weight * found.scores, tokens=tokens)


def _both_scores(row: int, chosen: RowScores, rejected: RowScores) -> RowScores:
    tokens = None
    if chosen.tokens is not None and rejected.tokens is not None:
        between = np.zeros((1, chosen.tokens.shape[1]), np.float32)
        tokens = np.concatenate([chosen.tokens, between, rejected.tokens])
    return RowScores(row, chosen.loss + rejected.loss, chosen.scores + rejected.scores, tokens)


def _weighted_numbers(found: CompressedRow, weight: float) -> CompressedRow:
    # A copy: what a batch gives are parts of one array, which would stay for as long as a side waits.
    return replace(found, numbers=(weight * found.numbers).astype(np.float32))


def _both_numbers(row: int, chosen: CompressedRow, rejected: CompressedRow) -> CompressedRow:
    return CompressedRow(row, chosen.numbers + rejected.numbers, np.full_like(chosen.squares, np.nan))
