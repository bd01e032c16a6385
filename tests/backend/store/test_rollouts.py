"""Advantages of rollouts, against numbers worked out by hand."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pytest

from concept_audit.progress import Stage
from concept_audit.store import schema
from concept_audit.store.examples import write_rows
from concept_audit.store.partition import RowPartition
from concept_audit.store.rollouts import advantages, insert_rollouts, with_weights
from concept_audit.store.shard_store import TABLE, RowShards, ShardStore
from concept_audit.types import Example, Message, Rollouts

# Two groups of three, whose rows lie apart; one of a single row; one of three equal rewards, whose mean is rounded.
ROWS = [
    ("a", 1.0), ("b", 10.0), ("a", 0.0), ("c", 5.0), ("b", 14.0), ("a", 1.0), ("b", 12.0), ("d", 0.1), ("d", 0.1), ("d", 0.1)
]  # fmt: skip
# a: mean 2/3, sample standard deviation √(1/3); b: mean 12, standard deviation 2.
A_HIGH, A_LOW = (1 / 3) / (3**-0.5 + 1e-4), (-2 / 3) / (3**-0.5 + 1e-4)
B = 2 / 2.0001
WANTED = [A_HIGH, -B, A_LOW, 0.0, B, A_HIGH, 0.0, 0.0, 0.0, 0.0]


def inserted(tmp_path, rollouts: Rollouts, metadata=lambda prompt, reward: {"reward": reward}):
    examples = [
        Example((Message("user", prompt), Message("assistant", f"r{n}")), "f", n, metadata(prompt, reward))
        for n, (prompt, reward) in enumerate(ROWS)
    ]
    shards = RowShards(ShardStore(tmp_path / "shards"), "rows", "key", RowPartition(len(ROWS)), TABLE)
    write_rows(shards, 0, examples)
    con = duckdb.connect()
    con.execute(schema.AUDIT_TABLES)
    return con, insert_rollouts(con, shards, rollouts, Stage("", None, "shards"))


def test_advantages_are_normalised_in_each_group_as_grpo_does(tmp_path):
    con, counts = inserted(tmp_path, Rollouts(reward="reward"))
    found = advantages(con, "base.rollouts")
    np.testing.assert_allclose(found, WANTED, rtol=1e-12)
    assert (found[[3, 7, 8, 9]] == 0).all(), "exactly, whatever the mean of equal rewards is rounded to"
    assert counts == {"groups": 4, "alone": 1, "equal": 1, "weightless": 5}
    groups = con.execute("SELECT group_id, reward FROM base.rollouts ORDER BY example_id").fetchall()
    assert groups == [("abcd".index(prompt), reward) for prompt, reward in ROWS]


def test_a_column_makes_the_groups_where_it_is_named(tmp_path):
    def one_group(prompt, reward):
        return {"reward": str(reward), "id": {"set": 1}}

    con, counts = inserted(tmp_path, Rollouts(reward="reward", group="id"), one_group)
    rewards = np.array([reward for _, reward in ROWS])
    wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages(con, "base.rollouts"), wanted, rtol=1e-12)
    assert counts["groups"] == 1


def test_rows_that_were_read_from_one_row_are_a_group(tmp_path):
    con, counts = inserted(tmp_path, Rollouts(reward="reward", lists=("completions", "rewards")))
    assert counts == {"groups": 10, "alone": 10, "equal": 0, "weightless": 10}


def test_an_advantage_is_taken_as_it_is(tmp_path):
    con, counts = inserted(tmp_path, Rollouts(advantage="weight"), lambda _, reward: {"weight": -reward})
    np.testing.assert_array_equal(advantages(con, "base.rollouts"), [-reward for _, reward in ROWS])
    assert con.execute("SELECT count(reward) FROM base.rollouts").fetchone() == (0,) and counts["weightless"] == 1


@pytest.mark.parametrize("text", ["{}", '{"id": 12345678901234567890123, "a": 1.0, "q": "\\"}"}'])
def test_what_is_added_to_metadata_leaves_the_rest_as_it_was(tmp_path, text):
    con, _ = inserted(tmp_path, Rollouts(reward="reward"))
    selected, joined = with_weights(Rollouts(reward="reward"))
    query = f"SELECT {selected} FROM (SELECT 0 AS example_id, ? AS metadata) {joined}"
    (found,) = con.execute(query, [text]).fetchone()
    assert json.loads(found) == json.loads(text) | {"grpo_advantage": A_HIGH, "rollout_group": 0}
    assert found.startswith(text[:-1])
    assert with_weights(Rollouts(advantage="a", group="b")) == ("metadata", "")
