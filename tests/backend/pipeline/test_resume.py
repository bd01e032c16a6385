"""Killed builds go on where they were, to the same store."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import duckdb
import filelock
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, StoreError, build
from concept_audit.model.load import load_model
from concept_audit.progress import Progress, Stage
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import TABLE, RowShards, read_tensors
from tests.conftest import SMALL_SAE, shards, write_jsonl

CHILD = """
import os, signal, sys
from pathlib import Path
from concept_audit import BuildOptions, ModelOptions, build
from concept_audit.concepts import sae_training
from concept_audit.concepts.options import SaeTraining
from concept_audit.progress import Stage

data, model, out, where, fuse = sys.argv[1:]
left = int(fuse)
stage = ""
sae_training.CHECKPOINT_EVERY = 10

def burn(function):
    def burning(*args, **options):
        global left
        left -= stage.startswith(where)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return burning

def entering(function):
    def entered(self, name, *rest):
        global stage
        stage = name
        return function(self, name, *rest)
    return entered

Stage.__init__ = entering(Stage.__init__)
Stage.advance = burn(Stage.advance)
os.replace, os.rename = burn(os.replace), burn(os.rename)
build(BuildOptions(data=data, out=Path(out), model=ModelOptions(model, device="cpu"), layers=(1, 2, 3),
                   sae_training=SaeTraining(expansion=2, k=4, batch=256, min_steps=60, max_steps=60)))
