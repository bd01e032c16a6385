"""Which engine is asked for, how far its work is, and what is said where it cannot be had."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concept_audit import AuditError, BuildOptions, ModelOptions, build
from concept_audit.cli import main
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.pipeline.engine import LocalEngine, Work
from concept_audit.pipeline.engines.choose import working
from concept_audit.pipeline.engines.on_ray import RayEngine
from concept_audit.pipeline.engines.options import EngineOptions
from concept_audit.pipeline.engines.processes import ProcessEngine
from concept_audit.progress import Progress, Stage
from concept_audit.store import under_way
from concept_audit.store.layout import Layout
from tests.conftest import chat_rows, write_jsonl


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "2"], "--workers 2: only with --engine processes or --engine ray"),
        (["--engine", "processes", "--ray-address", "auto"], "--ray-address auto: only with --engine ray"),
        (["--engine", "processes", "--workers", "0"], "--workers 0: must be 1 or more"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
        (["--engine", "processes", "--gpus-per-worker", "-1"], "--gpus-per-worker -1: must not be negative"),
        (["--engine", "processes", "--gpus-per-worker", "2"], "this machine has 0 GPUs"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["build", "--data", "rows.jsonl", "--model", "small", *words]) == 1
    assert said in capsys.readouterr().err


def test_ray_is_asked_for_in_words_where_it_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AuditError, match=r"pip install 'concept-audit\[ray\]'"):
        RayEngine()


def test_a_driver_far_from_its_cluster_is_refused():
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(AuditError, match="run the command on a machine of the cluster"):
        RayEngine("ray://head:10001")
    with pytest.raises(AuditError, match="a worker uses one GPU"):
        RayEngine(gpus_per_worker=2)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, "Ray did not start on this machine .node timed out.*--engine processes"),
        ("head:1", "no Ray cluster there"),
    ],
)
def test_a_ray_that_does_not_start_or_is_not_there_is_told_in_words(monkeypatch, address, said):
    def init(**options: Any) -> None:
        raise Exception("node timed out")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(AuditError, match=said):
        RayEngine(address).run(None, [0], Stage("Tokenizing rows", 1, "rows"), Progress())


def test_this_process_takes_sums_with_as_many_threads_as_its_workers(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with working(EngineOptions("processes", workers=2)) as engine:
            assert isinstance(engine, ProcessEngine) and engine.devices == (None, None)
            assert torch.get_num_threads() == 2
        with working(EngineOptions(threads=3)) as engine:
            assert engine is None and torch.get_num_threads() == 3
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_other_processes_can_read_how_far_a_build_is(tmp_path, model_directory, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))
    options = BuildOptions(
        str(data), tmp_path / "audit", ModelOptions(str(model_directory), device="cpu"), layers=(1,), sae="none"
    )
    layout = Layout(options.out)
    read: list[dict[str, Any]] = []

    class Reading:
        def __init__(self, lm: LanguageModel):
            self.inner = LocalEngine(lambda _: lm)

        def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
            stage.detail = "2 of 2 workers"
            under_way.report(layout.shards, layout.progress, stage)
            assert main(["info", str(options.out), "--json"]) == 0
            read.append(json.loads(capsys.readouterr().out)["building"])
            assert main(["list", "--cache", str(tmp_path)]) == 0
            assert "being built (" in capsys.readouterr().out
            self.inner.run(work, missing, stage, progress)

    build(options, engine=Reading(load_model(options.model, options.cache, Progress())))
    assert [one["stage"] for one in read] == ["Tokenizing rows", "Running the model to layer 1"]
    assert read[0]["state"].startswith("0/20 rows (0%)") and read[0]["state"].endswith("2 of 2 workers")
    assert not layout.progress.exists()
    assert main(["info", str(options.out)]) == 0
    assert "20 rows" in capsys.readouterr().out


def test_the_report_of_a_process_that_was_killed_is_not_believed_for_long(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    under_way.report(layout.shards, layout.progress, Stage("Reading rows", None, "rows"))
    assert under_way.reported(layout.shards, layout.progress)
    monkeypatch.setattr(under_way, "STALE_SECONDS", 0.0)
    assert under_way.reported(layout.shards, layout.progress) is None
