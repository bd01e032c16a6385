"""Words that tell texts in which an SAE feature fires from those in which it does not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.metrics import NORMAL_95, balanced_accuracy

PRIOR_SHARE = 0.25
"""α₀, as a share of the words of either side: a quarter as much text, shared out as words are in all of the data."""
CANDIDATES = 10
"""So many of the words that are surest are tried as part of a label."""
LABEL_WORDS = 3
LEAST_TEXTS = 2
"""A word of a single text says nothing of the next one."""
_WORD = re.compile(r"\d+|[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class LogOdds:
    """How much likelier words are on one side than on the other; float64 [words] each.

    Attributes:
        value: δ, the difference of log-odds.
        low, high: its 95% interval.
        z: δ over its standard deviation.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    z: np.ndarray


def log_odds(inside: np.ndarray, outside: np.ndarray, prior: np.ndarray) -> LogOdds:
    """Log-odds ratios of words with an informative Dirichlet prior.

    Monroe, Colaresi and Quinn 2008 ("Fightin' words", Political Analysis 16:372), equations 15 to 22. With y_w a
    side's count of the word w, n = Σ y_w, prior counts α_w and α₀ = Σ α_w:

        δ_w = ln[(y_wⁱ + α_w)/(nⁱ + α₀ − y_wⁱ − α_w)] − ln[(y_wʲ + α_w)/(nʲ + α₀ − y_wʲ − α_w)]
        σ²_w ≈ 1/(y_wⁱ + α_w) + 1/(y_wʲ + α_w),    ζ_w = δ_w/σ_w,    interval δ_w ± 1.96 σ_w

    Args:
        inside, outside: [words], how often each word comes on either side (i and j).
        prior: float64 [words], α_w > 0, of at least two words.
    """
    i, j = inside + prior, outside + prior
    value = np.log(i / (i.sum() - i)) - np.log(j / (j.sum() - j))
    deviation = np.sqrt(1 / i + 1 / j)
    reach = NORMAL_95 * deviation
    return LogOdds(value, value - reach, value + reach, value / deviation)


def words_of(text: str) -> list[str]:
    """The words and numbers of a text, case folded."""
    return [word.casefold() for word in _WORD.findall(text)]


def telling_words(firing: Sequence[str], other: Sequence[str], background: Counter[str]) -> list[str]:
    """Words for a label: at most `LABEL_WORDS`, the surest first.

    Of the words whose log-odds are above 0 with their interval, the `CANDIDATES` with the largest z are tried in that
    order; one is taken if texts that have any of the words taken so far are told apart better with it (by balanced
    accuracy on these same texts, so the label has to be scored on others).

    Args:
        firing: texts in which the feature fires.
        other: texts in which it does not.
        background: how often words come in texts of this data, which shares out the prior (`PRIOR_SHARE`).

    Returns:
        none if no word tells the two apart.
    """
    sides = [[words_of(text) for text in texts] for texts in (firing, other)]
    counts = [Counter(word for words in texts for word in words) for texts in sides]
    vocabulary = sorted(counts[0] | counts[1])
    if len(vocabulary) < 2 or not all(sides):
        return []
    known = np.array([background[word] + counts[0][word] + counts[1][word] for word in vocabulary], float)
    inside, outside = (np.array([count[word] for word in vocabulary], float) for count in counts)
    found = log_odds(inside, outside, PRIOR_SHARE * (inside.sum() + outside.sum()) / 2 * known / known.sum())
    texts_with = Counter(word for words in sides[0] for word in set(words))
    candidates = [
        place
        for place in np.argsort(-found.z, kind="stable")
        if found.low[place] > 0 and texts_with[vocabulary[place]] >= LEAST_TEXTS
    ][:CANDIDATES]
    taken: list[str] = []
    best = 0.5
    for place in candidates:
        tried = [*taken, vocabulary[place]]
        reached = _separation(tried, sides[0], sides[1])
        if reached > best and len(tried) <= LABEL_WORDS:
            taken, best = tried, reached
    return taken


def has_words(text: str, words: Sequence[str]) -> bool:
    """Whether a text has any of some words, as `words_of` gives them."""
    return not set(words).isdisjoint(words_of(text))


def has_tokens(text: str, tokens: Sequence[str]) -> bool:
    """Whether any of some tokens, which may be parts of words, stands in a text; case and outer space do not count."""
    folded = text.casefold()
    return any(token in folded for token in (token.strip().casefold() for token in tokens) if token)


def _separation(words: Sequence[str], firing: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> float:
    chosen = set(words)
    said = np.array([not chosen.isdisjoint(text) for text in (*firing, *other)])
    return balanced_accuracy(said, np.arange(len(said)) < len(firing)).value
