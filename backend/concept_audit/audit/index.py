"""The gradient index, from which a new concept's influence comes in seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from concept_audit.audit.opened import OpenAudit
from concept_audit.errors import StoreError
from concept_audit.pipeline.index import IndexOptions, build_index, open_index, warm_index
from concept_audit.progress import Progress
from concept_audit.store.index import index_files

STALE_SECONDS = 120.0


class Index:
    """The gradient index of an audit, if it has one."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened

    def build(
        self, options: IndexOptions | None = None, layers: Sequence[int] | None = None, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Build the index, or what is missing of it; see `IndexOptions`.

        Args:
            layers: where concepts may live; None for the layers that the audit keeps.

        Returns:
            its description, with the fidelity that was found.
        """
        lm = self._opened.model()
        chosen = tuple(layers) if layers else self._opened.layers
        lm.check_layers(chosen)
        data = self._opened.manifest.stages["read"]["key"]
        told = progress or self._opened.progress
        return build_index(self._opened.layout, lm, data, chosen, options or IndexOptions(), told)

    def describe(self) -> dict[str, Any] | None:
        """Its description, if there is one that fits this audit."""
        return self._opened.remembered("index", self._describe)

    def progress(self) -> dict[str, Any] | None:
        """How far the building is: stage, share, seconds_left; None if none is being built."""
        told = index_files(self._opened.layout).reported()
        # A process that was killed leaves its last report behind.
        return told if told and time.time() - told["at"] < STALE_SECONDS else None

    def warm(self) -> None:
        """Load what a new concept's influence needs, so that the first one is as fast as the next."""
        about = self.describe()
        if about is not None:
            warm_index(self._opened.layout, self._opened.model(), about)

    def _describe(self) -> dict[str, Any] | None:
        manifest = self._opened.made
        try:
            return open_index(self._opened.layout, manifest.fingerprints["model"], manifest.stages["read"]["key"])
        except StoreError:
            return None
