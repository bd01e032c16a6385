"""Text of people and of data where Streamlit reads Markdown: labels of buttons and links, tooltips, captions."""

from __future__ import annotations

import re


def counted(number: int, thing: str) -> str:
    """So many of a thing, in words: "1 row", "1,200 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def plain(text: str) -> str:
    """Markdown that shows a text as it is: no image is fetched, no link made, nothing set in bold or as a formula."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))
