"""What a label of an SAE feature is made of and tried on: pieces of text in which it fires, and in which it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from concept_audit.concepts.readable import is_word
from concept_audit.concepts.words import has_tokens, has_words, telling_words, words_of
from concept_audit.metrics import Estimate, balanced_accuracy
from concept_audit.store.examples import TokenizedText
from concept_audit.types import CONTENT

BEFORE, AFTER = 16, 8
"""Tokens of a piece before and after the one in its middle."""
SEPARATOR = " · "
"""Between the words, or tokens, of a label."""


@dataclass(frozen=True)
class Piece:
    """A piece of a row's text around one token.

    Attributes:
        start, end: of that token within `text`.
        tokens: the places of the piece's tokens in the row.
    """

    text: str
    start: int
    end: int
    tokens: range

    @property
    def on_a_word(self) -> bool:
        """Whether the token is a word by itself."""
        return is_word(self.text, self.start, self.end)

    @property
    def marked(self) -> str:
        """The text with the token between « and »."""
        return f"{self.text[: self.start]}«{self.text[self.start : self.end]}»{self.text[self.end :]}"


@dataclass(frozen=True)
class FeatureExamples:
    """Pieces for one feature, each of another row: those to make a label of, and those to try it on.

    Attributes:
        firing, held_firing: around the token on which the feature fires highest in the row, highest first.
        other, held_other: pieces in which it fires nowhere.
    """

    feature: int
    firing: Sequence[Piece]
    held_firing: Sequence[Piece]
    other: Sequence[Piece]
    held_other: Sequence[Piece]


def piece(row: TokenizedText, position: int) -> Piece:
    """The piece of a row around a token, within its turn."""
    before, after = position, position
    while before > max(position - BEFORE, 0) and row.parts[before - 1] == row.parts[position]:
        before -= 1
    while after < min(position + AFTER, len(row.parts) - 1) and row.parts[after + 1] == row.parts[position]:
        after += 1
    first = int(row.starts[before])
    return Piece(
        row.text[first : int(row.ends[after])],
        int(row.starts[position]) - first,
        int(row.ends[position]) - first,
        range(before, after + 1),
    )


def drawn_piece(row: TokenizedText, example_id: int) -> Piece | None:
    """The piece around a token of the response, drawn by the number of the row; None if it has no content."""
    places = np.flatnonzero(row.parts == CONTENT)
    return piece(row, int(places[np.random.default_rng(example_id).integers(len(places))])) if len(places) else None


def examples(feature: int, firing: Sequence[Piece], other: Sequence[Piece]) -> FeatureExamples:
    """Every second piece, strong and weak ones alike, is held out."""
    return FeatureExamples(feature, firing[::2], firing[1::2], other[::2], other[1::2])


def word_counts(pieces: Sequence[Piece]) -> Counter[str]:
    """How often words come in pieces."""
    return Counter(word for one in pieces for word in words_of(one.text))


def words_label(about: FeatureExamples, background: Counter[str]) -> str:
    """Words that tell firing pieces from others (see `telling_words`); empty if none does."""
    words = telling_words([p.text for p in about.firing], [p.text for p in about.other], background)
    return SEPARATOR.join(words)


def words_detection(about: FeatureExamples, label: str) -> Estimate:
    """How well having one of the label's words tells held-out pieces apart."""
    words = label.split(SEPARATOR)
    return _detection(about, lambda text: has_words(text, words))


def tokens_detection(about: FeatureExamples, label: str) -> Estimate:
    """As `words_detection`, where the label is of tokens, which may be parts of words."""
    tokens = label.split(SEPARATOR)
    return _detection(about, lambda text: has_tokens(text, tokens))


def _detection(about: FeatureExamples, says: Callable[[str], bool]) -> Estimate:
    texts = [p.text for p in (*about.held_firing, *about.held_other)]
    return balanced_accuracy(
        np.array([says(text) for text in texts], bool), np.arange(len(texts)) < len(about.held_firing)
    )
