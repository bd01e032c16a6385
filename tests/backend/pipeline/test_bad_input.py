"""Bad input: one line that names the thing, the reason and the way out, and nothing half-written."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from concept_audit import files
from concept_audit.cli import main
from tests.conftest import chat_rows, small_model, small_tokenizer, write_jsonl


@pytest.fixture
def build(tmp_path, model_directory, capsys):
    """Runs `concept-audit build` and returns its error line; checks that a fresh audit leaves nothing."""

    def run(data: Path | str, *extra: str, model: Path | str = model_directory) -> str:
        out = tmp_path / "audit"
        command = ["build", "--data", str(data), "--model", str(model), "--out", str(out), "--sae", "none"]
        assert main([*command, "--device", "cpu", "--cache", str(tmp_path / "cache"), *extra]) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert not out.exists()
        return errors[0]

    return run


def lines(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8")
    return path


GOOD = json.dumps(chat_rows(1)[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", [], "empty.jsonl: no rows"),
        ("a.jsonl", [GOOD, "{oops"], "a.jsonl line 2: broken JSON"),
        ("a.jsonl", [GOOD, '{"messages": [{"role": "user", "content": "x"}]}'], 'line 2: "messages" has no assistant'),
        ("a.jsonl", ['{"question": "only a prompt"}'], 'line 1: a prompt \\("question"\\) but no response'),
        ("a.jsonl", [GOOD, '{"prompt": "a", "response": "b"}'], 'line 2: no "messages", which the first row has'),
        ("a.csv", ["prompt,response", "only one field"], "a.csv line 2: 1 fields where the header has 2"),
        ("a.txt", ["text"], "does not end in a format that can be read"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(build, tmp_path, name, content, message):
    assert re.search(message, build(lines(tmp_path / name, *content)))


def test_a_bad_row_after_whole_shards_leaves_nothing(build, tmp_path):
    rows = [json.dumps(row) for row in chat_rows(600)]
    assert "line 601: broken JSON" in build(lines(tmp_path / "a.jsonl", *rows, "{"))


def test_a_missing_file_is_named(build, tmp_path):
    assert "absent.jsonl: no such file or directory; check the path" in build(tmp_path / "absent.jsonl")


def test_other_encodings_are_named(build, tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert "line 1: not UTF-8 (byte 0xe9" in build(tmp_path / "a.jsonl")


def test_a_wrong_column_is_answered_with_those_there_are(build, data_file):
    error = build(data_file, "--text-column", "body")
    assert 'no column "body"; name one of "messages", "topic", "number"' in error


def test_an_unknown_model_is_named(build, data_file, tmp_path):
    assert "does not exist; give the directory" in build(data_file, model=tmp_path / "absent")


def test_an_unknown_layer_is_answered_with_the_range(build, data_file):
    assert "has 4 blocks" in build(data_file, "--layers", "2,17")


def test_an_sae_of_another_width_is_refused_with_both(build, built, data_file, tmp_path):
    import transformers as hf

    torch.manual_seed(0)
    configuration = small_model("llama").config
    configuration.hidden_size, configuration.head_dim = 48, 12
    hf.AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path / "wide")
    small_tokenizer().save_pretrained(tmp_path / "wide")
    error = build(data_file, "--sae", str(built / "sae"), model=tmp_path / "wide")
    assert "width 32" in error and "width 48" in error


def test_too_few_tokens_to_train_an_sae_are_counted(build, tmp_path):
    error = build(write_jsonl(tmp_path / "few.jsonl", chat_rows(5)), "--sae", "train")
    assert "response tokens to train on" in error and "--sae none" in error


def test_a_foreign_directory_is_not_written_to(data_file, model_directory, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    command = ["build", "--data", str(data_file), "--model", str(model_directory), "--out", str(tmp_path)]
    assert main(command) == 1
    assert "not empty and not an audit" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_told_and_the_build_goes_on_later(data_file, model_directory, tmp_path, capsys, monkeypatch):
    out = tmp_path / "audit"
    command = ["build", "--data", str(data_file), "--model", str(model_directory), "--out", str(out)]
    command += ["--sae", "none", "--device", "cpu", "--layers", "2"]

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("concept_audit.store.shard_store.save_file", full)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "the disk is full; free some space and run the same command again" in error
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert main(command) == 0


def test_a_library_that_words_a_full_disk_its_own_way_is_understood(tmp_path, monkeypatch):
    usage = files.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    refused = files.as_store_error(tmp_path / "x", RuntimeError("unexpected pos 5 vs 3"))
    assert "the disk is full" in str(refused)
    monkeypatch.undo()
    assert files.as_store_error(tmp_path / "x", RuntimeError("unexpected pos 5 vs 3")) is None


@pytest.fixture
def probe(audit_directory, tmp_path, capsys):
    def run(rows: list[dict]) -> str:
        examples = write_jsonl(tmp_path / "examples.jsonl", rows)
        assert main(["probe", str(audit_directory), "--examples", str(examples), "--name", "p"]) == 1
        return capsys.readouterr().err

    return run


def labelled(*labels) -> list[dict]:
    rows = chat_rows(len(labels), seed=5)
    return [{"messages": row["messages"], "label": label} for row, label in zip(rows, labels, strict=True)]


def test_labels_of_one_class_are_refused(probe):
    assert "all 8 examples have one label" in probe(labelled(*[1] * 8))


def test_two_examples_are_too_few(probe):
    assert "1 positive and 1 negative examples are too few" in probe(labelled(1, 0))


def test_a_row_without_label_is_named(probe):
    rows = labelled(*[1, 0] * 4)
    del rows[3]["label"]
    assert 'examples.jsonl line 4: "label": no label' in probe(rows)


def test_contradicting_labels_are_named(probe):
    rows = labelled(*[1, 0] * 5)
    rows.append({**rows[0], "label": 0})
    assert "example 11 is labelled 0, but the same text was labelled 1" in probe(rows)


@pytest.mark.parametrize("command", [["rank", "--concept", "x"], ["info"], ["export"], ["serve"]])
def test_an_audit_that_is_not_there_is_named(command, tmp_path, capsys):
    arguments = [command[0], "nothing", *command[1:], "--cache", str(tmp_path)]
    if command[0] == "serve":
        arguments = ["serve", "--cache", str(tmp_path)]
    assert main(arguments) == 1
    assert "concept-audit demo" in capsys.readouterr().err


def test_unknown_concepts_and_methods_are_answered_with_those_there_are(audit_directory, capsys):
    assert main(["rank", str(audit_directory), "--concept", "vanity"]) == 1
    assert "SAE features sae:0 to sae:63" in capsys.readouterr().err
    assert main(["rank", str(audit_directory), "--concept", "sae:1", "--method", "magic"]) == 1
    assert "choose from feature_activation, vector_filter" in capsys.readouterr().err


def test_an_unfinished_audit_says_how_to_finish_it(audit_directory, capsys):
    (audit_directory / "audit.duckdb").unlink()
    assert main(["rank", str(audit_directory), "--concept", "sae:1"]) == 1
    assert "goes on where it was" in capsys.readouterr().err
