"""A model, data and labelled examples so small that every command ends within seconds, and what an audit holds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import duckdb

from tests.conftest import chat_rows, sentence, small_model, small_tokenizer, write_jsonl

BUILD = ("--layers", "1,2", "--sae-features", "2", "--sae-k", "4", "--sae-epochs", "1", "--device", "cpu")


@dataclass(frozen=True)
class Material:
    """Where it lies."""

    model: Path
    data: Path
    examples: Path

    def build(self, out: Path, *more: str) -> list[str]:
        """The command that makes an audit."""
        return ["build", "--data", str(self.data), "--model", str(self.model), "--out", str(out), *BUILD, *more]


def make(place: Path, rows: int = 280) -> Material:
    """Write it; 280 rows are two shards."""
    place.mkdir(parents=True, exist_ok=True)
    small_model("llama").save_pretrained(place / "model")
    small_tokenizer().save_pretrained(place / "model")
    data = write_jsonl(place / "rows.jsonl", chat_rows(rows))
    return Material(place / "model", data, write_jsonl(place / "labelled.jsonl", labelled(20)))


def labelled(count: int) -> list[dict]:
    """Rows for a probe: half of them talk of risk."""
    rng = random.Random(1)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, 6)},
                {"role": "assistant", "content": sentence(rng, 8) + (" Risk risk money." if i % 2 else " Safe plan.")},
            ],
            "label": i % 2,
        }
        for i in range(count)
    ]


BUILT = "SELECT table_name FROM duckdb_tables() WHERE database_name = 'audit' AND schema_name = 'base' ORDER BY 1"
KEPT = {
    # A training that ended in the moment before the kill is there twice: what it found counts, not its number.
    "probes": "SELECT name, layer, fit, direction, details FROM workspace.base.probes",
    "labels": "SELECT probe, content_hash, messages, label FROM workspace.base.probe_examples",
    "flags": "SELECT content_hash, flag, note, flagged_by FROM workspace.base.flags",
    "flag log": "SELECT event_id, action, note, n_texts, undoes, made_by FROM workspace.base.flag_log",
    "changes": "SELECT event_id, content_hash, before.flag, after.flag FROM workspace.base.flag_changes",
    "views": "SELECT name, page, query FROM workspace.base.saved_views",
    "feature labels": "SELECT feature_id, label FROM workspace.base.feature_labels",
    "evidence": """SELECT r.* EXCLUDE (evidence_id) FROM workspace.base.evidence_results r
        SEMI JOIN (SELECT evidence_id FROM workspace.base.evidence ORDER BY number DESC LIMIT 1) USING (evidence_id)""",
    "rankings": """SELECT concept_id, method, example_id, score, rank, percentile FROM derived.base.ranking_scores
        JOIN (SELECT max(ranking_id) AS ranking_id, concept_id, method FROM derived.base.rankings
              GROUP BY concept_id, method) USING (ranking_id)""",
}
"""What people did, and what was computed on demand: name → the rows of it that a second run must give again."""


def contents(root: Path) -> dict[str, list[tuple]]:
    """All that an audit's databases hold, but for times and numbers of trainings."""
    con = duckdb.connect()
    found: dict[str, list[tuple]] = {}
    con.execute(f"ATTACH '{root / 'audit.duckdb'}' AS audit (READ_ONLY)")
    for (table,) in con.execute(BUILT).fetchall():
        found[f"audit: {table}"] = con.execute(f"FROM audit.base.{table} ORDER BY ALL").fetchall()
    for name in ("workspace", "derived"):
        if (root / f"{name}.duckdb").exists():
            con.execute(f"ATTACH '{root / f'{name}.duckdb'}' AS {name}")
    there = {name for (name,) in con.execute("SELECT database_name FROM duckdb_databases()").fetchall()}
    for name, query in KEPT.items():
        if ("derived" if name == "rankings" else "workspace") in there:
            found[name] = sorted(con.execute(query).fetchall(), key=repr)
    con.close()
    return found


def differing(one: dict[str, list[tuple]], other: dict[str, list[tuple]]) -> list[str]:
    """What is not the same in both; what one has nothing of may be absent from the other."""
    return [name for name in sorted({*one, *other}) if one.get(name, []) != other.get(name, [])]


def acknowledged(path: Path) -> list[dict]:
    """What a process wrote down as done, one JSON line each; a line that was cut off was not written down."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
