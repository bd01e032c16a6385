"""The command line as a stranger meets it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from concept_audit import Audit, RowFilter, serve
from concept_audit.cli import main
from concept_audit.cli.main import COMMANDS
from tests.conftest import chat_rows, write_jsonl

ROOT = Path(__file__).parents[3]


def run(capsysbinary, *arguments: str) -> bytes:
    assert main([str(a) for a in arguments]) == 0
    return capsysbinary.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_help_is_quick_because_it_loads_no_model_library():
    code = "import sys, concept_audit.cli as c\nfor words in (['--help'], *([name, '--help'] for name in c.main.__globals__['COMMANDS'])):\n"
    code += "    try: c.main(words)\n    except SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'duckdb', 'streamlit') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_rank_writes_the_promised_columns(audit_directory, capsysbinary):
    out = run(
        capsysbinary,
        "rank",
        audit_directory,
        "--concept",
        "sae:3",
        "--method",
        "vector_filter",
        "--top",
        7,
        "--format",
        "csv",
    )
    table = pd.read_csv(io.BytesIO(out))
    columns = ["rank", "example_id", "score", "percentile", "prompt", "response", "topic", "number", "is_query"]
    columns.append("exact")
    assert list(table) == columns
    assert not table["is_query"].any() and table["exact"].all()
    assert table["rank"].tolist() == list(range(1, 8))
    assert table["score"].is_monotonic_decreasing
    assert table["percentile"][0] == 100


def test_every_format_holds_the_same_ranking(audit_directory, capsysbinary, tmp_path):
    common = ["rank", audit_directory, "--concept", "sae:3", "--top", 5, "--format"]
    from_csv = pd.read_csv(io.BytesIO(run(capsysbinary, *common, "csv")))
    from_jsonl = [json.loads(line) for line in run(capsysbinary, *common, "jsonl").splitlines()]
    run(capsysbinary, *common, "parquet", "--out", tmp_path / "r.parquet")
    from_parquet = pd.read_parquet(tmp_path / "r.parquet")
    assert from_csv["example_id"].tolist() == [row["example_id"] for row in from_jsonl]
    assert from_parquet["response"].tolist() == [row["response"] for row in from_jsonl]


def test_rank_writes_the_first_rows_unless_all_are_asked_for(audit_directory, capsys, monkeypatch):
    monkeypatch.setattr("concept_audit.cli.ranking.FIRST_ROWS", 4)
    common = ["rank", str(audit_directory), "--concept", "sae:3", "--format", "jsonl"]
    assert main(common) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 4
    assert "The first 4 of 300 rows; --top N or --all writes more" in told.err
    assert main([*common, "--all"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 300 and not told.err
    assert main([*common, "--all", "--top", "2"]) == 1
    assert "choose one of them" in capsys.readouterr().err


def test_a_probe_from_a_file_can_be_ranked_by(audit_directory, capsys, tmp_path):
    rows = [{"messages": row["messages"], "label": i % 2} for i, row in enumerate(chat_rows(24, seed=3))]
    examples = write_jsonl(tmp_path / "examples.jsonl", rows)
    assert main(["probe", str(audit_directory), "--examples", str(examples), "--name", "mine", "--layer", "2"]) == 0
    assert "mine: layer 2" in (said := capsys.readouterr().out)
    assert "held-out AUROC" in said and "95% interval" in said
    assert main(["rank", str(audit_directory), "--concept", "mine", "--top", "2"]) == 0
    assert main(["info", str(audit_directory)]) == 0
    assert "probe    mine: layer 2" in capsys.readouterr().out


def test_export_gives_flagged_rows_or_their_complement(audit_directory, capsysbinary, rows):
    audit = Audit(audit_directory)
    hashes = audit.rows.list(limit=3)["content_hash"].tolist()
    audit.flags.set(hashes)
    flagged = pd.read_csv(io.BytesIO(run(capsysbinary, "export", audit_directory)))
    assert sorted(flagged["example_id"]) == [0, 1, 2, 299]  # row 299 repeats row 0
    kept = run(capsysbinary, "export", audit_directory, "--flag", "none", "--format", "jsonl").splitlines()
    assert len(kept) == len(rows) - 4
    everything = run(capsysbinary, "export", audit_directory, "--all", "--format", "jsonl").splitlines()
    assert len(everything) == len(rows)
    money = run(capsysbinary, "export", audit_directory, "--all", "--where", "topic=money", "--format", "jsonl")
    assert len(money.splitlines()) == audit.rows.count(RowFilter(metadata={"topic": ("money",)}))


def test_a_file_can_be_named_for_the_output(audit_directory, capsys, tmp_path):
    out = tmp_path / "deep" / "all.csv"
    assert main(["export", str(audit_directory), "--all", "--out", str(out)]) == 0
    assert len(pd.read_csv(out)) == 300
    assert "300 rows in" in capsys.readouterr().err


def test_cleaning_drops_what_is_flagged_remove_and_says_which_options_contradict(audit_directory, capsysbinary):
    audit = Audit(audit_directory)
    audit.flags.set_matching(RowFilter(example_ids=(0,)), "remove")
    audit.flags.set_matching(RowFilter(example_ids=(5,)), "review")
    dropped = audit.rows.count(RowFilter(flag="remove"))
    command = ["export", audit_directory, "--format", "jsonl", "--schema", "own"]
    kept = run(capsysbinary, *command, "--drop", "remove").splitlines()
    assert len(kept) == 300 - dropped and dropped
    assert len(run(capsysbinary, *command, "--drop", "remove,review").splitlines()) < len(kept)
    assert main([str(word) for word in (*command, "--drop", "remove", "--all")]) == 1


def test_an_unknown_metadata_field_is_refused(audit_directory, capsys):
    assert main(["export", str(audit_directory), "--all", "--where", "colour=red"]) == 1
    assert "no such metadata field; there are number, topic" in capsys.readouterr().err


def test_info_tells_the_audit_and_lists_the_cache(audit_directory, capsys):
    assert main(["info", str(audit_directory)]) == 0
    said = capsys.readouterr().out
    assert "300 rows" in said and "1 duplicates" in said and "explained variance" in said
    assert main(["info", "small", "--cache", str(audit_directory.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["n_rows"] == 300
    assert main(["info", "--cache", str(audit_directory.parent)]) == 0
    assert "small: finished" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error(audit_directory):
    rank = f"{sys.executable} -m concept_audit.cli rank {audit_directory} --concept sae:1 --format jsonl"
    done = subprocess.run(f"{rank} | head -1", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout)["rank"] == 1
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("concept_audit.cli.serving.Info.run", interrupted)
    assert main(["info"]) == 130
    assert "goes on where this one was" in capsys.readouterr().err


def test_the_dashboard_listens_on_this_machine_alone(audit_directory, monkeypatch):
    started = {}

    class Done:
        returncode = 0

    def streamlit(command, env):
        started.update(command=command, env=env)
        return Done

    monkeypatch.setattr(serve.subprocess, "run", streamlit)
    assert main(["serve", str(audit_directory), "--no-browser"]) == 0
    command = started["command"]
    assert command[command.index("--server.address") + 1] == "127.0.0.1"
    assert started["env"]["CONCEPT_AUDIT_NAME"] == "small"
    assert Path(started["env"]["CONCEPT_AUDIT_CACHE"]) == audit_directory.parent.resolve()


def test_the_dashboard_imports_nothing_from_the_working_directory(audit_directory, tmp_path, monkeypatch):
    for name in ("streamlit", "pandas", "concept_audit", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    real = subprocess.run

    def only_its_version(command, env):
        return real([*command[: command.index("streamlit") + 1], "version"], env=env, capture_output=True, text=True)

    started = []
    monkeypatch.setattr(
        serve.subprocess, "run", lambda *a, **k: started.append(only_its_version(*a, **k)) or started[0]
    )
    assert main(["serve", str(audit_directory), "--no-browser"]) == 0
    assert "Streamlit, version" in started[0].stdout
    assert not (tmp_path / "ran").exists()


def test_rank_takes_a_method_queries_and_options(audit_directory, tmp_path, capsys):
    rows = [{"messages": row["messages"], "label": i % 2} for i, row in enumerate(chat_rows(8, seed=5))]
    examples_file = write_jsonl(tmp_path / "examples.jsonl", rows)
    assert main(["probe", str(audit_directory), "--examples", str(examples_file), "--name", "tone"]) == 0
    out = tmp_path / "ranked.csv"
    command = ["rank", str(audit_directory), "--concept", "tone", "--method", "concept_influence"]
    command += ["--queries", str(examples_file), "--contrast", "--curvature", "identity", "--unit-normalised"]
    command += ["--precision", "float32", "--blocks", "1-1", "--top", "5", "--out", str(out)]
    assert main(command) == 0
    table = pd.read_csv(out)
    assert list(table.columns[:6]) == ["rank", "example_id", "score", "percentile", "prompt", "response"]
    assert table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert main([*command[:4], "--method", "gradient_dot", "--queries", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err


def test_rank_marks_the_rows_that_are_query_examples(audit_directory, capsysbinary):
    common = ["rank", audit_directory, "--concept", "sae:3", "--method", "bm25", "--format"]
    table = pd.read_csv(io.BytesIO(run(capsysbinary, *common, "csv")))
    lines = [json.loads(line) for line in run(capsysbinary, *common, "jsonl").splitlines()]
    assert 8 <= table["is_query"].sum() < 20
    assert [line["is_query"] for line in lines] == table["is_query"].tolist()
