"""Labelled examples, as a probe takes them."""

from __future__ import annotations

from collections.abc import Sequence

from concept_audit.errors import ConceptError
from concept_audit.types import LabelledExample


def distinct(examples: Sequence[LabelledExample]) -> list[LabelledExample]:
    """Without repetitions.

    Raises:
        ConceptError: one text has both labels.
    """
    kept: dict[str, LabelledExample] = {}
    for number, example in enumerate(examples, start=1):
        known = kept.setdefault(example.content_hash, example)
        if known.label != example.label:
            raise ConceptError(
                f"example {number} is labelled {example.label}, but the same text was labelled "
                f"{known.label} before; keep one of them. It begins {example.messages[-1].content[:60]!r}"
            )
    return list(kept.values())