"""
MOMENTS = {
    "Reading": 300,
    "Tokenizing": 300,
    "Running": 11,
    "Training": 60,
    "Finding": 300,
    "Writing rows": 2,
    "Writing SAE": 2,
    "Ranking": 2,
}
"""Stage → its moments to be killed at, at the least: each report of progress, and just before each file is in place."""


def killed(data_file, model_directory, out, stage: str, moment: int) -> None:
    """Run the build in a process that kills itself at a moment of a stage."""
    arguments = map(str, (data_file, model_directory, out, stage, moment))
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGKILL, done.stderr


def options(data_file, model_directory, out) -> BuildOptions:
    model = ModelOptions(str(model_directory), device="cpu")
    return BuildOptions(data=str(data_file), out=out, model=model, layers=(1, 2, 3), sae_training=SMALL_SAE)


def tables(root: Path) -> dict[str, list]:
    con = duckdb.connect(str(Layout(root).audit), read_only=True)
    names = con.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'base'").fetchall()
    return {name: con.execute(f"SELECT * FROM base.{name} ORDER BY ALL").fetchall() for (name,) in names}


@pytest.mark.parametrize("part", [0, 1])
def test_a_build_killed_at_random_moments_of_every_stage_ends_in_the_same_store(
    built, data_file, model_directory, tmp_path, part
):
    chance = random.Random(0)
    moments = {stage: chance.randint(1, last) for stage, last in MOMENTS.items()}
    out = tmp_path / "killed"
    for stage in list(MOMENTS)[part::2]:
        killed(data_file, model_directory, out, stage, moments[stage])
        with pytest.raises(StoreError, match="not finished"):
            Audit(out)
    build(options(data_file, model_directory, out))
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert tables(out) == tables(built)


def spoil(shards: RowShards, number: int, harm: str) -> None:
    """Delete a shard, cut its file off, or put one of fewer rows into its place."""
    path = shards.path(number)
    if harm == "deleted":
        path.unlink()
    elif harm == "cut off":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        fewer = RowPartition(shards.partition.span(number).stop - 10)
        shorter = dataclasses.replace(shards, partition=fewer)
        if shards.suffix == TABLE:
            table = pq.read_table(path)
            kept = table.filter(pc.less(table["example_id"], fewer.rows))
            shorter.write_table(number, [kept], kept.schema)
        else:
            kept = {name: values[: fewer.size(number)].contiguous() for name, values in read_tensors(path).items()}
            shorter.write_tensors(number, kept)
    assert shards.missing() == [number]


@pytest.mark.parametrize("harm", ["deleted", "cut off", "short"])
@pytest.mark.parametrize("kind", ["rows", "tokens", "activations", "features"])
def test_a_shard_that_is_lost_is_made_again_by_the_same_build(
    built, audit_directory, data_file, model_directory, kind, harm
):
    spoiled = shards(audit_directory, kind)
    spoil(spoiled, 0, harm)
    build(options(data_file, model_directory, audit_directory))
    assert spoiled.missing() == []
    for path in sorted(spoiled.file("").iterdir()):
        assert path.read_bytes() == shards(built, kind).file(path.name).read_bytes()
    assert tables(audit_directory) == tables(built)


def labelled_rows(audit: Audit) -> list[LabelledExample]:
    """Rows of the audit, the last of the first shard among them."""
    texts = audit.rows.list()["messages"][240:256]
    turns = [tuple(Message(m["role"], m["content"]) for m in json.loads(text)) for text in texts]
    return [LabelledExample(messages, i % 2) for i, messages in enumerate(turns)]


@pytest.mark.parametrize("harm", ["deleted", "cut off", "short"])
def test_a_page_says_which_shard_is_lost(audit_directory, harm):
    audit = Audit(audit_directory)
    feature = f"sae:{audit.concepts.features()['feature_id'][0]}"
    spoil(shards(audit_directory, "features"), 0, harm)
    with pytest.raises(StoreError, match="features.*000000.parquet: absent or damaged; run the command"):
        audit.rows.heatmaps(feature, [5, 299])
    spoil(shards(audit_directory, "tokens"), 0, harm)
    with pytest.raises(StoreError, match="tokens.*000000.parquet: absent or damaged; run the command"):
        audit.rows.heatmaps(feature, [5, 299])


@pytest.mark.parametrize("harm", ["deleted", "cut off", "short"])
def test_scores_are_never_shifted_by_a_shard_that_is_lost(built, audit_directory, data_file, model_directory, harm):
    examples = [
        LabelledExample((Message("user", f"Is plan {i} safe?"), Message("assistant", word)), i % 2)
        for i, word in enumerate(["Truly, always."] * 8 + ["No, never maybe."] * 8)
    ]
    audit = Audit(audit_directory)
    audit.train_probe("tone", examples, layer=2)
    expected = audit.rank("tone")[["example_id", "score"]]
    audit.train_probe("tone", layer=2)  # its rankings go
    spoil(shards(audit_directory, "activations"), 0, harm)
    for method in ("vector_filter", "activation_similarity"):
        with pytest.raises(StoreError, match="000000.safetensors: absent or damaged; run the command"):
            audit.rank("tone", method)
    with pytest.raises(StoreError, match="000000.safetensors: absent or damaged; run the command"):
        audit.train_probe("rows", labelled_rows(audit), layer=2)
    build(options(data_file, model_directory, audit_directory))
    again = Audit(audit_directory).rank("tone")[["example_id", "score"]]
    assert again.to_numpy().tolist() == expected.to_numpy().tolist()


class Watching(Progress):
    """Keeps every stage that is opened, by the first word of its name."""

    def __init__(self):
        self.stages: dict[str, Stage] = {}

    @contextmanager
    def stage(self, name, total=None, unit="rows"):
        opened = self.stages[name.split()[0]] = Stage(name, total, unit)
        yield opened


def interrupt(monkeypatch, stage: str, report: int) -> None:
    """Have Ctrl-C pressed at the n-th report of a stage."""
    advance = Stage.advance
    reports = iter(range(1, 10**6))

    def advance_or_stop(self, units=1, detail=None):
        if self.name.startswith(stage) and next(reports) == report:
            raise KeyboardInterrupt
        advance(self, units, detail)

    monkeypatch.setattr(Stage, "advance", advance_or_stop)


@pytest.mark.parametrize(
    ("stage", "report", "kept", "opened"),
    [
        (
            "Reading",
            290,
            256,
            ["Reading", "Tokenizing", "Running", "Training", "Finding", "Tokens", "Writing", "Ranking"],
        ),
        ("Tokenizing", 290, 256, ["Tokenizing", "Running", "Training", "Finding", "Tokens", "Writing", "Ranking"]),
        ("Training", 35, 30, ["Training", "Finding", "Tokens", "Writing", "Ranking"]),
    ],
)
def test_an_interrupted_build_goes_on_without_doing_again_what_was_done(
    built, data_file, model_directory, tmp_path, monkeypatch, stage, report, kept, opened
):
    monkeypatch.setattr("concept_audit.concepts.sae_training.CHECKPOINT_EVERY", 10)
    wanted = options(data_file, model_directory, tmp_path / "audit")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, stage, report)
        build(wanted)
    watching = Watching()
    build(wanted, watching)
    assert [name for name in watching.stages if name != "Loading"] == opened
    assert watching.stages[stage].skipped == kept
    assert tables(wanted.out) == tables(built)


def test_a_build_killed_before_it_wrote_anything_of_use_goes_on(data_file, model_directory, tmp_path):
    out = tmp_path / "killed"
    out.mkdir()
    for name in ("build.lock", "build.pid", ".manifest.json.partial"):
        (out / name).write_text("1")
    build(dataclasses.replace(options(data_file, model_directory, out), sae="none"))
    assert Audit(out).overview().n_rows == 300


def test_a_rebuild_that_is_interrupted_is_not_taken_for_an_audit(
    data_file, model_directory, tmp_path, monkeypatch, rows
):
    out = tmp_path / "audit"
    build(options(data_file, model_directory, out))
    other = write_jsonl(tmp_path / "other.jsonl", rows[:280])
    changed = dataclasses.replace(options(other, model_directory, out), rebuild=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, "Running", 5)
        build(changed)
    with pytest.raises(StoreError, match="not finished"):
        Audit(out)
    build(dataclasses.replace(changed, rebuild=False))
    assert Audit(out).overview().n_rows == 280


def test_two_processes_do_not_build_one_audit(data_file, model_directory, tmp_path):
    out = tmp_path / "held"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, os, filelock; lock = filelock.FileLock(sys.argv[1] + '/build.lock'); lock.acquire();"
            "open(sys.argv[1] + '/build.pid', 'w').write(str(os.getpid()));"
            "print('held', flush=True); sys.stdin.read()",
            str(out),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        with pytest.raises(StoreError, match=f"another process .PID {holder.pid}. is building"):
            build(options(data_file, model_directory, out))
    finally:
        holder.communicate()
    assert os.path.exists(out / "manifest.json")


def test_a_build_that_comes_second_leaves_the_files_of_the_first(data_file, model_directory, tmp_path, monkeypatch):
    out = tmp_path / "held"
    held = []

    def while_another_begins(*args):
        out.mkdir()
        held.append(filelock.FileLock(out / "build.lock"))
        held[0].acquire()
        (out / "build.pid").write_text("42")
        return load_model(*args)

    monkeypatch.setattr("concept_audit.pipeline.build.load_model", while_another_begins)
    with pytest.raises(StoreError, match="PID 42"):
        build(options(data_file, model_directory, out))
    assert sorted(path.name for path in out.iterdir()) == ["build.lock", "build.pid"]
    held[0].release()
