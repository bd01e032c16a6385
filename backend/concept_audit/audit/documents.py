"""Documents that were split into windows: by their influence on a concept, and flagged as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from concept_audit.audit.flags import Flags
from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.audit.rankings import Rankings
from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.pipeline.methods import NEED_GRADIENTS
from concept_audit.store import documents as store_documents
from concept_audit.store.cursor import Cursor
from concept_audit.store.documents import Order, Weight
from concept_audit.store.filters import RowFilter
from concept_audit.store.flags import FlagChange
from concept_audit.types import Window

SHOWN = 10
"""Numbers of documents that a message and the log tell."""


class Documents:
    """Documents, each of which is one or more rows: its windows. Their numbers are those of the data's rows, from 0."""

    def __init__(self, opened: OpenAudit, rankings: Rankings, flags: Flags):
        self._opened = opened
        self._rankings = rankings
        self._flags = flags

    @property
    def split(self) -> bool:
        """Whether the audit was built with documents split."""
        return self._opened.made.document is not None

    def rank(
        self,
        concept: str,
        method: str | None = None,
        top: int | None = None,
        by: Order = "mean",
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """Documents by influence on a concept. Their score is the mean of their windows', weighted by tokens.

        Of scores that are means over tokens, and of influence, it is that of the document's mean loss; see
        `concept_audit.store.documents`. A passage weighs by its share of a document: the strongest window says what
        the mean may hide.

        Args:
            by: ``mean`` for the score, ``strongest`` for that of the strongest window.
            options: as for `Rankings.rank`.

        Returns:
            rank, document, score, windows, strongest_window (its number, from 1), strongest_example_id,
            strongest_score, flagged (windows with a flag other than keep), exact, source, source_row. Documents
            without a window that has a score are missing.

        Raises:
            ConceptError: documents were not split, or scores are divided by the norm of each window's gradient.
        """
        self._require()
        if options.scoring.unit_normalised:
            raise ConceptError(
                "--unit-normalised: not of documents, whose gradient is no mean of their windows' gradients of unit "
                "length; leave it out, or rank the windows"
            )
        chosen = self._rankings.find(concept, method, options).identity.method
        weight: Weight = (
            "content" if chosen == "feature_activation" else "predicted" if chosen in NEED_GRADIENTS else "response"
        )

        def read(ranking: int) -> pd.DataFrame:
            key = ("documents", ranking, weight, by, top)
            return self._rankings.read(
                key, [ranking], lambda cursor: store_documents.documents(cursor, ranking, weight, by, top)
            )

        return self._rankings.using([(concept, method, options)], read)

    def windows(self, documents: Sequence[int]) -> list[int]:
        """The rows that documents are, by example id, in the order of the data.

        Raises:
            ConceptError: documents were not split.
            StoreError: there is no document of one of the numbers.
        """
        self._require()

        def look(cursor: Cursor) -> tuple[list[int], list[int]]:
            return store_documents.windows_of(cursor, documents), store_documents.unknown(cursor, documents)

        found, unknown = self._opened.read(look)
        if unknown:
            raise StoreError(f"no document {_listed(unknown)} in this audit; `rank --by document` tells the numbers")
        return found

    def places(self, example_ids: Sequence[int]) -> dict[int, Window]:
        """Where rows lie in their documents, by example id; empty where documents were not split."""
        if not self.split:
            return {}
        return self._opened.read(lambda cursor: store_documents.places_in_documents(cursor, example_ids))

    def number_of(self, example_ids: Sequence[int]) -> int:
        """How many documents rows are parts of; 0 where documents were not split."""
        if not self.split:
            return 0
        return self._opened.read(lambda cursor: store_documents.number_of(cursor, example_ids))

    def flag(
        self, documents: Sequence[int], flag: str | None = "remove", note: str | None = None, by: str = ""
    ) -> FlagChange:
        """Flag all windows of documents, or take their flags off where `flag` is None: one change in the log.

        Args:
            note: as in `Flags.set`.

        Raises:
            ConceptError, StoreError: as `windows`.
        """
        where = RowFilter(example_ids=tuple(self.windows(documents)))
        how = f"all windows of document {_listed(documents)}"
        return self._flags.set_matching(where, flag, note=note, by=by, how=how)

    def counts(self) -> dict[str, int] | None:
        """How many documents were split, and into how many windows (documents, windows); None if none were to be."""
        return self._opened.read(store_documents.counts) if self.split else None

    def _require(self) -> None:
        if not self.split:
            raise ConceptError(
                f"{self._opened.name}: its rows are no documents that were split; build an audit with "
                "--long-documents split"
            )


def _listed(numbers: Sequence[int]) -> str:
    """Numbers as a message shows them."""
    rest = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
    return ", ".join(map(str, numbers[:SHOWN])) + rest
