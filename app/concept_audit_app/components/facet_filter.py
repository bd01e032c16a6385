"""What is asked of the metadata fields and of the source, as it stands in the URL.

``where_FIELD`` are values to keep, ``not_FIELD`` values to leave out (each may be there many times), and
``range_FIELD`` is ``LOW..HIGH``. Of the source it is ``source`` and ``source-not``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from concept_audit_app.components.url import all_in_url, in_url, put, put_all

SOURCE, NO_SOURCE = "source", "source-not"
Many = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class FacetFilter:
    """What facets let through; see `RowFilter` for what each part means."""

    metadata: Many = field(default_factory=dict)
    without: Many = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    without_sources: tuple[str, ...] = ()


def facets_in_url(fields: Iterable[str], held: Collection[str] = ()) -> FacetFilter:
    """What the URL asks of these metadata fields, and of the source.

    Args:
        held: parameters that widgets of the page hold; they are left out.
    """
    names = list(fields)
    kept = {name: all_in_url(f"where_{name}") for name in names if f"where_{name}" not in held}
    left_out = {name: all_in_url(f"not_{name}") for name in names}
    spans = {name: span(in_url(f"range_{name}")) for name in names}
    return FacetFilter(
        {name: values for name, values in kept.items() if values},
        {name: values for name, values in left_out.items() if values},
        {name: found for name, found in spans.items() if found is not None},
        () if SOURCE in held else all_in_url(SOURCE),
        all_in_url(NO_SOURCE),
    )


def span(text: str | None) -> tuple[float, float] | None:
    """``LOW..HIGH`` as two numbers; None for anything else."""
    low, _, high = (text or "").partition("..")
    try:
        found = float(low), float(high)
    except ValueError:
        return None
    return None if any(map(math.isnan, found)) else found


def put_values(name: str | None, kept: Iterable[str], left_out: Iterable[str]) -> None:
    """Change what is asked of a field's values (None: of the source), from a callback."""
    put_all(SOURCE if name is None else f"where_{name}", list(kept))
    put_all(NO_SOURCE if name is None else f"not_{name}", list(left_out))


def put_span(name: str, bounds: tuple[float, float] | None) -> None:
    """Change the range of a field's numbers, from a callback; None lets all through."""
    put(f"range_{name}", None if bounds is None else f"{bounds[0]!r}..{bounds[1]!r}")


def forget(key: str) -> None:
    """Take one of these parameters out of the URL, from a callback."""
    if key.startswith("range_"):
        put(key, None)
    else:
        put_all(key, ())
