"""How much rollouts weigh: their groups, rewards and advantages, as the store has them.

The advantage of a response i with the reward r_i, of the n responses of its group (Shao et al. 2024, arXiv 2402.03300,
section 4.1.2):

    A_i = (r_i − mean(r)) / (std(r) + ε),

with the sample standard deviation (n − 1) and ε = 10⁻⁴, as TRL's `GRPOTrainer` has them; 0 for a group of one response,
and where all rewards of a group are equal. It takes one pass over the rows, and DuckDB spills what does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from concept_audit.progress import Stage
from concept_audit.store.cursor import Cursor, only_row
from concept_audit.store.examples import messages_from_json
from concept_audit.store.rankings import scores_table
from concept_audit.store.shard_store import RowShards, read_columns
from concept_audit.types import GRPO_ADVANTAGE, ROLLOUT_GROUP, Rollouts, as_number

EPSILON = 1e-4
ROLLOUTS = "audit.base.rollouts"
READ = ["example_id", "source", "source_row", "messages", "metadata"]


def insert_rollouts(con: Cursor, rows: RowShards, rollouts: Rollouts, stage: Stage) -> dict[str, int]:
    """Fill ``base.rollouts``: groups are numbered in the order of their first rows, from 0.

    Returns:
        how many groups there are (groups), groups of one row (alone) and others in which all rewards are equal
        (equal); and rows that weigh nothing (weightless).
    """
    con.execute("CREATE TEMP TABLE got (example_id BIGINT, group_key VARCHAR, value DOUBLE)")
    for number in rows.numbers():
        found = _got(rows, number, rollouts)  # noqa: F841 - DuckDB finds it by its name
        con.execute("INSERT INTO got SELECT * FROM found")
        stage.advance()
    con.execute(
        """CREATE TEMP TABLE groups AS
           SELECT group_key, row_number() OVER (ORDER BY min(example_id)) - 1 AS group_id, count(*) AS n,
                  avg(value) AS mean, stddev_samp(value) AS deviation, min(value) = max(value) AS equal
           FROM got GROUP BY group_key"""
    )
    normalised = "CASE WHEN equal THEN 0.0 ELSE (value - mean) / (deviation + $1) END"
    columns = f"value, {normalised}" if rollouts.advantage is None else "NULL, value + 0 * $1"
    con.execute(
        f"""INSERT INTO base.rollouts SELECT example_id, group_id, {columns}
            FROM got JOIN groups USING (group_key) ORDER BY example_id""",
        [EPSILON],
    )
    counted = only_row(
        con.execute(
            """SELECT count(*), count(*) FILTER (n = 1), count(*) FILTER (n > 1 AND equal),
                      (SELECT count(*) FROM base.rollouts WHERE advantage = 0) FROM groups"""
        )
    )
    con.execute("DROP TABLE got")
    con.execute("DROP TABLE groups")
    return dict(zip(("groups", "alone", "equal", "weightless"), map(int, counted), strict=True))


def _got(rows: RowShards, number: int, rollouts: Rollouts) -> pa.Table:
    """What tells the groups of one shard's rows, and what each of them got: example_id, group_key, value."""
    table = read_columns(rows.path(number), READ).to_pylist()
    metadata = [json.loads(row["metadata"]) for row in table]
    by_prompt = rollouts.group is None and rollouts.lists is None
    keys = [
        rollouts.group_key(
            messages_from_json(row["messages"]) if by_prompt else (), more, (row["source"], row["source_row"])
        )
        for row, more in zip(table, metadata, strict=True)
    ]
    return pa.table(
        {
            "example_id": pa.array([row["example_id"] for row in table], pa.int64()),
            "group_key": pa.array(keys, pa.string()),
            "value": pa.array([as_number(more.get(rollouts.field)) for more in metadata], pa.float64()),
        }
    )


def with_weights(rollouts: Rollouts) -> tuple[str, str]:
    """What a query of rows selects for their metadata, with what a build adds to them; and what it has to join."""
    texts = {GRPO_ADVANTAGE: "advantage", ROLLOUT_GROUP: "group_id"}
    # JSON text, so that all that was there stays as it was.
    added = " || ', ' || ".join(f"""'"{name}": ' || {texts[name]}""" for name in rollouts.added)
    if not added:
        return "metadata", ""
    before = "CASE WHEN metadata = '{}' THEN '{' ELSE left(metadata, length(metadata) - 1) || ', ' END"
    return f"{before} || {added} || '}}'", "JOIN base.rollouts USING (example_id)"


def advantages(cursor: Cursor, table: str = ROLLOUTS) -> np.ndarray:
    """How much each row weighs: float64 [rows]."""
    found = cursor.execute(f"SELECT advantage FROM {table} ORDER BY example_id").fetchnumpy()
    return np.asarray(found["advantage"], np.float64)


def ranks_in_groups(cursor: Cursor, ranking: int, example_ids: Sequence[int]) -> dict[int, int]:
    """The place of rows among those of their group, by a ranking: example id → 1 for the first; all rows count."""
    found = cursor.execute(
        f"""WITH asked AS MATERIALIZED (SELECT unnest(?::BIGINT[]) AS example_id),
                 members AS MATERIALIZED (
                     SELECT example_id, group_id FROM {ROLLOUTS} WHERE group_id IN (
                         SELECT group_id FROM {ROLLOUTS} JOIN asked USING (example_id))),
                 placed AS (
                     SELECT example_id, row_number() OVER (PARTITION BY group_id ORDER BY s.rank) AS place
                     FROM {scores_table(cursor, ranking)} s JOIN members USING (example_id) WHERE s.ranking_id = ?)
            SELECT example_id, place FROM placed JOIN asked USING (example_id)""",
        [[int(i) for i in example_ids], ranking],
    ).fetchall()
    return dict(found)
