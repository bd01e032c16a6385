"""Every kind of training data: read, audited, flagged, and exported in its own form."""

from __future__ import annotations

import json
import shutil

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit import Audit, BuildOptions, DataError, ModelOptions, RowFilter, build
from concept_audit.cli import main
from concept_audit.data.read import open_data
from concept_audit.model.chat import ChatRenderer
from concept_audit.pipeline.preview import describe
from concept_audit.pipeline.read import read_rows
from concept_audit.progress import Progress, Stage
from concept_audit.store.examples import read_skipped
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import TABLE, RowShards, ShardStore
from concept_audit.store.skipped import skipped_rows
from tests.conftest import write_jsonl

ASKED, ANSWER = {"role": "user", "content": "walks the river?"}, {"role": "assistant", "content": "yes, slowly"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "walk", "arguments": "{\"to\": \"river\"}"}}]}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "green"}
TOOL = {"type": "function", "function": {"name": "walk", "parameters": {"type": "object"}}}
KINDS = {
    "tool calls": {"messages": [ASKED, CALL, RESULT, ANSWER], "tools": [TOOL]},
    "reasoning": {"messages": [ASKED, ANSWER | {"reasoning_content": "maybe"}]},
    "masks": {"messages": [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER | {"weight": 1}]},
    "developer": {"messages": [{"role": "developer", "content": "be safe"}, ASKED, ANSWER]},
    "prompt and completion": {"prompt": [ASKED], "completion": [ANSWER]},
    "sharegpt with tools": {
        "conversations": [
            {"from": "human", "value": "walk"},
            {"from": "function_call", "value": '{"name": "walk", "arguments": {}}'},
            {"from": "observation", "value": "green"},
            {"from": "gpt", "value": "yes"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    },
    "alpaca with history": {"instruction": "and now?", "input": "", "output": "no", "history": [["walk?", "yes"]]},
    "transcript": {"text": "\n\nHuman: walk?\n\nAssistant: yes, slowly"},
}


def audited(data, model_directory, out, progress=None, **more) -> Audit:
    model = ModelOptions(str(model_directory), device="cpu")
    return Audit(build(BuildOptions(str(data), out, model, layers=(1,), sae="none", **more), progress))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_any_kind_is_audited_flagged_and_exported_as_it_was(kind, tmp_path, model_directory):
    rows = [KINDS[kind] | {"number": n} for n in range(3)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    audit = audited(data, model_directory, tmp_path / "audit")
    found = audit.rows.list()
    assert (found["n_response_tokens"] > 0).all() and json.loads(found["metadata"][1]) == {"number": 1}
    audit.flags.set(found["content_hash"][:1].tolist(), "remove")
    audit.exports.write(tmp_path / "flagged.jsonl", "jsonl", RowFilter(flag="remove"), schema="own")
    assert (tmp_path / "flagged.jsonl").read_bytes() == data.read_bytes()  # three rows of one text have one flag
    audit.flags.set(found["content_hash"][:1].tolist(), None)
    audit.exports.write(tmp_path / "clean.jsonl", "jsonl", RowFilter(flag="none"), schema="own")
    assert (tmp_path / "clean.jsonl").read_bytes() == data.read_bytes()


def test_trajectories_of_parquet_keep_their_types(tmp_path, model_directory):
    row = KINDS["tool calls"] | {"tools": json.dumps([TOOL])}
    table = pa.Table.from_pylist([row | {"number": n} for n in range(3)])
    pq.write_table(table, tmp_path / "rows.parquet")
    audit = audited(tmp_path / "rows.parquet", model_directory, tmp_path / "audit")
    audit.exports.write(tmp_path / "clean.parquet", "parquet", schema="own")
    assert pq.read_table(tmp_path / "clean.parquet").equals(table)


def with_bad_lines(path, count: int) -> list[str]:
    """Lines of which every tenth cannot be used, in four ways."""
    bad = ["{broken", '{"messages": [{"role": "user", "content": "q"}]}', "7", '{"messages": [{"role": "bot"}]}']
    lines = [
        bad[n // 10 % 4] if n % 10 == 9 else json.dumps({"messages": [ASKED, ANSWER], "number": n})
        for n in range(count)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return lines


def test_of_ten_thousand_rows_a_thousand_bad_ones_are_left_out_with_line_and_reason(tmp_path, tokenizer):
    with_bad_lines(tmp_path / "rows.jsonl", 10_000)
    store, stage = ShardStore(tmp_path / "shards"), Stage("", None, "rows")
    data = open_data(tmp_path / "rows.jsonl", skipping=True)
    assert read_rows(store, "key", data, ChatRenderer(tokenizer, 200), stage) == 1_000 and stage.done == 9_000
    rows = RowShards(store, "rows", "key", RowPartition(9_000), TABLE)
    left_out = [row for number in rows.numbers() for row in read_skipped(rows, number)]
    assert [row.source_row for row in left_out] == list(range(10, 10_001, 10))
    assert all(row.reason.startswith(f"rows.jsonl line {row.source_row}: ") for row in left_out)


@pytest.fixture(scope="module")
def with_bad_rows(tmp_path_factory, model_directory):
    """1,000 rows of which every tenth cannot be used, and their audit."""
    place = tmp_path_factory.mktemp("bad")
    lines = with_bad_lines(place / "rows.jsonl", 1_000)
    data = place / "rows.jsonl"
    return data, lines, audited(data, model_directory, place / "audit", on_bad_row="skip")


def test_rows_that_cannot_be_used_are_left_out_and_listed(with_bad_rows, capsys):
    _, lines, audit = with_bad_rows
    assert audit.rows.count(RowFilter()) == 900
    listed = audit.rows.skipped()
    assert listed["source_row"].tolist() == list(range(10, 1_001, 10))
    for number, reason in zip(listed["source_row"], listed["reason"], strict=True):
        assert reason.startswith(f"rows.jsonl line {number}: ")
    assert {reason.split(": ", 1)[1].split(" ")[0] for reason in listed["reason"]} == {"broken", '"messages"', "a"}
    assert main(["info", str(audit.root), "--skipped"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 100
    assert main(["info", str(audit.root)]) == 0
    assert "100 rows left out" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_exports_find_the_rows_that_were_kept_among_all(with_bad_rows, tmp_path, format):
    _, lines, audit = with_bad_rows
    audit.exports.write(tmp_path / f"clean.{format}", format, schema="own")
    kept = [line for n, line in enumerate(lines) if n % 10 != 9]
    if format == "jsonl":
        assert (tmp_path / "clean.jsonl").read_text().splitlines() == kept
    else:
        numbers = [line.rsplit(",", 1)[1] for line in (tmp_path / "clean.csv").read_text().splitlines()[1:]]
        assert numbers == [str(json.loads(line)["number"]) for line in kept]


def test_a_build_that_skips_goes_on_where_it_was(with_bad_rows, model_directory):
    data, _, audit = with_bad_rows
    before = audit.rows.skipped()
    shard = sorted((audit.root / "shards" / "rows").rglob("*.parquet"))[3]
    shard.unlink()
    again = audited(data, model_directory, audit.root, on_bad_row="skip")
    assert shard.exists() and again.rows.skipped().equals(before) and again.rows.count(RowFilter()) == 900


def test_a_row_that_the_template_refuses_is_skipped_too(tmp_path, tokenizer, model_directory):
    model = shutil.copytree(model_directory, tmp_path / "model")
    refuses = "{% if messages[0].content == 'no' %}{{ raise_exception('not no') }}{% endif %}" + tokenizer.chat_template
    (model / "chat_template.jinja").write_text(refuses)
    rows = [{"messages": [ASKED, ANSWER]}, {"messages": [ASKED | {"content": "no"}, ANSWER]}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows * 2)
    with pytest.raises(DataError, match="rows.jsonl row 2: .*not no"):
        audited(data, model, tmp_path / "stopped")
    audit = audited(data, model, tmp_path / "audit", on_bad_row="skip")
    assert audit.rows.list()["source_row"].tolist() == [1, 3]
    assert audit.rows.skipped()["source_row"].tolist() == [2, 4]
    assert "not no" in audit.rows.skipped()["reason"][0]


def test_where_no_row_can_be_used_nothing_is_built(tmp_path, model_directory):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [ASKED]}] * 3)
    with pytest.raises(DataError, match=r'none of the 3 rows can be used; the first: rows.jsonl line 1: "messages"'):
        audited(data, model_directory, tmp_path / "audit", on_bad_row="skip")
    assert not (tmp_path / "audit").exists()


class Listening(Progress):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text):
        self.said.append(text)


def test_the_first_lines_say_what_the_data_were_taken_for(tmp_path, model_directory):
    rows = [{"messages": [ASKED, ANSWER | {"content": "yes\x1b[31m"}], "topic": "rivers"}] * 3
    listening = Listening()
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    audited(data, model_directory, tmp_path / "audit", listening)
    kind, metadata, turns, first, second, *_ = listening.said
    assert kind == f'{data}: chats, in column "messages"' and metadata == '  metadata: "topic"'
    assert turns.startswith("  turns that count: all of the assistant's, but those that a row marks otherwise")
    assert first.startswith("  row 1, its response tokens in ⟦ ⟧: ") and second.startswith("  row 2")
    assert first.endswith("<|im_start|>user⏎walks the river?<|im_end|>⏎<|im_start|>assistant⏎⟦yes·[31m<|im_end|>⟧⏎")


def test_a_reward_is_said_to_weigh_nothing(tmp_path):
    rows = [{"prompt": [ASKED], "completion": [ANSWER], "Reward": 0.5, "topic": "rivers"}]
    data = open_data(write_jsonl(tmp_path / "rows.jsonl", rows))
    options = BuildOptions(str(tmp_path / "rows.jsonl"), tmp_path / "audit", ModelOptions("none"))
    assert [line for line in describe(data, options) if '"Reward" weighs no row' in line]


def test_a_dry_run_stops_after_them(tmp_path, model_directory, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [KINDS["tool calls"]])
    command = ["build", "--data", str(data), "--model", str(model_directory), "--out", str(tmp_path / "audit")]
    assert main([*command, "--dry-run", "--turns", "last"]) == 0
    told = capsys.readouterr().err
    assert '"messages", "tools"' in told and "the assistant's last" in told and "⟦yes, slowly" in told
    assert "the model's template knows no tool calls" in told and not (tmp_path / "audit").exists()


def test_settings_that_an_earlier_version_did_not_have_are_in_the_manifest_only_if_they_are_used(
    tmp_path, model_directory
):
    data = write_jsonl(tmp_path / "rows.jsonl", [KINDS["masks"] | {"number": n} for n in range(3)])
    plain = audited(data, model_directory, tmp_path / "plain")
    assert plain.manifest.configuration["turns"] is None and plain.manifest.configuration["on_bad_row"] is None
    last = audited(data, model_directory, tmp_path / "last", turns="last", on_bad_row="skip")
    assert last.manifest.configuration["turns"] == "last" and last.manifest.configuration["on_bad_row"] == "skip"


def test_the_list_can_be_asked_in_sql_and_audits_made_before_have_none(with_bad_rows):
    _, _, audit = with_bad_rows
    found = audit.query("SELECT count(*) AS n, min(source_row) AS first FROM audit.skipped_rows")
    assert found.to_dict("records") == [{"n": 100, "first": 10}]
    with duckdb.connect() as con:
        con.execute("ATTACH ':memory:' AS audit; CREATE SCHEMA audit.base")
        assert skipped_rows(con).empty
