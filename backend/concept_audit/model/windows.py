"""Where to split plain text that is longer than the context.

Windows are as even as can be, so that their scores compare: a text of slightly more than a context gives two halves,
and not a whole one and a rest of a few tokens. They end between paragraphs, lines or words where there is such a place
in their last eighth; text without white space is split between tokens. One after the other they are the text.
"""

from __future__ import annotations

import numpy as np

from concept_audit.model.chat import ChatRenderer

NEAR = 8
"""A window may end early by one in so many of its characters, to end where something ends."""


class Splitter:
    """Splits text so that each part, as a row of plain text by itself, is no longer than the longest row.

    Args:
        renderer: reads rows.
    """

    def __init__(self, renderer: ChatRenderer):
        self._renderer = renderer
        self._around = len(renderer.places(""))

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """The first character of each part, and the first behind it; a single part where the text fits.

        A single character of more tokens than the longest row has is a part of its own, and is cut.
        """
        # A token has a byte at least, but for a space that some tokenizers put before the text.
        if text.isascii() and len(text) + self._around < self._renderer.max_tokens:
            return [(0, len(text))]
        places = self._renderer.places(text)
        if len(places) <= self._renderer.max_tokens:
            return [(0, len(text))]
        starts = places[(places[:, 1] > places[:, 0]) & (places[:, 0] < len(text)), 0]
        spans = []
        begin = 0
        while begin < len(text):
            end = self._end(text, starts, begin)
            spans.append((begin, end))
            begin = end
        return spans

    def _end(self, text: str, starts: np.ndarray, begin: int) -> int:
        """Where the window ends that begins at a character.

        Args:
            starts: int32 [tokens], the first character of each token of the text.
        """
        first = int(np.searchsorted(starts, begin))
        left = len(starts) - first
        room = max(1, self._renderer.max_tokens - self._around)
        size = max(1, -(-left // max(1, -(-left // room))))
        while True:
            end = _boundary(text, begin, _start_behind(starts, first + size, begin, len(text)))
            # By itself a part may have other tokens than within the text.
            excess = len(self._renderer.places(text[begin:end])) - self._renderer.max_tokens
            if excess <= 0 or size == 1:
                return end
            size = max(1, size - excess)


def _start_behind(starts: np.ndarray, token: int, begin: int, end: int) -> int:
    """The first character of a token, or of the first one after it that lies behind `begin`; else the text's end."""
    # Several tokens may be bytes of one character.
    token = max(token, int(np.searchsorted(starts, begin, side="right")))
    return int(starts[token]) if token < len(starts) else end


def _boundary(text: str, begin: int, limit: int) -> int:
    """The best place for a window from `begin` to end, at `limit` or not long before it."""
    if limit == len(text):
        return limit
    earliest = limit - max(1, (limit - begin) // NEAR)
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, earliest, limit)
        if found >= 0:
            return found + len(mark)
    # A space belongs to the word after it, as most tokenizers have it.
    return next((place for place in range(limit, earliest, -1) if text[place].isspace()), limit)
