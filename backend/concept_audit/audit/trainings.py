"""What training a probe again has changed: the rows that entered, and left, the first of its ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.audit.probes import Probes
from concept_audit.metrics import ranks_and_percentiles
from concept_audit.pipeline.rank import request, scores_of
from concept_audit.store import queries
from concept_audit.store.filters import RowFilter
from concept_audit.store.workspace import SavedProbe
from concept_audit.types import Concept

TOP = 20


@dataclass(frozen=True)
class TopChange:
    """How the first rows of a probe's ranking differ from those of its training before.

    Attributes:
        before, now: versions of the probe.
        top: how many rows are first.
        entered, left: rank (now), before (rank then), then the columns of the row; those that came highest, or were
            highest, first.
    """

    before: int
    now: int
    top: int
    entered: pd.DataFrame
    left: pd.DataFrame


class Trainings:
    """The trainings of probes, held against each other."""

    def __init__(self, opened: OpenAudit, probes: Probes):
        self._opened = opened
        self._probes = probes

    def change(self, name: str, top: int = TOP) -> TopChange | None:
        """What the latest training of a probe has changed in its vector-filter ranking; None if it is the first one.

        Both rankings are taken anew from the activations that the audit keeps: nothing of the earlier one is stored.
        """
        now, earlier = self._probes.find(name), self._probes.versions(name)
        if now is None or not earlier:
            return None
        key = ("top change", name, now.version, earlier[0].version, top)
        found = self._opened.remembered(key, lambda: (self._ranks(now), self._ranks(earlier[0])), of_build=True)
        ranks, before = found
        inside, once = ranks <= top, before <= top
        entered, left = np.flatnonzero(inside & ~once), np.flatnonzero(once & ~inside)
        return TopChange(
            before=earlier[0].version,
            now=now.version,
            top=top,
            entered=self._rows(entered[np.argsort(ranks[entered])], ranks, before),
            left=self._rows(left[np.argsort(before[left])], ranks, before),
        )

    def _ranks(self, probe: SavedProbe) -> np.ndarray:
        """The rank of every row by one training: int64 [rows]; beyond the last for rows without a score."""
        concept = Concept(f"probe:{probe.name}", probe.name, "probe", probe.layer, probe.direction, probe.version)
        sources = self._opened.sources()
        wanted = request(sources, concept, "vector_filter", DEFAULTS)
        scores = scores_of(sources, wanted, 0, self._opened.progress)
        order, _ = ranks_and_percentiles(scores)
        ranks = np.full(len(scores), len(scores) + 1, np.int64)
        ranks[order] = np.arange(1, len(order) + 1)
        return ranks

    def _rows(self, ids: Sequence[int] | np.ndarray, ranks: np.ndarray, before: np.ndarray) -> pd.DataFrame:
        wanted = [int(i) for i in ids]
        where = RowFilter(example_ids=tuple(wanted))
        table = self._opened.read(lambda cursor: queries.rows(cursor, None, where)).set_index("example_id")
        table = table.loc[wanted].reset_index()
        table.insert(0, "rank", ranks[wanted])
        table.insert(1, "before", before[wanted])
        return table
