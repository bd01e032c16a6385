"""The gradient index, from which a new concept's influence comes in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from concept_audit.audit.opened import OpenAudit
from concept_audit.errors import StoreError
from concept_audit.influence.options import IndexOptions
from concept_audit.model.load import find_device
from concept_audit.model.memory import SHARE, free_bytes
from concept_audit.pipeline.index.build import build_index
from concept_audit.pipeline.index.finished import open_index
from concept_audit.pipeline.index.query import warm_index
from concept_audit.progress import Progress
from concept_audit.store.index import present_index


class Index:
    """The gradient index of an audit, if it has one."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened

    def build(
        self,
        options: IndexOptions | None = None,
        progress: Progress | None = None,
        replace: bool = False,
        answering: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Build the index, or what is missing of it; see `IndexOptions`.

        Args:
            replace: a finished index that was made with other options goes.
            answering: called as soon as it answers, before its agreement with exact scores is measured.

        Returns:
            its description, with the fidelity that was found.

        Raises:
            StoreError: another process is building it, or there is a finished one that is not to be replaced.
        """
        reported = progress or self._opened.progress
        return build_index(self._opened.sources(), options or IndexOptions(), reported, replace, answering)

    def describe(self) -> dict[str, Any] | None:
        """Its description, if there is one that fits this audit."""
        return self._opened.remembered("index", self._describe)

    def holdings(self) -> str | None:
        """What it keeps of each row, in words; None where there is no index."""
        about = self.describe()
        return index_in_words(about) if about else None

    def agreement(self) -> str | None:
        """How well it agrees with exact scores, and what that was measured on, in words; None if there is none."""
        about = self.describe()
        return agreement_in_words(about.get("fidelity")) if about else None

    def progress(self) -> dict[str, Any] | None:
        """How far the building is: stage, state, detail, share, seconds_left; None if none is being built."""
        files = present_index(self._opened.layout, self._opened.made.shards(self._opened.layout, "tokens").partition)
        return files.reported() if files else None

    def warm(self) -> None:
        """Load what a new concept's influence needs, so that the first one is as fast as the next."""
        about = self.describe()
        if about is not None:
            warm_index(self._opened.sources(), about)

    def at_hand(self) -> bool:
        """Whether there is an index, and its model is in memory or may be loaded without being asked for.

        It may where its files are on this machine and it takes little of what is free where it runs.
        """
        about = self.describe()
        if about is None or self._opened.model_loaded:
            return about is not None
        # Indexes of earlier versions do not tell.
        needs = about.get("model_bytes")
        if needs is None or not self._opened.model_here:
            return False
        return needs <= SHARE * free_bytes(find_device(self._opened.device.name))

    def _describe(self) -> dict[str, Any] | None:
        try:
            return open_index(self._opened.sources())
        except StoreError:
            return None


def index_in_words(about: Mapping[str, Any]) -> str:
    """What an index keeps of each row."""
    layers = f"{len(about['chosen'])} of {about['tracked']} layers, " if len(about.get("chosen", ())) else ""
    blocks = f"blocks 1 to {about['blocks'][1]}"
    return f"{about['row_bytes'] / 1024:.3g} KiB a row, {layers}{blocks}"


def agreement_in_words(fidelity: Mapping[str, Any] | None) -> str:
    """A sentence on the agreement of an index with exact scores: its figures, on which rows, with which concepts.

    Args:
        fidelity: as the index describes it; None where measuring it was cut short.
    """
    if fidelity is None:
        return (
            "Its agreement with exact scores is not measured yet: `concept-audit index` with the same options does so."
        )
    if not fidelity["concepts"]:
        return (
            "Its agreement with exact scores was not measured: too few rows differ for any to be held out of what its "
            "projection learns from."
        )
    if "held_out" not in fidelity:
        rows = f"{fidelity['rows']} rows that its projection may have learned from (an earlier version measured it)"
        concepts, precision = f"{fidelity['concepts']} directions drawn at random", ""
    else:
        rows = f"{fidelity['rows']} rows that the projection has not learned from, though the curvature may have"
        kinds = {
            "SAE directions": fidelity["sae_directions"],
            "differences of row means": fidelity["row_mean_differences"],
        }
        concepts = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        precision = f" in {fidelity['precision']}"
    return (
        f"Against exact scores{precision} of {rows}, for {concepts}: Spearman's rank correlation {fidelity['spearman']:.2f} (least "
        f"{fidelity['spearman_least']:.2f}), {fidelity['overlap']:.0%} of the top {fidelity['top']} the same (least "
        f"{fidelity['overlap_least']:.0%})."
    )
