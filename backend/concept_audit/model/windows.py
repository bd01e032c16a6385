"""Where to split plain text that is longer than the context.

Windows are as even as can be, so that their scores compare: a text of slightly more than a context gives two halves,
and not a whole one and a rest of a few tokens. They end between paragraphs, lines or words where there is such a place
near by; text without white space is split between tokens. One after the other they are the text.
"""

from __future__ import annotations

import numpy as np

from concept_audit.model.chat import ChatRenderer

NEAR = 16
"""A window may be shorter or longer than planned by one in so many of its tokens, to end where something ends."""


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

        def behind(tokens: int) -> int:
            # Several tokens may be bytes of one character, which is not split.
            token = max(first + tokens, int(np.searchsorted(starts, begin, side="right")))
            return int(starts[token]) if token < len(starts) else len(text)

        room = max(1, self._renderer.max_tokens - self._around)
        while True:
            end = len(text)
            if left > room:
                parts = -(-left // (room - room // NEAR))
                size = -(-left // parts)
                most = min(size + size // NEAR, room)
                end = _boundary(text, behind(size - size // NEAR), behind(size), behind(most))
            # By itself a part may have other tokens than within the text.
            excess = len(self._renderer.places(text[begin:end])) - self._renderer.max_tokens
            if excess <= 0 or room == 1:
                return end
            room = max(1, room - excess)


def _boundary(text: str, low: int, wanted: int, high: int) -> int:
    """The place nearest to the wanted one, of those between two bounds where most ends: a paragraph, a line, a word."""
    for mark in ("\r\n\r\n", "\n\n", "\n"):
        before = text.rfind(mark, max(0, low - len(mark)), wanted)
        after = text.find(mark, max(0, wanted - len(mark)), high)
        ends = [found + len(mark) for found in (before, after) if found >= 0]
        if ends:
            return min(ends, key=lambda end: abs(end - wanted))
    # A space belongs to the word after it, as most tokenizers have it.
    spaces = (place for place in range(low, min(high + 1, len(text))) if text[place].isspace())
    return min(spaces, key=lambda place: abs(place - wanted), default=wanted)
