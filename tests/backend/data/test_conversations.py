"""The forms in which people keep chats, agents' trajectories and transcripts, and which of their turns count."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import open_data, read_examples
from concept_audit.errors import DataError
from concept_audit.types import TOOLS, Message, content_hash, sides
from tests.backend.data.common import fault, jsonl, only

ASKED, ANSWER = {"role": "user", "content": "weather in Bern?"}, {"role": "assistant", "content": "It rains."}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}}]}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLED = Message("assistant", "", json.dumps([{"id": "c1", "name": "weather", "arguments": {"city": "Bern"}}]))
TRAJECTORY = (
    Message("user", "weather in Bern?"),
    CALLED,
    Message("tool", "rain", name="weather", call_id="c1"),
    Message("assistant", "It rains."),
)


def test_a_trajectory_keeps_its_tools_calls_and_results(tmp_path):
    row = {"messages": [ASKED, CALL, RESULT, ANSWER], "tools": [TOOL], "topic": "weather"}
    found = only(tmp_path, row)
    assert found.messages == (Message(TOOLS, json.dumps([TOOL])), *TRAJECTORY)
    assert found.metadata == {"topic": "weather"}
    assert found.prompt == 'User: weather in Bern?\n\nAssistant: weather({"city": "Bern"})\n\nTool: rain'
    assert only(tmp_path, row | {"tools": json.dumps([TOOL])}).messages == found.messages


def test_parquet_gives_a_trajectory_its_nulls_and_they_mean_nothing(tmp_path):
    calls = [
        {"function": {"name": "weather", "arguments": {"city": "Bern"}}},
        {"function": {"name": "time", "arguments": {"zone": "CET"}}},
    ]
    row = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}, RESULT, ANSWER]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (example,) = read_examples(tmp_path / "a.parquet")
    assert example.messages == only(tmp_path, row).messages
    assert [call["arguments"] for call in json.loads(example.messages[1].calls)] == [{"city": "Bern"}, {"zone": "CET"}]


def test_sharegpt_keeps_tools_calls_and_its_system_column(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "weather in Bern?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
    }
    found = only(tmp_path, row)
    assert found.messages[:2] == (Message(TOOLS, json.dumps([TOOL])), Message("system", "Be brief."))
    assert found.messages[3:5] == (
        Message("assistant", "", '[{"name": "weather", "arguments": {"city": "Bern"}}]'),
        Message("tool", "rain"),
    )
    assert found.metadata == {}


def test_reasoning_is_kept_apart_from_the_answer(tmp_path):
    for name in ("reasoning_content", "reasoning", "thinking"):
        found = only(tmp_path, {"messages": [ASKED, ANSWER | {name: "clouds"}]})
        assert found.messages[1] == Message("assistant", "It rains.", reasoning="clouds")
        assert found.response == "clouds\n\nIt rains."


def test_trls_conversational_rows_learn_the_completion_alone(tmp_path):
    row = {"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER], "tools": [TOOL]}
    told = [(m.role, m.trained) for m in only(tmp_path, row).messages]
    assert told == [(TOOLS, True), ("user", True), ("assistant", False), ("user", True), ("assistant", True)]


def test_alpacas_history_comes_before_the_instruction(tmp_path):
    row = {"instruction": "and now?", "input": "", "output": "b", "history": [["first?", "a"]], "system": "s"}
    found = only(tmp_path, row)
    assert [(m.role, m.content) for m in found.messages] == [
        ("system", "s"), ("user", "first?"), ("assistant", "a"), ("user", "and now?"), ("assistant", "b")]  # fmt: skip
    assert all(m.trained for m in found.messages) and found.metadata == {}


@pytest.mark.parametrize("column", ["text", "chosen"])
def test_a_transcript_is_its_turns(tmp_path, column):
    found = only(tmp_path, {column: "\n\nHuman: q\n\nmore\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"})
    assert [(m.role, m.content) for m in found.messages] == [
        ("user", "q\n\nmore"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]  # fmt: skip


def test_what_only_looks_like_tools_or_history_is_metadata(tmp_path):
    assert only(tmp_path, {"messages": [ASKED, ANSWER], "tools": "hammer"}).metadata == {"tools": "hammer"}
    found = only(tmp_path, {"instruction": "q", "output": "a", "history": "of art"})
    assert found.metadata == {"history": "of art"}


MASKED = [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER | {"weight": 1}, ASKED, ANSWER]


def trained(tmp_path, turns, messages=MASKED, name="train"):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [{name if k == "weight" else k: v for k, v in m.items()} for m in messages]})  # fmt: skip
    (example,) = open_data(path, turns=turns).examples()
    return [m.trained for m in example.messages if m.role == "assistant"]


@pytest.mark.parametrize("name", ["weight", "train", "training"])
def test_which_turns_count_is_a_choice(tmp_path, name):
    assert trained(tmp_path, "mask", name=name) == [False, True, True]
    assert trained(tmp_path, "all", name=name) == [True, True, True]
    assert trained(tmp_path, "last", name=name) == [False, False, True]


def test_a_row_without_a_turn_that_counts_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [ASKED, ANSWER | {"train": False}]})
    assert fault(path).endswith(
        "no assistant turn is to be trained on, as they are marked; drop the row, or pass --turns all"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ANSWER | {"weight": 0.5}, '"weight" is 0.5; write 0 or 1'),
        (CALL | {"tool_calls": [{"function": {"arguments": {}}}]}, "call 1 has no name"),
        (CALL | {"tool_calls": [{"name": "f", "arguments": "{'a'"}]}, '"arguments": broken JSON'),
        (CALL | {"tool_calls": [{"name": "f", "arguments": [1]}]}, '"arguments" is a list; write an object'),
        (CALL | {"tool_calls": 5}, '"tool_calls" is a number; write a list of calls'),
    ],
)  # fmt: skip
def test_a_turn_that_cannot_be_read_is_named_with_the_reason(tmp_path, turn, message):
    told = fault(jsonl(tmp_path / "train.jsonl", {"messages": [ASKED, turn]}))
    assert told.startswith('train.jsonl line 1: "messages" turn 2') and message in told


def test_what_a_turn_has_besides_its_words_tells_rows_apart_and_plain_rows_keep_their_hash():
    plain = (Message("user", "q"), Message("assistant", "a"))
    assert content_hash(plain) == "88f68e28b32083675f9383a1bd27e7f0"  # as ever  # pragma: allowlist secret
    others = [{"calls": CALLED.calls}, {"reasoning": "r"}, {"trained": False}]
    hashes = {content_hash((plain[0], Message("assistant", "a", **other))) for other in others}
    assert len(hashes | {content_hash(plain), content_hash((*plain[:1], Message(TOOLS, "[]"), plain[1]))}) == 5


def test_skipping_goes_on_after_a_row_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": [ASKED, ANSWER]}).encode()
    path.write_bytes(
        b"\n".join([b"{broken", good, b"\xff\xfe", b"5", b"", json.dumps({"messages": [ASKED]}).encode(), good])
    )
    with pytest.raises(DataError, match="a.jsonl line 1: broken JSON"):
        open_data(path)
    skipped = []
    found = list(open_data(path, skipping=True).examples(skipped.append))
    assert [e.source_row for e in found] == [2, 7]
    assert [(row.place, row.source_row) for row in skipped] == [(0, 1), (2, 3), (3, 4), (4, 6)]
    assert [row.reason.split(":", 1)[0] for row in skipped] == [f"a.jsonl line {n}" for n in (1, 3, 4, 6)]
    table = tmp_path / "a.csv"
    table.write_text("prompt,response\na,b\nc\nd,\ne,f\n")
    left_out = []
    assert [e.response for e in open_data(table).examples(left_out.append)] == ["b", "f"]
    assert [row.place for row in left_out] == [1, 2]


TRANSCRIPT = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": [{"role": "assistant", "content": "bad"}]},
        {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ],
    ids=["strings", "chats", "whole chats and a prompt", "whole chats", "transcripts", "a transcript and answers"],
)  # fmt: skip
def test_a_pair_is_both_conversations(tmp_path, row):
    found = only(tmp_path, row | {"margin": 2})
    chosen, rejected = sides(found.messages)
    assert [(m.role, m.content.strip()) for m in chosen] == [("user", "q"), ("assistant", "good")]
    assert [(m.role, m.content.strip()) for m in rejected] == [("user", "q"), ("assistant", "bad")]
    assert found.metadata == {"margin": 2} and found.prompt == "q"
    assert "good" in found.response and "bad" in found.response


def test_what_both_sides_begin_with_alike_is_not_learnt(tmp_path):
    found = only(tmp_path, {"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"})
    for side in sides(found.messages):
        assert [m.trained for m in side if m.role == "assistant"] == [False, True]


def test_a_pair_and_its_swap_are_different_rows(tmp_path):
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    first, second = only(tmp_path, row), only(tmp_path, row | {"chosen": "bad", "rejected": "good"})
    assert first.content_hash != second.content_hash


def test_a_pair_without_one_of_its_sides_is_refused(tmp_path):
    path = jsonl(tmp_path / "train.jsonl", {"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None})
    assert fault(path) == 'train.jsonl line 2: "rejected" is null; fill it or drop the row'


def test_columns_that_are_named_take_one_side_alone(tmp_path):
    found = only(tmp_path, {"prompt": "q", "chosen": "good", "rejected": "bad"}, prompt="prompt", response="chosen")
    assert found.response == "good" and found.metadata == {"rejected": "bad"}
