"""The labelled examples of probes."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from concept_audit.audit.opened import OpenAudit
from concept_audit.store import workspace
from concept_audit.types import LabelledExample


class Labels:
    """What people say of examples, by the name of a probe that is trained or not yet."""

    def __init__(self, opened: OpenAudit):
        self._opened = opened

    def add(self, probe: str, examples: Sequence[LabelledExample]) -> None:
        """Keep labels for a probe; an example that has one already gets the new one."""
        name = workspace.check_probe_name(probe)
        self._opened.change(lambda cursor: workspace.label(cursor, name, examples))

    def remove(self, probe: str, content_hashes: Sequence[str] | None = None) -> None:
        """Forget labels of a probe: of these texts, or all."""
        self._opened.change(lambda cursor: workspace.unlabel(cursor, probe, content_hashes))

    def list(self, probe: str) -> Sequence[LabelledExample]:
        """The labelled examples of a probe."""
        return self._opened.cached_read(("labels", probe), lambda cursor: workspace.labels(cursor, probe))

    def counts(self) -> pd.DataFrame:
        """Probes begun or trained: probe, positives, negatives, skipped, trained."""
        return self._opened.cached_read("label_counts", workspace.label_counts)
