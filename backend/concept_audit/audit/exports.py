"""Taking rows away: a view, the flagged rows, or the data without them, with a note of how they came about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import numpy as np
import pandas as pd

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.metadata import decoded_metadata
from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit, user_name
from concept_audit.audit.probes import Probes
from concept_audit.audit.rankings import RANK_COLUMNS, Rankings
from concept_audit.audit.rows import Rows
from concept_audit.data.copying import Swap, copier, places
from concept_audit.data.document_rows import KeptWindows
from concept_audit.data.list_rows import kept_responses, only
from concept_audit.data.read import fingerprint, raw_rows
from concept_audit.data.write import Format, Record, fill_file, fill_standard_output, write_columns, write_records
from concept_audit.errors import AuditError, StoreError
from concept_audit.files import atomic_write
from concept_audit.influence.options import InfluenceOptions
from concept_audit.store import queries
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import require_rankings
from concept_audit.store.documents import all_places
from concept_audit.store.filters import RowFilter
from concept_audit.store.manifest import Manifest
from concept_audit.store.skipped import skipped_rows

Schema = Literal["own", "audit"]
EXPORT_COLUMNS = ["example_id", "flag", "note", "prompt", "response", "source", "source_row", "content_hash"]
SCORE_COLUMNS = ["rank", "score", "percentile"]
ROWS_AT_ONCE = 512
SWAP = "swap"
"""The flag of preference pairs whose sides are to be exchanged."""
RANKED_AT_ONCE = 16_384
"""Rows of a ranking lie all over the data: to look up a few takes as long as to look up many."""


@dataclass(frozen=True)
class _State:
    """What is exported, as it was at one moment.

    Attributes:
        build: of the store.
        rows: example_id, flag, note; with a ranking rank, score, percentile.
        places: int64 [rows], their numbers in the data.
        flags: who had flagged how many rows as what.
        windows: where they lie in their documents, where these were split; else None.
    """

    build: str
    rows: pd.DataFrame
    places: np.ndarray
    flags: list[dict[str, Any]]
    windows: KeptWindows | None = None


class Exports:
    """Rows to take away."""

    def __init__(self, opened: OpenAudit, concepts: Concepts, probes: Probes, rankings: Rankings, rows: Rows):
        self._opened = opened
        self._concepts = concepts
        self._probes = probes
        self._rankings = rankings
        self._rows = rows

    def write(
        self,
        out: Path | None,
        format: Format = "csv",
        where: RowFilter = EVERY_ROW,
        schema: Schema = "audit",
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        exact: bool = False,
        by: str = "",
        swap: bool = False,
        whole_documents: bool = False,
    ) -> dict[str, Any]:
        """Write the rows that pass a filter: by rank where a concept ranks them, else in the order of the data.

        File, count, manifest and checksum are of one state: which rows pass, and how they are flagged, is
        looked up once, at the beginning.

        Args:
            out: a file, beside which ``FILE.manifest.json`` is written; None for standard output.
            schema: ``own``, the columns of the input as they were, or ``audit``, with prompt, response, flag
                and the metadata fields. Rows of their own that stay what they were, JSON lines or Parquet, are
                copied byte for byte, or type for type.
            concept: puts the rank, score and percentile of its ranking beside each row; in the input's own schema
                as ``audit_…``, and there the order stays that of the data, which are read once from begin to end.
            exact: CSV that reads back as it was, as the input's own columns always do; otherwise cells that a
                spreadsheet would take for a formula begin with an apostrophe.
            swap: preference pairs flagged ``swap`` have their sides exchanged (in the input's own columns).
            whole_documents: leave out the windows of documents of which not every one passes.

        Returns:
            the manifest: what the rows are and how they came about.

        Raises:
            StoreError: the input has changed or is gone (for its own schema), the audit was built anew
                meanwhile, or the disk is full.
        """
        ranking = self._rankings.ensure(concept, method, options) if concept else None
        own = schema == "own"
        if own:
            self.check_input()
        if swap and not (own and self._opened.manifest.pair):
            raise StoreError(
                "sides can be exchanged of preference pairs alone, in the input's own columns (--schema own)"
            )
        exact = exact or own
        if whole_documents and self._opened.manifest.document is None:
            raise StoreError("--whole-documents: no documents were split in this audit; leave it out")
        state = self._state(where, ranking, not own, whole_documents)
        about = self._manifest(where, format, schema, concept, method, options, exact, by) | {"flags": state.flags}
        if state.windows is not None:
            about["documents"], about["whole_documents"] = len(np.unique(state.windows.document)), whole_documents
        exchanged = self._swap(state) if swap else None
        if exchanged is not None:
            about["sides_exchanged"] = len(exchanged.rows)
        fill = self._fill(state, format, own, exact, exchanged)
        if out is None:
            about["rows"] = fill_standard_output(fill, format)
        else:
            about["rows"], about["sha256"] = fill_file(fill, out)
        if about["rows"] != len(state.rows):
            raise StoreError(
                f"{about['rows']:,} of {len(state.rows):,} rows were found again in the input, which has changed "
                "meanwhile; export again"
            )
        if out is not None:
            about["file"] = out.name
            with atomic_write(out.with_name(out.name + ".manifest.json")) as partial:
                partial.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return about

    def ranked(
        self,
        out: Path | None,
        concept: str,
        method: str | None = None,
        format: Format = "csv",
        top: int | None = None,
        options: InfluenceOptions = DEFAULTS,
    ) -> tuple[int, int]:
        """Write rows by their influence on a concept, rank 1 first.

        Rows are looked up `RANKED_AT_ONCE` at a time and written as they come, so memory does not grow with them, and
        nobody who writes to the audit waits for more than that.

        Args:
            out: a file; None for standard output.
            top: only the first so many.

        Returns:
            how many rows were written, and how many the ranking has. They have the columns of `Rankings.table`, and
            one for each metadata field of the data.

        Raises:
            StoreError: the disk is full, or the ranking was thrown away meanwhile.
        """
        ranking = self._rankings.ensure(concept, method, options)
        every = int(self._rankings.summary(concept, method, options)["count"])
        ends = self._rankings.last_columns()
        names = self._field_names([*RANK_COLUMNS, *ends])
        last = every if top is None else min(top, every)

        def records() -> Iterator[Record]:
            for first in range(1, last + 1, RANKED_AT_ONCE):
                ranked = self._ranked(ranking, range(first, min(first + RANKED_AT_ONCE, last + 1)))
                frame = self._rankings.in_groups(ranking, ranked)
                metadata = decoded_metadata(frame)
                for known, more in zip(_dicts(frame.drop(columns="metadata")), metadata, strict=True):
                    end = {name: known.pop(name) for name in ends}
                    yield known | {name: more.get(field) for field, name in names.items()} | end

        def fill(file: BinaryIO) -> int:
            return write_columns(records, format, file, [*RANK_COLUMNS, *names.values(), *ends])

        return (fill_standard_output(fill, format) if out is None else fill_file(fill, out)[0]), every

    def rows_of(
        self,
        where: RowFilter = EVERY_ROW,
        concept: str | None = None,
        method: str | None = None,
        options: InfluenceOptions = DEFAULTS,
        whole_documents: bool = False,
    ) -> list[int]:
        """The numbers of the rows that `write` would write in the audit's columns, in its order."""
        ranking = self._rankings.ensure(concept, method, options) if concept else None
        return self._state(where, ranking, True, whole_documents).rows["example_id"].tolist()

    def to_bytes(self, format: Format = "csv", name: str | None = None, **how: Any) -> tuple[bytes, bytes]:
        """As `write`, for a download: the file and its manifest.

        Args:
            name: of the file, as the manifest tells it; None for the audit's.
        """
        with TemporaryDirectory() as place:
            out = Path(place) / (name or f"{self._opened.name}.{format}")
            self.write(out, format, **how)
            return out.read_bytes(), out.with_name(out.name + ".manifest.json").read_bytes()

    def _ranked(self, ranking: int, ranks: range) -> pd.DataFrame:
        def read(cursor: Cursor) -> pd.DataFrame:
            require_rankings(cursor, [ranking])
            return queries.ranked_texts(cursor, ranking, ranks)

        return self._opened.read(read)

    def _state(self, where: RowFilter, ranking: int | None, by_rank: bool, whole_documents: bool) -> _State:
        """Which rows pass now: what is looked up in one lease is of one state."""
        column = self._opened.manifest.document

        def look(cursor: Cursor) -> _State:
            rows, skipped = queries.snapshot(cursor, ranking, where, by_rank), skipped_rows(cursor)["place"]
            build, flags = queries.build_id(cursor), queries.flaggers(cursor)
            ids = rows["example_id"].to_numpy(np.int64)
            if column is None:
                return _State(build, rows, places(ids, skipped.to_numpy(np.int64)), flags)
            lie = all_places(cursor).iloc[ids]
            if whole_documents:
                whole = (lie.groupby("document")["of"].transform("size") == lie["of"]).to_numpy()
                rows, lie = rows[whole].reset_index(drop=True), lie[whole]
            kept = {str(name): lie[name].to_numpy(np.int64) for name in lie}
            return _State(build, rows, kept["document"], flags, KeptWindows(column, **kept))

        return self._opened.read(look)

    def _swap(self, state: _State) -> Swap | None:
        pair = self._opened.manifest.pair
        flagged = state.places[(state.rows["flag"] == SWAP).to_numpy()]
        return Swap(pair, frozenset(flagged.tolist())) if pair else None

    def _fill(
        self, state: _State, format: Format, own: bool, exact: bool, swap: Swap | None
    ) -> Callable[[BinaryIO], int]:
        scored = [name for name in SCORE_COLUMNS if name in state.rows]
        if own and not scored:
            made = self._opened.manifest
            copy = copier(made.configuration["data"], format, state.places, swap, _lists(made), state.windows)
            if copy is not None:
                return copy
        if own:
            return lambda out: self._write_own(state, swap, format, out, exact)
        columns = [*scored, *EXPORT_COLUMNS, *self._field_names([*scored, *EXPORT_COLUMNS]).values()]
        return lambda out: write_columns(lambda: self._records(state), format, out, columns, exact)

    def _field_names(self, columns: Sequence[str]) -> dict[str, str]:
        """Metadata field → the name of its column, beside these columns."""
        fields = self._rows.metadata_fields()["field"].tolist()
        return {field: f"metadata.{field}" if field in columns else field for field in fields}

    def _records(self, state: _State) -> Iterator[Record]:
        columns = [*(name for name in SCORE_COLUMNS if name in state.rows), *EXPORT_COLUMNS]
        names = self._field_names(columns)
        for start in range(0, len(state.rows), ROWS_AT_ONCE):
            known = state.rows.iloc[start : start + ROWS_AT_ONCE]
            frame = known.merge(self._texts(state, known["example_id"].tolist()), on="example_id")
            for row, metadata in zip(_dicts(frame[columns]), decoded_metadata(frame), strict=True):
                yield row | {name: metadata.get(field) for field, name in names.items()}

    def _texts(self, state: _State, example_ids: list[int]) -> pd.DataFrame:
        def read(cursor: Cursor) -> pd.DataFrame:
            if queries.build_id(cursor) != state.build:
                raise StoreError(f"{self._opened.name}: was built anew while it was exported; export again")
            return queries.rows_by_id(cursor, example_ids)

        return self._opened.read(read)

    def _write_own(self, state: _State, swap: Swap | None, format: Format, out: BinaryIO, exact: bool) -> int:
        lists, windows = _lists(self._opened.manifest), state.windows
        if lists is None and windows is None:
            return write_records(lambda: self._own_records(state, swap), format, out, exact)
        written: list[int] = []

        def records() -> Iterator[Record]:
            written.clear()
            several = self._own_documents(state, windows) if windows else self._own_lists(state, lists or ())
            for record, rows in several:
                written.append(rows)
                yield record

        write_records(records, format, out, exact)
        return sum(written)

    def _own_documents(self, state: _State, windows: KeptWindows) -> Iterator[tuple[Record, int]]:
        """Documents with those windows alone that are exported, and a list of each score; how many these are."""
        made = self._opened.manifest.configuration
        for _, row, kept in windows.documents(raw_rows(made["data"], made["split"])):
            part = state.rows.iloc[kept]
            yield windows.of_row(row, kept) | _listed_scores(part), len(part)

    def _own_lists(self, state: _State, lists: tuple[str, ...]) -> Iterator[tuple[Record, int]]:
        """Rows that hold several responses, with those alone that are exported, and a list of each score; how many."""
        made = self._opened.manifest.configuration
        raw = ((row, row) for row in raw_rows(made["data"], made["split"]))
        first = 0
        for row, _, kept in kept_responses(raw, lists, state.places):
            part = state.rows.iloc[first : first + len(kept)]
            first += len(kept)
            yield only(row, lists, kept) | _listed_scores(part), len(kept)

    def _own_records(self, state: _State, swap: Swap | None) -> Iterator[Record]:
        wanted = zip(state.places.tolist(), state.rows.itertuples(index=False), strict=True)
        number, row = next(wanted, (None, None))
        made = self._opened.manifest.configuration
        for place, raw in enumerate(raw_rows(made["data"], made["split"])):
            if number is None:
                return
            if place == number:
                scores = {f"audit_{name}": getattr(row, name) for name in SCORE_COLUMNS if hasattr(row, name)}
                yield (swap.swapped(raw) if swap and place in swap.rows else dict(raw)) | scores
                number, row = next(wanted, (None, None))

    def check_input(self) -> None:
        """Raise StoreError if the input is not what the audit was built from, so that its columns are gone."""
        made = self._opened.manifest
        data, split = made.configuration["data"], made.configuration["split"]
        way_out = "export with the audit's columns instead (--schema audit)"
        try:
            now = fingerprint(data, split)
        except AuditError as error:
            raise StoreError(f"the input's own columns cannot be written: {error}; or {way_out}") from error
        if now != made.fingerprints["data"]:
            raise StoreError(
                f"{data}: has changed since this audit was built, so its rows are not those that were ranked; put "
                f"the earlier data back, or {way_out}"
            )

    def _manifest(
        self,
        where: RowFilter,
        format: str,
        schema: str,
        concept: str | None,
        method: str | None,
        options: InfluenceOptions,
        exact: bool,
        by: str,
    ) -> dict[str, Any]:
        made = self._opened.manifest
        about: dict[str, Any] = {
            "audit": self._opened.name,
            "data": Path(made.configuration["data"]).name,
            "model": made.configuration["model"],
            "fingerprints": made.fingerprints,
            "versions": made.versions,
            "format": format,
            "columns": schema,
            "csv": ("exact" if exact else "safe in spreadsheets") if format == "csv" else None,
            "filters": {name: value for name, value in asdict(where).items() if value},
            "rows_in_all": self._opened.overview().n_rows,
        }
        if concept:
            found = self._concepts.get(concept)
            about["concept"] = {
                "concept_id": found.concept_id,
                "name": found.name,
                "version": found.version,
                "layer": found.layer,
            }
            ranking = self._rankings.find(concept, method, options).request
            about["method"], about["parameters"] = ranking.method, ranking.parameters
            saved = self._probes.find(found.name)
            if saved is not None and "threshold" in saved.details:
                about["concept"]["threshold"] = saved.details["threshold"]
        about["exported_by"] = by or user_name()
        about["exported_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        return about


def _lists(made: Manifest) -> tuple[str, ...] | None:
    """The columns of rows that hold several responses; None where a row is one."""
    return made.rollouts.lists if made.rollouts is not None else None


def _listed_scores(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """The scores of the rows that were read from one row."""
    return {f"audit_{name}": rows[name].tolist() for name in SCORE_COLUMNS if name in rows}


def _dicts(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in frame.to_dict("records"):
        yield {str(name): value for name, value in row.items()}
