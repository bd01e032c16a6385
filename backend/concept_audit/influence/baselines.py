"""The methods that need no gradients: what any claim for influence must beat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from concept_audit.influence.own_queries import OwnQueries, left_out

K1, B = 1.5, 0.75
"""How soon more of a word counts no more, and how much a row's length counts: Lucene's usual values."""
WORD = re.compile(r"\b\w+\b")


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


def likeness(activations: Callable[[], Iterable[np.ndarray]], mean: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Cosine of each row's mean response activation with a row's, both less the mean of all rows.

    Without the mean, which all rows share, every row of a model is nearly parallel to every other (Ethayarajh 2019,
    arXiv 1909.00512).

    Args:
        activations: gives blocks of rows, each float32 [rows, d_model]; NaN in rows without response tokens.
        mean: float64 [d_model], of all rows that have one.
        row: float32 [d_model].

    Returns:
        float64 [all rows]; NaN where there is nothing to compare.
    """
    unit = row.astype(np.float64) - mean
    unit /= max(float(np.linalg.norm(unit)), np.finfo(np.float64).tiny)
    found = []
    for block in activations():
        centred = block.astype(np.float64) - mean
        norms = np.linalg.norm(centred, axis=1)
        found.append(centred @ unit / np.where(norms == 0, 1.0, norms))
    return np.concatenate(found) if found else np.empty(0)


def bm25(
    texts: Callable[[], Iterable[Sequence[str]]], queries: Sequence[str], own: OwnQueries | None = None
) -> np.ndarray:
    """Mean lexical match of each row to the queries: Okapi BM25 in Lucene's variant (Kamphuis et al. 2020, table 1).

    Of a query, summed over its words w, each as often as it comes::

        log(1 + (N − n_w + ½) / (n_w + ½)) · c / (c + k₁ (1 − b + b l / mean l))

    where N is the number of rows, n_w of those that have w; c how often the row has w, and l how many words it has.

    Args:
        texts: gives the rows' texts anew at each call, in blocks. They are read twice, and only the rows' lengths and
            scores are held.
        queries: text of each query.
        own: rows that are queries, which are matched to the others.

    Returns:
        float64 [rows]; 0 for a row that shares no word with any query.
    """
    counted = [Counter(_words(query)) for query in queries]
    places = {word: place for place, word in enumerate(dict.fromkeys(word for query in counted for word in query))}
    having = np.zeros(len(places))
    lengths: list[np.ndarray] = []
    for block in texts():
        split = [_words(text) for text in block]
        lengths.append(np.fromiter(map(len, split), np.int64, len(split)))
        for words in split:
            having[[places[word] for word in places.keys() & set(words)]] += 1
    length = np.concatenate([np.empty(0, np.int64), *lengths])
    idf = np.log1p((len(length) - having + 0.5) / (having + 0.5))
    # [words, queries]
    wanted = np.zeros((len(places), len(queries)))
    for number, query in enumerate(counted):
        for word, count in query.items():
            wanted[places[word], number] = count * idf[places[word]]
    total, alone = wanted.sum(1), {row: place for place, rows in enumerate(own.rows) for row in rows} if own else {}
    norms = K1 * (1 - B + B * length / max(float(length.mean()) if len(length) else 0.0, 1.0))
    scores, itself = np.zeros(len(length)), dict.fromkeys(alone, 0.0)
    for row, text in enumerate(text for block in texts() for text in block):
        found = Counter(filter(places.__contains__, _words(text)))
        if found:
            at = [places[word] for word in found]
            counts = np.fromiter(found.values(), np.float64, len(found))
            match = counts / (counts + norms[row])
            scores[row] = match @ total[at]
            if own and row in alone:
                itself[row] = float(match @ wanted[at, own.places[alone[row]]])
    scores /= max(len(queries), 1)
    for row, place in alone.items():
        scores[row] = left_out([scores[row]], itself[row], own.shares[place])  # type: ignore[union-attr]
    return scores


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
