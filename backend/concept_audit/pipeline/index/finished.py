"""The finished index of an audit: whether there is one, and whether it serves."""

from __future__ import annotations

from typing import Any

from concept_audit.errors import ConceptError, StoreError
from concept_audit.pipeline.index.codes import CODING
from concept_audit.pipeline.sources import Sources
from concept_audit.store.index import present_index

NORMS = "squares of each block"
"""What an index says of the norms of its rows' gradients; earlier ones had a single estimate over all blocks."""


def open_index(sources: Sources, reach: int | None = None, norms: bool = False) -> dict[str, Any]:
    """The description of a finished index that fits the audit.

    Args:
        reach: the deepest block that a query depends on; None for any.
        norms: the norms of the rows' gradients are needed.

    Raises:
        StoreError: there is none, it is of another model or data set or of an earlier version, or it lacks the norms.
        ConceptError: the query reaches deeper than the index.
    """
    root = sources.layout.root
    files = present_index(sources.layout, sources.shards("tokens").partition)
    found = files and files.describe()
    if not found or not found.get("done"):
        raise StoreError(f"{root}: no gradient index yet; make one with `concept-audit index {root}`")
    for name, wanted in sources.identity.items():
        if found.get(name) != wanted:
            raise StoreError(
                f"{root}: the gradient index is of another {name} ({found.get(name)}, the audit has {wanted}); "
                f"build it again with `concept-audit index {root}`"
            )
    if found.get("coding") != CODING:
        raise StoreError(
            f"{root}: the gradient index is of an earlier version, which coded the numbers of rows otherwise; build it "
            f"again with `concept-audit index {root} --replace`, or rank with --exact"
        )
    if norms and found.get("norms") != NORMS:
        raise StoreError(
            f"{root}: the gradient index is of an earlier version, which did not keep the norms of gradients by block, "
            f"so it does not serve --unit-normalised; build it again with `concept-audit index {root}`, or rank with "
            "--exact"
        )
    if reach is not None and reach > found["blocks"][1]:
        raise ConceptError(
            f"a concept at layer {reach} is deeper than the gradient index, which ends with block "
            f"{found['blocks'][1]}; extend it with `concept-audit index {root} --layers {reach}`, or rank with "
            "--exact"
        )
    first = min(found.get("chosen", {"": 1}).values())
    if reach is not None and reach < first:
        raise ConceptError(
            f"the gradient index keeps no layer that a concept at layer {reach} depends on (the first is in block "
            f"{first}); build it again with `concept-audit index {root} --layers {reach} --replace`, or rank with --exact"
        )
    return found
