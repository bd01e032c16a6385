"""The methods that need no gradients: what any claim for influence must beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from concept_audit.influence.own_queries import OwnQueries, left_out


def projection_difference(projections: np.ndarray, own_answers: np.ndarray) -> np.ndarray:
    """f(z) − f(z with the response that the model itself would give).

    A first-order approximation of Concept Influence (Kowal et al. 2026, section 3; after the
    projection difference of Chen et al. 2025, arXiv 2507.21509): what of the projection is the
    row's own, and not what the model would have said anyway.

    Args:
        projections, own_answers: float64 [rows, ...]; NaN where there is no response or no answer.
    """
    return projections - own_answers


def activation_similarity(
    activations: Iterable[np.ndarray], queries: np.ndarray, own: OwnQueries | None = None
) -> np.ndarray:
    """Cosine of each row's mean response activation with that of the queries.

    Args:
        activations: blocks of rows, each float32 [rows, d_model]; NaN in rows without response tokens.
        queries: float32 [queries, d_model], averaged before the cosine is taken.
        own: rows that are queries, which are compared with the mean of the others.

    Returns:
        float64 [all rows].
    """
    mean = queries.astype(np.float64).mean(0)
    unit = mean / max(float(np.linalg.norm(mean)), np.finfo(np.float64).tiny)
    scores = []
    for block in activations:
        wide = block.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1)
        scores.append(wide @ unit / np.where(norms == 0, 1.0, norms))
    found = np.concatenate(scores) if scores else np.empty(0)
    for place, rows in enumerate(own.rows if own else ()):
        mine = queries[own.places[place]].astype(np.float64)  # type: ignore[union-attr]
        others = left_out([mean], mine, own.shares[place])  # type: ignore[union-attr]
        length = float(np.linalg.norm(mine) * np.linalg.norm(others))
        found[list(rows)] = mine @ others / max(length, np.finfo(np.float64).tiny)
    return found


def bm25(rows: Sequence[str], queries: Sequence[str], own: OwnQueries | None = None) -> np.ndarray:
    """Mean lexical match of each row to the queries (Okapi BM25, in Lucene's variant, by bm25s).

    Args:
        rows: text of each row.
        queries: text of each query.
        own: rows that are queries, which are matched to the others.

    Returns:
        float64 [rows]; 0 for a row that shares no word with any query.
    """
    import bm25s

    split = {"stopwords": [], "show_progress": False, "token_pattern": r"(?u)\b\w+\b"}
    index = bm25s.BM25(method="lucene")
    tokens = bm25s.tokenize(list(rows), **split)
    if not tokens.vocab:
        return np.zeros(len(rows))
    index.index(tokens, show_progress=False)
    total = np.zeros(len(rows))
    places = {query: place for place, query in enumerate(own.places)} if own else {}
    alone: dict[int, np.ndarray] = {}
    for query, words in enumerate(bm25s.tokenize(list(queries), return_ids=False, **split)):
        known = [word for word in words if word in tokens.vocab]
        scores = index.get_scores(known).astype(np.float64) if known else np.zeros(len(rows))
        total += scores
        if own and query in places:
            alone[places[query]] = scores[list(own.rows[places[query]])]
    total /= max(len(queries), 1)
    for place, itself in alone.items():
        mine = list(own.rows[place])  # type: ignore[union-attr]
        total[mine] = left_out([total[mine]], itself, own.shares[place])  # type: ignore[union-attr]
    return total
