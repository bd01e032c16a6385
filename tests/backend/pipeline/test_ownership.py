"""What a build or a deletion may delete: files that it made, or that are an audit's by their names, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concept_audit import BuildOptions, DataError, ModelOptions, build
from concept_audit.cli import main
from concept_audit.files import remove_leftovers, remove_leftovers_of
from concept_audit.store.layout import Layout
from concept_audit.store.removal import remove_audit
from tests.conftest import SMALL_SAE, chat_rows


def options(data: Path, model: Path, out: Path) -> BuildOptions:
    return BuildOptions(data=str(data), out=out, model=ModelOptions(str(model), device="cpu"), layers=(2,), sae="none")


@pytest.fixture
def bad_data(tmp_path) -> Path:
    """Two whole shards, then a broken row."""
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(520)) + "{\n", "utf-8")
    return path


@pytest.mark.parametrize("strangers", [["thesis.txt"], []])
def test_a_build_that_fails_leaves_every_file_that_it_did_not_make(bad_data, model_directory, tmp_path, strangers):
    out = tmp_path / "mine"
    out.mkdir()
    names = ["build.lock", "workspace.duckdb", *strangers]
    for name in names:
        (out / name).write_text(f"{name} of days")
    command = ["build", "--data", str(bad_data), "--model", str(model_directory), "--out", str(out), "--sae", "none"]
    assert main([*command, "--device", "cpu"]) == 1
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: f"{name} of days" for name in names}


def test_a_file_that_is_put_there_during_a_build_stays(bad_data, model_directory, tmp_path, monkeypatch):
    out = tmp_path / "audit"

    def reading(*_args):
        (out / "notes.txt").write_text("mine")
        (out / "shards" / "rows").mkdir(parents=True)
        (out / "shards" / "rows" / "notes.txt").write_text("mine, too")
        raise DataError("a bad row")

    monkeypatch.setattr("concept_audit.pipeline.build.read_rows", reading)
    with pytest.raises(DataError):
        build(options(bad_data, model_directory, out))
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert left == ["notes.txt", "shards/rows/notes.txt"]


def test_an_empty_directory_that_was_there_stays(bad_data, model_directory, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    with pytest.raises(DataError):
        build(options(bad_data, model_directory, out))
    assert list(out.iterdir()) == []


def test_a_build_leaves_what_other_commands_are_writing(built, audit_directory, data_file, model_directory):
    def partials(root: Path) -> list[Path]:
        return [
            root / ".flagged.csv.0123456789ab.partial",
            root / "shards" / "index" / "k" / ".000000.safetensors.0123456789ab.partial",
            root / "shards" / "influence" / "k" / ".query.safetensors.0123456789ab.partial",
            root / "shards" / "answers" / "k" / ".000000.parquet.0123456789ab.partial",
        ]

    own = audit_directory / "shards" / "rows" / "k" / ".000000.parquet.0123456789ab.partial"
    for path in (*partials(audit_directory), own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    build(
        BuildOptions(
            data=str(data_file),
            out=audit_directory,
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(1, 2, 3),
            sae_training=SMALL_SAE,
        )
    )
    assert not own.exists() and all(path.exists() for path in partials(audit_directory))


def test_leftovers_are_told_by_their_exact_names_and_links_are_not_followed(tmp_path):
    inside, outside = tmp_path / "audit", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    (outside / ".000000.parquet.0123456789ab.partial").write_text("of another")
    (inside / "link").symlink_to(outside)
    names = ["my.partial.txt", "half.partial", "partial", ".notes.txt"]
    for name in (*names, ".a.json.0123456789ab.partial", ".audit.duckdb.0123456789ab.partial.wal"):
        (inside / name).write_text("x")
    remove_leftovers_of(inside / "a.json")
    assert (inside / ".audit.duckdb.0123456789ab.partial.wal").exists()
    remove_leftovers(inside)
    assert sorted(path.name for path in inside.iterdir()) == sorted([*names, "link"])
    assert len(list(outside.iterdir())) == 1


def made_audit(root: Path) -> Layout:
    """The files of an audit, by their names."""
    layout = Layout(root)
    (root / "shards" / "rows" / "k").mkdir(parents=True)
    (root / "sae").mkdir()
    values = {"configuration": {}, "fingerprints": {}, "stages": {}, "format": 2}
    layout.manifest.write_text(json.dumps(values))
    for name in ("audit.duckdb", "workspace.duckdb", "workspace.duckdb.wal", "sae/cfg.json"):
        (root / name).write_text("x")
    (root / "shards" / "rows" / "k" / "000000.parquet").write_text("x")
    return layout


def test_deleting_an_audit_leaves_the_files_of_others_and_says_so(tmp_path, capsys):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "000000.parquet").write_text("of another")
    root = tmp_path / "audit"
    made_audit(root)
    (root / "thesis.txt").write_text("mine")
    (root / "mine.duckdb").write_text("mine")
    (root / "shards" / "rows" / "notes.txt").write_text("mine")
    (root / "shards" / "elsewhere").symlink_to(outside)
    assert main(["delete", str(root), "--yes"]) == 0
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or path.is_symlink())
    assert left == ["mine.duckdb", "shards/elsewhere", "shards/rows/notes.txt", "thesis.txt"]
    assert f"{root / 'thesis.txt'} is not the audit's own and stays" in capsys.readouterr().err
    assert (outside / "000000.parquet").read_text() == "of another"


def test_an_audit_without_strangers_goes_altogether(tmp_path):
    made_audit(tmp_path / "audit")
    assert remove_audit(tmp_path / "audit") == []
    assert not (tmp_path / "audit").exists()


def test_shards_behind_a_link_are_not_deleted(tmp_path):
    outside = tmp_path / "elsewhere"
    (outside / "before").mkdir(parents=True)
    (outside / "before" / "000000.parquet").write_text("of another")
    layout = Layout(tmp_path / "audit")
    layout.shards.root.mkdir(parents=True)
    (layout.shards.root / "rows").symlink_to(outside)
    layout.shards.remove_others("rows", "now")
    layout.shards.remove("rows")
    assert (outside / "before" / "000000.parquet").exists()
