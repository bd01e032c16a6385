"""What a person can read off an SAE feature: whether the token that it fires on, and the tokens that it promotes, say
something."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LEAST_LETTERS = 3
LEAST_FOUND = 3
"""Promoted tokens that have to be words of the texts: fewer are there by chance among the most frequent words."""
_WORD = re.compile(r"[^\W\d_]+")


def is_word(text: str, start: int, end: int) -> bool:
    """Whether a token, from `start` to `end` of a text, is a word by itself, neither part of one nor a sign."""
    token = text[start:end]
    word = token.strip()
    if len(word) < LEAST_LETTERS or not _WORD.fullmatch(word):
        return False
    before = text[:start] + token[: len(token) - len(token.lstrip())]
    after = token[len(token.rstrip()) :] + text[end:]
    return not before[-1:].isalpha() and not after[:1].isalpha()


def promotion_tells(promoted: Sequence[str], suppressed: Sequence[str], texts: Iterable[str]) -> bool:
    """Whether the tokens that a feature makes likelier have to do with the texts in which it fires.

    The logit lens reads a feature as if no block stood between it and the unembedding (nostalgebraist 2020); of most
    features of early layers it shows broken pieces that never come. It says something where at least `LEAST_FOUND` of
    the promoted tokens are words of the texts, and more of them than of the suppressed ones.

    Args:
        promoted, suppressed: tokens, with the space before them where a word begins.
        texts: responses in which the feature fires.
    """
    words = {word.lower() for text in texts for word in _WORD.findall(text)}

    def found_in(tokens: Sequence[str]) -> int:
        return sum(_begins_word(token) and token.strip().lower() in words for token in tokens)

    found, against = found_in(promoted), found_in(suppressed)
    return found >= LEAST_FOUND and found > against


def _begins_word(token: str) -> bool:
    return token[:1].isspace() and len(token.strip()) >= LEAST_LETTERS and bool(_WORD.fullmatch(token.strip()))
