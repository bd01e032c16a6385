"""Killed builds go on where they were, to the same store."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from backend import Audit, BuildOptions, ModelOptions, StoreError, build
from backend.progress import Progress, Stage
from backend.store.layout import Layout
from tests.conftest import SMALL_SAE, write_jsonl

CHILD = """
import os, signal, sys
from pathlib import Path
from backend import Audit, BuildOptions, ModelOptions, build
from backend.concepts import sae_training
from backend.concepts.sae_training import SaeTraining
from backend.progress import Stage

data, model, out, fuse = sys.argv[1:]
left = int(fuse)
sae_training.CHECKPOINT_EVERY = 10
advance = Stage.advance

def burn(self, units=1, detail=None):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self, units, detail)

Stage.advance = burn
build(BuildOptions(data=data, out=Path(out), model=ModelOptions(model, device="cpu"), layers=(1, 2, 3),
                   sae_training=SaeTraining(expansion=2, k=4, batch=256, min_steps=60, max_steps=60)))
"""
REPORTS_OF_A_WHOLE_BUILD = 300 + 15 + 60


def start(data_file, model_directory, out, fuse: int) -> int:
    """Run the build in a process that kills itself after `fuse` reports of progress; its exit status."""
    command = [sys.executable, "-c", CHILD, str(data_file), str(model_directory), str(out), str(fuse)]
    return subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[3]).returncode


def options(data_file, model_directory, out) -> BuildOptions:
    model = ModelOptions(str(model_directory), device="cpu")
    return BuildOptions(data=str(data_file), out=out, model=model, layers=(1, 2, 3), sae_training=SMALL_SAE)


def tables(root: Path) -> dict[str, list]:
    con = duckdb.connect(str(Layout(root).audit), read_only=True)
    names = con.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'base'").fetchall()
    return {name: con.execute(f"SELECT * FROM base.{name} ORDER BY ALL").fetchall() for (name,) in names}


@pytest.mark.parametrize("seed", range(2))
def test_a_build_killed_at_random_moments_ends_in_the_same_store(
    built, data_file, model_directory, tmp_path, seed
):
    chance = random.Random(seed)
    out = tmp_path / "killed"
    for _ in range(3):
        fuse = chance.randrange(1, REPORTS_OF_A_WHOLE_BUILD // 2)
        assert start(data_file, model_directory, out, fuse) in (-signal.SIGKILL, 0)
    build(options(data_file, model_directory, out))
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert tables(out) == tables(built)


def test_what_was_done_is_not_done_again(data_file, model_directory, tmp_path):
    out = tmp_path / "killed"
    assert start(data_file, model_directory, out, 300 + 15 + 30) == -signal.SIGKILL

    class Counting(Progress):
        stages: dict[str, Stage] = {}

        def stage(self, name, total=None, unit="rows"):
            from contextlib import contextmanager

            @contextmanager
            def opened():
                stage = Stage(name, total, unit)
                self.stages[name.split()[0]] = stage
                yield stage

            return opened()

    build(options(data_file, model_directory, out), Counting())
    assert "Reading" not in Counting.stages
    assert Counting.stages.get("Running", Stage("", 0, "")).done == Counting.stages.get(
        "Running", Stage("", 0, "")
    ).skipped
    assert Counting.stages["Training"].skipped >= 20


def test_an_interrupted_build_goes_on(built, data_file, model_directory, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    advance = Stage.advance
    calls = iter(range(10**6))

    def interrupt(self, units=1, detail=None):
        if next(calls) == 305:
            raise KeyboardInterrupt
        advance(self, units, detail)

    monkeypatch.setattr(Stage, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(options(data_file, model_directory, out))
    build(options(data_file, model_directory, out))
    assert tables(out) == tables(built)


def test_a_rebuild_that_is_interrupted_is_not_taken_for_an_audit(
    data_file, model_directory, tmp_path, monkeypatch, rows
):
    out = tmp_path / "audit"
    build(options(data_file, model_directory, out))
    other = write_jsonl(tmp_path / "other.jsonl", rows[:280])
    changed = dataclasses.replace(options(other, model_directory, out), rebuild=True)
    advance = Stage.advance
    calls = iter(range(10**6))

    def interrupt(self, units=1, detail=None):
        if next(calls) == 285:
            raise KeyboardInterrupt
        advance(self, units, detail)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Stage, "advance", interrupt)
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
