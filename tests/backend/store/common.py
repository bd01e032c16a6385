"""A store without a model: as many rows as a test wants, and what people did, in a moment."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np

from concept_audit.store import schema
from concept_audit.store.layout import Layout
from concept_audit.store.rankings import RankingIdentity, identify, insert_scores
from concept_audit.types import Concept

PROBE = Concept("probe:tone", "tone", "probe", 1, np.array([0.6, 0.8], np.float32), 1)
ROWS = 8


def write_audit(root: Path, rows: int = ROWS, build: str = "first") -> Layout:
    """An ``audit.duckdb`` with rows, one SAE feature and its ranking; an earlier one is replaced, as a build does."""
    layout = Layout(root)
    root.mkdir(exist_ok=True)
    partial = root / "new.duckdb"
    with duckdb.connect(str(partial), config={"storage_compatibility_version": schema.STORAGE}) as con:
        con.execute(schema.AUDIT_TABLES)
        con.execute(
            "INSERT INTO base.meta VALUES ('format', ?), ('build_id', ?), ('sae', 's')", [str(schema.FORMAT), build]
        )
        con.execute(
            """INSERT INTO base.examples SELECT i, 'h' || i, 'f', i, ? || ' prompt ' || i, 'response', 4, '{}', '[]', 2,
               false, NULL FROM range(?) t(i)""",
            [build, rows],
        )
        con.execute(
            "INSERT INTO base.sae_features VALUES (3, 'river', 0.5, 2, 1, 4, ['river'], 1, [1, 0], ['a'], ['b'], [1])"
        )
        con.execute("INSERT INTO base.rankings VALUES (33, 'sae:3', 1, 'vector_filter', '{}')")
        insert_scores(con, np.array([33]), np.arange(rows, dtype=float)[:, None])
        con.execute(schema.AUDIT_VIEWS)
    partial.replace(layout.audit)
    return layout


def identity(concept: Concept = PROBE, method: str = "vector_filter", build: str = "first", **more) -> RankingIdentity:
    return identify(build, concept, method, more)
