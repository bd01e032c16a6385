"""Rows that are query examples themselves are scored by the other queries.

No gradient lies along a row's as its own does: a mean of queries that contains the row says as much of the row
as of the concept. Influence is linear in the query. With s = ±1 the sign of the queries, all of one sign of the
same weight, ρ_s the share of them that is the row, S_s the row's score by all of them, and O its score by itself
as the only query,

    score = Σ_s (S_s − s ρ_s O) / (1 − ρ_s)

is the score by the queries without the row. A sign of which nothing would be left stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.queries import PreparedQueries, Quantity, Rows
from concept_audit.influence.scoring import SquaredNorms
from concept_audit.model.batches import Batch, batches_by_length, halving
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.exact import in_float64
from concept_audit.model.gradients import GradientPass, Visit
from concept_audit.model.linear import LinearLayer
from concept_audit.model.load import LanguageModel

SIGNS = (1, -1)


@dataclass(frozen=True)
class OwnQueries:
    """The query texts that are rows of the data.

    Attributes:
        rows: of each text, the rows that it is; more than one where the data have copies.
        places: where among the queries each text stands first.
        of: for each query, which of the texts it is; −1 for none.
        shares: float64 [texts, 2], ρ of each text among the positive and among the negative queries; 0 for a
            sign of which nothing would be left.
    """

    rows: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    of: tuple[int, ...]
    shares: np.ndarray


def own_queries(texts: Sequence[str], labels: Sequence[int], rows: Mapping[str, Sequence[int]]) -> OwnQueries | None:
    """The queries that rows are to be scored without.

    Args:
        texts: what identifies the text of each query.
        labels: of each query, 1 positive and 0 negative.
        rows: text → the rows that it is, of those texts that are rows.

    Returns:
        None if leaving queries out changes no score.
    """
    signs = [sum(label == wanted for label in labels) for wanted in (1, 0)]
    counts: dict[str, list[int]] = {}
    for text, label in zip(texts, labels, strict=True):
        if text in rows:
            counts.setdefault(text, [0, 0])[1 - label] += 1
    shares = {
        text: [mine / all_ if mine < all_ else 0.0 for mine, all_ in zip(count, signs, strict=True)]
        for text, count in counts.items()
    }
    kept = [text for text in shares if any(shares[text])]
    if not kept:
        return None
    places = {text: place for place, text in enumerate(kept)}
    return OwnQueries(
        tuple(tuple(rows[text]) for text in kept),
        tuple(list(texts).index(text) for text in kept),
        tuple(places.get(text, -1) for text in texts),
        np.array([shares[text] for text in kept]),
    )


def by_sign(queries: Rows, weights: Sequence[float]) -> list[tuple[Rows, list[float], list[int]]]:
    """The positive queries, then the negative ones if there are any: rows, weights, places among all queries."""
    found = []
    for sign in SIGNS:
        places = [i for i, weight in enumerate(weights) if weight * sign > 0]
        if places:
            found.append((_chosen(queries, places), [weights[i] for i in places], places))
    return found


def left_out(scores: Sequence[Any], own: Any, shares: Sequence[float]) -> Any:
    """The formula above, for numbers, arrays or tensors.

    Args:
        scores: S of the positive queries, and of the negative ones if there are any.
        own: O.
        shares: ρ of each sign.
    """
    parts = [
        (total - sign * share * own) / (1 - share) for total, sign, share in zip(scores, SIGNS, shares, strict=False)
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def summed(
    queries: Rows, weights: Sequence[float], own: OwnQueries | None, numbers: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """A query from those of its examples, Σ_q w_q y_q, and for each text of `own` that by the other examples.

    Args:
        numbers: float64 y_q of each example.

    Returns:
        float32.
    """
    totals = [
        np.sum([weight * numbers[place] for weight, place in zip(mine, places, strict=True)], axis=0)
        for _, mine, places in by_sign(queries, weights)
    ]
    texts = [] if own is None else zip(own.places, own.shares, strict=True)
    without = [left_out(totals, numbers[place], shares).astype(np.float32) for place, shares in texts]
    return np.sum(totals, axis=0).astype(np.float32), without


def own_token_scores(
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    solved: Sequence[PreparedQueries],
    quantity: Quantity,
    rows: Rows,
    queries: Rows,
    shares: np.ndarray,
    curvatures: Callable[[int], LayerCurvature] | None,
    damping: float,
    unit_normalised: bool = False,
    budget: int | None = None,
) -> list[np.ndarray]:
    """Influence of each token of rows that are queries, by the other queries: the summands of their scores.

    With X = Q_Sᵀ G_q Q_A the row's gradient as a query in the eigenbasis, and δ̃, ã the row's own output gradients
    and inputs there, a token's share of O is δ̃ᵀ [X / (Λ + λ)] ã: G_q is never turned back.

    Args:
        solved: (H + λI)⁻¹ of the gradient of the positive queries, and of the negative ones if there are any; one
            query each.
        rows, queries: the same texts, as rows and as queries.
        shares: float64 [rows, 2], as in `OwnQueries`.
        curvatures: of each layer; None for H + λI = I.
        damping: λ as a share of each layer's mean eigenvalue.
        unit_normalised: as in `score_rows`.
        budget: tokens a batch, padding included; chosen by the device if None.

    Returns:
        float64 [tokens] of each row; NaN where a row has no score.
    """
    found = [np.full(len(ids), np.nan) for ids in rows.ids]
    spans, scorable = list(map(max, rows.spans, queries.spans)), rows.scorable
    wide = lm.wide_dtype
    with GradientPass(lm, layers) as run:

        def score(chosen: Sequence[int]) -> None:
            as_queries, batch = queries.batch(chosen, lm), rows.batch(chosen, lm)
            asked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            quantity(run, as_queries, _keep(asked, as_queries))
            by_all = torch.zeros(*batch.ids.shape, len(solved), dtype=wide, device=lm.device)
            by_own = torch.zeros(*batch.ids.shape, dtype=wide, device=lm.device)
            norms = torch.zeros(len(chosen), dtype=wide, device=lm.device)
            squares = SquaredNorms(layers)

            def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
                a = torch.where(batch.real[..., None], a, 0)
                for sign, query in enumerate(solved):
                    by_all[..., sign] += query.token_scores(index, a, delta)[..., 0]
                if unit_normalised:
                    norms.add_(squares(index, a, delta))
                if index in asked:
                    curvature = curvatures(index) if curvatures else None
                    by_own.add_(_own_products(a, delta, *asked[index], curvature, damping))

            losses = run.losses(batch, visit)
            scale = norms.sqrt().clamp(min=torch.finfo(wide).tiny) if unit_normalised else torch.ones_like(norms)
            for place, i in enumerate(chosen):
                if bool(torch.isfinite(losses[place])):
                    parts = [in_float64(part) for part in by_all[place].unbind(-1)]
                    tokens = left_out(parts, in_float64(by_own[place]), shares[i]) / in_float64(scale[place])
                    values = tokens.cpu().numpy()[: len(found[i])]
                    found[i] = np.pad(values, (0, len(found[i]) - len(values)))

        for places in batches_by_length([spans[i] for i in scorable], budget or gradient_tokens_per_batch(lm)):
            for _ in halving([scorable[place] for place in places], score, lambda text: None, lm.device):
                pass
    return found


def _own_products(
    a: torch.Tensor,
    delta: torch.Tensor,
    a_query: torch.Tensor,
    delta_query: torch.Tensor,
    curvature: LayerCurvature | None,
    damping: float,
) -> torch.Tensor:
    """δ_tᵀ (H + λI)⁻¹ G_q a_t of one layer, for rows with their queries: [rows, tokens]."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if curvature is None:
        return ((delta @ delta_query.mT).to(wide) * (a @ a_query.mT).to(wide)).sum(-1)
    rows = zip(a, delta, a_query, delta_query, strict=True)
    return torch.stack([curvature.token_products(*row, damping).to(wide) for row in rows])


def _keep(kept: dict[int, tuple[torch.Tensor, torch.Tensor]], batch: Batch) -> Visit:
    def visit(index: int, a: torch.Tensor, delta: torch.Tensor) -> None:
        kept[index] = torch.where(batch.real[..., None], a, 0), delta

    return visit


def _chosen(rows: Rows, places: Sequence[int]) -> Rows:
    return Rows([rows.ids[i] for i in places], [rows.response[i] for i in places])
