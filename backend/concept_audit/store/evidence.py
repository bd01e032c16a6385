"""Counterfactual evidence: units of work on disk, and what came of them in the workspace.

A unit is one fine-tuning run with its measurements, or a list of scores, whole or absent::

    shards/evidence/units/<key>.json          what was measured, with all that the key is a hash of
    shards/evidence/shared/<key>.safetensors  what the runs of a validation under way train and measure on
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from concept_audit.errors import ConceptError
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.filters import json_pointer
from concept_audit.store.layout import Layout
from concept_audit.store.partition import ListedPartition
from concept_audit.store.shard_store import ShardSet

EVIDENCE_TABLES = """
CREATE TABLE base.evidence (
    evidence_id VARCHAR PRIMARY KEY, build_id VARCHAR NOT NULL, concept_id VARCHAR NOT NULL,
    version INTEGER NOT NULL, number INTEGER NOT NULL, about JSON NOT NULL);
CREATE TABLE base.evidence_runs (
    evidence_id VARCHAR NOT NULL, kind VARCHAR NOT NULL, method VARCHAR NOT NULL, share DOUBLE NOT NULL,
    number INTEGER NOT NULL, seed INTEGER NOT NULL, n_rows INTEGER NOT NULL, own DOUBLE, text DOUBLE,
    shown DOUBLE, preference DOUBLE, loss DOUBLE, judge DOUBLE);
CREATE TABLE base.evidence_results (
    evidence_id VARCHAR NOT NULL, measure VARCHAR NOT NULL, quantity VARCHAR NOT NULL, method VARCHAR NOT NULL,
    other VARCHAR NOT NULL, share DOUBLE NOT NULL, estimate DOUBLE, low DOUBLE, high DOUBLE, p DOUBLE,
    n INTEGER NOT NULL);
CREATE TABLE base.evidence_scores (
    evidence_id VARCHAR NOT NULL, method VARCHAR NOT NULL, example_id BIGINT NOT NULL, score DOUBLE,
    label TINYINT, percentile_low DOUBLE, percentile_high DOUBLE);
