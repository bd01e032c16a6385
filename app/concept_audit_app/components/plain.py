"""Text of people and of data where Streamlit reads Markdown: labels of buttons and links, tooltips, captions."""

from __future__ import annotations

import re


def plain(text: str) -> str:
    """Markdown that shows a text as it is: no image is fetched, no link made, nothing set in bold or as a formula."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))
