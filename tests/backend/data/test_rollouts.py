"""Rollouts with rewards: which columns say what a response got, and rows that hold several responses."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import open_data
from concept_audit.data.rollouts import RewardColumns
from concept_audit.errors import DataError
from concept_audit.types import Message, Rollouts
from tests.backend.data.common import jsonl

ROLLOUTS = RewardColumns(rollouts=True)
ONE = {"prompt": "2 + 2?", "completion": "4", "reward": 1.0, "topic": "sums"}
SEVERAL = {"prompt": "2 + 2?", "completions": ["4", "5", "4"], "rewards": [1.0, 0.0, 1], "topic": "sums"}


def opened(tmp_path, *rows, wanted=ROLLOUTS, **more):
    return open_data(jsonl(tmp_path / "rows.jsonl", *rows), rewards=wanted, **more)


def test_a_reward_by_itself_makes_no_rollout(tmp_path):
    assert open_data(jsonl(tmp_path / "rows.jsonl", ONE | {"advantage": 2})).rollouts is None


@pytest.mark.parametrize(
    ("more", "wanted", "found"),
    [
        ({}, ROLLOUTS, Rollouts(reward="reward")),
        ({"Advantage": -1, "prompt_id": 7}, ROLLOUTS, Rollouts(advantage="Advantage", group="prompt_id")),
        ({"score": 3}, RewardColumns(reward="score"), Rollouts(reward="score")),
        ({"score": 3}, RewardColumns(advantage="score", group="topic"), Rollouts(advantage="score", group="topic")),
        ({"advantage": 1, "group": "a"}, RewardColumns(reward="reward", group="prompt"), Rollouts(reward="reward")),
    ],
)
def test_columns_are_found_by_name_or_named(tmp_path, more, wanted, found):
    data = opened(tmp_path, ONE | more, wanted=wanted)
    assert data.rollouts == found
    (example,) = data.examples()
    assert example.metadata["reward"] == 1.0 and example.messages[-1] == Message("assistant", "4")


def test_numbers_of_tables_without_types_and_verdicts_count(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response,reward\nq,a,0.5\nq,b, 1e-3 \n")
    data = open_data(tmp_path / "rows.csv", rewards=ROLLOUTS)
    assert [example.metadata["reward"] for example in data.examples()] == ["0.5", " 1e-3 "]
    assert len(list(opened(tmp_path, ONE | {"reward": True}).examples())) == 1


@pytest.mark.parametrize(
    ("rows", "wanted", "words"),
    [
        ([{"prompt": "q", "completion": "a"}], ROLLOUTS, "no column of advantages or rewards.*--reward-column"),
        ([ONE], RewardColumns(reward="score"), 'no column "score"; name one of "prompt", "completion"'),
        ([ONE], RewardColumns(reward="reward", advantage="topic"), "exclude each other"),
        ([ONE], RewardColumns(advantage="completion"), '"completion" holds the conversation'),
        ([ONE | {"reward": "good"}], ROLLOUTS, "rows.jsonl line 1: \"reward\" 'good' is no number.*drop the row"),
        ([ONE, ONE | {"reward": None}], ROLLOUTS, 'line 2: "reward" None is no number'),
        ([ONE, ONE | {"reward": [1]}], ROLLOUTS, r'line 2: "reward" \[1\] is no number'),
        ([ONE, {"prompt": "q", "completion": "a"}], ROLLOUTS, 'line 2: "reward" is not there'),
        ([ONE | {"reward": "nan"}], ROLLOUTS, "is no number"),
        ([ONE | {"reward": 10**400}], ROLLOUTS, "is no number"),
        ([ONE | {"group": 1}, ONE | {"group": None}], ROLLOUTS, 'line 2: "group" is null.*--group-column'),
        ([ONE | {"grpo_advantage": 1}], ROLLOUTS, '"grpo_advantage" has the name of what this build adds'),
        ([{"chosen": "a", "rejected": "b", "prompt": "q", "reward": 1}], ROLLOUTS, "pairs .* are not rollouts"),
        ([SEVERAL, SEVERAL | {"rewards": [1]}], ROLLOUTS, "line 2.*lists of the same length, 1 at least, and have 3 and 1"),
        ([SEVERAL, SEVERAL | {"completions": None}], ROLLOUTS, "and have none and 3"),
        ([SEVERAL, SEVERAL | {"rewards": [1, None, 0]}], ROLLOUTS, 'line 2: "reward" None is no number'),
    ],
)  # fmt: skip
def test_what_cannot_be_weighed_is_refused_in_words(tmp_path, rows, wanted, words):
    with pytest.raises(DataError, match=words):
        list(opened(tmp_path, *rows, wanted=wanted).examples())


def test_the_export_of_an_audit_is_taken_with_the_advantages_that_it_names(tmp_path):
    row = ONE | {"grpo_advantage": 0.5, "rollout_group": 3}
    found = opened(tmp_path, row, wanted=RewardColumns(advantage="grpo_advantage", group="rollout_group"))
    assert found.rollouts == Rollouts(advantage="grpo_advantage", group="rollout_group")


def test_rows_without_a_reward_are_left_out_where_bad_rows_are(tmp_path):
    left_out = []
    data = opened(tmp_path, ONE, ONE | {"reward": None}, SEVERAL | {"completion": "4"}, skipping=True)
    assert len(list(data.examples(left_out.append))) == 1
    assert [row.source_row for row in left_out] == [2, 3] and '"reward" None is no number' in left_out[0].reason


@pytest.mark.parametrize("wanted", [RewardColumns(), ROLLOUTS, RewardColumns(reward="rewards")])
def test_a_row_of_several_responses_is_as_many_rollouts(tmp_path, wanted):
    data = opened(tmp_path, SEVERAL, SEVERAL | {"completions": ["x"], "rewards": [2]}, wanted=wanted)
    assert data.rollouts == Rollouts(reward="reward", lists=("completions", "rewards"))
    found = list(data.examples())
    assert [example.response for example in found] == ["4", "5", "4", "x"]
    assert [dict(example.metadata) for example in found[:2]] == [{"topic": "sums", "reward": r} for r in (1.0, 0.0)]
    assert [example.source_row for example in found] == [1, 1, 1, 2]
    keys = [data.rollouts.group_key(e.messages, e.metadata, (e.source, e.source_row)) for e in found]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_first_row_of_several_responses_that_cannot_be_used_is_left_out(tmp_path):
    bad = SEVERAL | {"rewards": [1]}
    left_out = []
    data = opened(tmp_path, bad, bad, SEVERAL, wanted=RewardColumns(), skipping=True)
    assert len(list(data.examples(left_out.append))) == 3 and [row.place for row in left_out] == [0, 1]
    with pytest.raises(DataError, match="line 1.*lists of the same length"):
        opened(tmp_path, bad, SEVERAL)
    with pytest.raises(DataError, match="no rollouts in it"):
        opened(tmp_path, bad, skipping=True)


def test_turns_other_names_and_both_numbers_of_several_responses(tmp_path):
    turns = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    row = {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "responses": turns,
        "score": [3, 1],
        "advantages": [1, -1],
    }
    data = opened(tmp_path, row, wanted=RewardColumns(reward="score"))
    assert data.rollouts == Rollouts(reward="score", lists=("responses", "score", "advantages"))
    assert [dict(e.metadata) for e in data.examples()] == [{"score": 3, "advantage": 1}, {"score": 1, "advantage": -1}]
    assert opened(tmp_path, row).rollouts == Rollouts(advantage="advantage", lists=("responses", "advantages"))
    table = pa.Table.from_pylist([row])
    pq.write_table(table, tmp_path / "rows.parquet")
    again = open_data(tmp_path / "rows.parquet", rewards=RewardColumns(reward="score"))
    assert [e.messages for e in again.examples()] == [e.messages for e in data.examples()]


def test_rows_that_can_be_read_as_one_conversation_stay_one(tmp_path):
    data = opened(tmp_path, SEVERAL | {"response": "4"}, wanted=RewardColumns())
    assert data.rollouts is None and len(list(data.examples())) == 1


def test_rollouts_of_a_trajectory_are_grouped_by_what_stands_before_their_first_answer(tmp_path):
    def row(*texts):
        return {
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
            "reward": 1,
        }

    rows = row("task", "try this", "no", "try that"), row("task", "give up"), row("other task", "try this")
    data = opened(tmp_path, *rows)
    keys = [data.rollouts.group_key(e.messages, e.metadata, ("", 1)) for e in data.examples()]
    assert keys[0] == keys[1] != keys[2]