"""
EVERY_CONCEPT = ""
"""The concept of evidence that is about all of them: forecasts."""
RUN_COLUMNS = [
    "kind",
    "method",
    "share",
    "number",
    "seed",
    "n_rows",
    "own",
    "text",
    "shown",
    "preference",
    "loss",
    "judge",
]
RESULT_COLUMNS = ["measure", "quantity", "method", "other", "share", "estimate", "low", "high", "p", "n"]
SCORE_COLUMNS = ["method", "example_id", "score", "label", "percentile_low", "percentile_high"]
_PARTS = {"evidence_runs": RUN_COLUMNS, "evidence_results": RESULT_COLUMNS, "evidence_scores": SCORE_COLUMNS}


@dataclass(frozen=True)
class Evidence:
    """What one validation found.

    Attributes:
        evidence_id: a hash of all that it depends on.
        concept_id: of the concept that it is about; `EVERY_CONCEPT` for a forecast.
        about: concept, model, data, recipe and options, JSON values.
        runs: one line for each run: `RUN_COLUMNS`. ``kind`` is ``base`` (not trained), ``whole``, ``removal``,
            ``swap``, ``rewrite``, ``retention``, ``steer`` (whose ``share`` is a strength) or ``subset``, of a
            forecast ``lora`` or ``all``; ``own``, ``text``, ``shown``,
            ``preference``, ``loss``, ``judge`` are means over the held-out prompts or rows; see `concept_audit.evidence.measures.Measured`.
        results: one line for each finding: `RESULT_COLUMNS`.
        scores: one line for each method and row: `SCORE_COLUMNS`.
    """

    evidence_id: str
    concept_id: str
    about: Mapping[str, Any]
    runs: pd.DataFrame
    results: pd.DataFrame
    scores: pd.DataFrame


def unit_path(layout: Layout, key: str) -> Path:
    """Where a unit of work is kept."""
    return layout.shards.path("evidence", "units", f"{key}.json")


@dataclass(frozen=True)
class Units(ShardSet):
    """Units of work that any process may do, as the shards of a stage: one file each, whole or absent.

    Attributes:
        names: of the units, in the order of their numbers.
    """

    names: tuple[str, ...] = ()

    def path(self, number: int) -> Path:
        return self.file(f"{self.names[number]}.json")

    def missing(self) -> list[int]:
        """Those that have not been done.

        Raises:
            StoreError: one is damaged.
        """
        return [n for n in range(len(self.names)) if self.store.read_json(self.path(n)) is None]

    def confirm(self, number: int) -> None:
        if self.store.read_json(self.path(number)) is None:
            raise self._lost([number])

    def write(self, number: int, values: Mapping[str, Any]) -> None:
        """Keep a finished unit."""
        self.store.write_json(self.path(number), values)


def units_of(layout: Layout, names: tuple[str, ...]) -> Units:
    """Units by their names, which tell what they depend on."""
    return Units(layout.shards, "evidence", "units", ListedPartition((1,) * len(names)), names=names)


def write_unit(layout: Layout, key: str, values: Mapping[str, Any]) -> None:
    """Keep a finished unit, whole or not at all."""
    layout.shards.write_json(unit_path(layout, key), values)


def read_unit(layout: Layout, key: str) -> dict[str, Any] | None:
    """A finished unit; None if it has not been done.

    Raises:
        StoreError: the file is damaged.
    """
    return layout.shards.read_json(unit_path(layout, key))


def save_evidence(cursor: Cursor, build: str, version: int, evidence: Evidence) -> None:
    """Keep what a validation found; an earlier one with the same identity is replaced."""
    for table in ("evidence", *_PARTS):
        cursor.execute(f"DELETE FROM base.{table} WHERE evidence_id = ?", [evidence.evidence_id])
    (number,) = only_row(cursor.execute("SELECT coalesce(max(number), 0) + 1 FROM base.evidence"))
    cursor.execute(
        "INSERT INTO base.evidence VALUES (?, ?, ?, ?, ?, ?)",
        [
            evidence.evidence_id,
            build,
            evidence.concept_id,
            version,
            number,
            json.dumps(dict(evidence.about), ensure_ascii=False),
        ],
    )
    for table, frame in (
        ("evidence_runs", evidence.runs),
        ("evidence_results", evidence.results),
        ("evidence_scores", evidence.scores),
    ):
        columns = _PARTS[table]
        if len(frame):
            raw = pa.Table.from_pandas(frame[columns], preserve_index=False)  # noqa: F841 - found by name
            cursor.execute(
                f"INSERT INTO base.{table} (evidence_id, {', '.join(columns)}) SELECT ?, {', '.join(columns)} FROM raw",
                [evidence.evidence_id],
            )


def list_evidence(cursor: Cursor) -> pd.DataFrame:
    """The validations that are kept, latest first: evidence_id, concept_id, version, number, rows, seeds, current.

    ``rows`` is how many the runs draw from, ``seeds`` how many runs there are of a kind; ``current`` tells whether the
    concept and the data are still those that it is about.
    """
    return cursor.execute(
        """SELECT e.evidence_id, e.concept_id, e.version, e.number,
                  (e.about ->> 'n_pool')::INTEGER AS rows, (e.about ->> 'seeds')::INTEGER AS seeds,
                  coalesce(c.version = e.version, false) AND e.build_id =
                  (SELECT value FROM audit.base.meta WHERE key = 'build_id') AS current
           FROM base.evidence e LEFT JOIN main.concepts c USING (concept_id) WHERE e.concept_id <> ?
           ORDER BY e.number DESC""",
        [EVERY_CONCEPT],
    ).df()


def list_forecast_evidence(cursor: Cursor) -> pd.DataFrame:
    """Forecasts held against training runs that are kept, latest first: evidence_id, number, current.

    ``current`` tells whether the data and the SAE are still those that it is about.
    """
    return cursor.execute(
        """SELECT evidence_id, number,
                  build_id = (SELECT value FROM audit.base.meta WHERE key = 'build_id') AS current
           FROM base.evidence WHERE concept_id = ? ORDER BY number DESC""",
        [EVERY_CONCEPT],
    ).df()


def read_evidence(cursor: Cursor, evidence_id: str) -> Evidence:
    """A validation by its id.

    Raises:
        ConceptError: there is none.
    """
    found = cursor.execute(
        "SELECT concept_id, about FROM base.evidence WHERE evidence_id = ?", [evidence_id]
    ).fetchone()
    if found is None:
        raise ConceptError(f"no evidence {evidence_id!r} in this audit; make some with `concept-audit validate`")
    runs, results, scores = (
        cursor.execute(
            f"SELECT {', '.join(columns)} FROM base.{table} WHERE evidence_id = ? ORDER BY rowid", [evidence_id]
        ).df()
        for table, columns in _PARTS.items()
    )
    return Evidence(evidence_id, found[0], json.loads(found[1]), runs, results, scores)


def metadata_values(cursor: Cursor, field: str) -> list[str | None]:
    """A metadata field of every row as text, in the order of their ids.

    Raises:
        ConceptError: no such field.
    """
    known = [name for (name,) in cursor.execute("SELECT field FROM audit.base.metadata_fields").fetchall()]
    if field not in known:
        raise ConceptError(f"no metadata field {field!r}; there are {', '.join(sorted(known)) or 'none'}")
    found = cursor.execute(
        "SELECT json_extract_string(metadata, ?) FROM main.examples ORDER BY example_id", [json_pointer(field)]
    ).fetchall()
    return [value for (value,) in found]


def ranking_scores(cursor: Cursor, ranking: int, n_rows: int) -> np.ndarray:
    """The scores of a ranking: float64 [rows], NaN where a row has none."""
    scores = np.full(n_rows, np.nan)
    found = cursor.execute(
        "SELECT example_id, score FROM main.ranking_scores WHERE ranking_id = ?", [ranking]
    ).fetchnumpy()
    scores[np.asarray(found["example_id"])] = np.asarray(found["score"])
    return scores
