"""Two that make the same thing at once, paused where it hurts: one result, whole, and nobody's files are taken."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_audit import (
    Audit,
    BuildOptions,
    CurvatureOptions,
    IndexOptions,
    InfluenceOptions,
    ModelOptions,
    StoreError,
    build,
)
from concept_audit.cli import main
from concept_audit.errors import FinishedIndexError
from concept_audit.pipeline import curvature
from concept_audit.pipeline.attribution import Scores
from concept_audit.pipeline.curvature import CurvatureFit, fit_curvature
from concept_audit.pipeline.index.build import _Building
from concept_audit.pipeline.kept_queries import forget_influence
from concept_audit.progress import Progress
from concept_audit.store.index import present_index, present_indexes
from concept_audit.store.layout import Layout
from concept_audit.store.locks import held
from concept_audit.store.partition import RowPartition
from tests.conftest import shards

ROWS = RowPartition(300)
ONE = IndexOptions(row_bytes=1024, samples=20)
OTHER = replace(ONE, curvature=CurvatureOptions(seed=1))
EXACT = InfluenceOptions.of(engine="exact", curvature="identity", precision="float32")


class Pause:
    """Stops whoever comes to it until it is told to go on."""

    def __init__(self):
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(60)


class Saying(Progress):
    """Sets an event when there is something to say."""

    def __init__(self):
        self.lines: list[str] = []
        self.said = threading.Event()

    def say(self, text: str) -> None:
        self.lines.append(text)
        self.said.set()


@pytest.fixture
def audit(audit_directory) -> Audit:
    found = Audit(audit_directory, device="cpu")
    found.model()
    return found


@pytest.fixture
def quick_index(monkeypatch):
    """Building an index is a matter of writing its description, before which a test may pause it."""
    pauses: list[Pause] = []

    def run(self, answering):
        for pause in pauses[:1]:
            pause()
        self._files.rows.write_tensors(0, {"codes": torch.zeros(1)})
        about = {**self._made_of, "done": True, "fidelity": {}}
        self._files.write_description(about)
        return about

    monkeypatch.setattr(_Building, "run", run)
    monkeypatch.setattr("concept_audit.store.index.IndexFiles.complete", lambda self, blocks: True)
    return pauses


def test_two_builds_of_an_index_do_not_mix(audit, quick_index):
    quick_index.append(Pause())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(audit.build_index, ONE)
        assert quick_index[0].reached.wait(60)
        before = present_index(Layout(audit.root), ROWS).describe()
        with pytest.raises(StoreError, match=r"another process \(PID \d+ on .*\) is building its index; wait for it"):
            audit.build_index(OTHER, replace=True)
        assert [files.describe() for files in present_indexes(Layout(audit.root), ROWS)] == [before]
        quick_index[0].go_on.set()
        assert first.result()["seed"] == 0
    assert present_index(Layout(audit.root), ROWS).describe()["done"]


def test_a_finished_index_is_replaced_only_when_that_is_asked_for(audit, quick_index, capsys, monkeypatch):
    audit.build_index(ONE)
    files = present_index(Layout(audit.root), ROWS)
    shard = files.rows.path(0).read_bytes()
    assert audit.build_index(ONE)["done"], "the same one is not replaced"
    with pytest.raises(
        FinishedIndexError, match=r"finished gradient index with other options \(seed 0, asked for 1\).*--replace"
    ):
        audit.build_index(OTHER)
    command = ["index", str(audit.root), "--bytes", "2048", "--device", "cpu", "--json"]
    assert main(command) == 1
    assert "row_bytes 1024, asked for 2048" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(command) == 1
    assert files.rows.path(0).read_bytes() == shard and files.describe()["done"]
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(command) == 0
    assert not files.rows.path(0).exists()
    assert audit.build_index(OTHER, replace=True)["seed"] == 1
    assert len(present_indexes(Layout(audit.root), ROWS)) == 1


def test_who_asks_for_a_ranking_that_is_being_computed_waits_for_it(audit, monkeypatch):
    pause, computed = Pause(), []

    def attribute(sources, run, progress):
        computed.append(run.ranking)
        scores = shards(audit.root, "tokens").store.path("influence", f"{run.ranking:016x}", "000000.safetensors")
        sources.layout.shards.write_tensors(scores, {"scores": torch.zeros(1)})
        pause()
        assert scores.exists(), "nobody else has taken it away"
        return Scores(np.arange(300.0))

    monkeypatch.setattr("concept_audit.pipeline.rank.attribute", attribute)
    second = Audit(audit.root, device="cpu")
    saying = Saying()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(audit.rankings.ensure, "sae:3", "gradient_dot", EXACT)
        assert pause.reached.wait(60)
        other = pool.submit(second.rankings.ensure, "sae:3", "gradient_dot", EXACT, saying)
        assert saying.said.wait(60), "it says that it waits"
        forget_influence(Layout(audit.root), "sae:3")
        pause.go_on.set()
        assert one.result(60) == other.result(60)
    assert "computes the same ranking" in saying.lines[0]
    assert computed == [one.result()], "it was computed once"
    assert second.rank("sae:3", "gradient_dot", top=1, options=EXACT)["score"].tolist() == [299.0]


def test_curvature_that_is_being_fitted_is_waited_for(audit, monkeypatch):
    pause, fitted = Pause(), []

    def fit_group(files, sources, lm, fit, group, *rest):
        fitted.extend(group)
        pause()
        for block in group:
            sources.layout.shards.write_tensors(files.block(block), {"x": torch.ones(1)})

    monkeypatch.setattr(curvature, "_fit_group", fit_group)
    sources, lm, saying = audit.opened.sources(), audit.model(), Saying()
    fit = CurvatureFit.of(CurvatureOptions(curvature_tokens=2_000), "linear", "float32")
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fit_curvature, sources, lm, fit, [1, 2], Progress())
        assert pause.reached.wait(60)
        other = pool.submit(fit_curvature, sources, lm, fit, [1, 2, 3], saying)
        assert saying.said.wait(60)
        pause.go_on.set()
        one.result(60)
        files = other.result(60)
    assert fitted == [1, 2, 3], "what the first one fitted is not fitted again"
    assert all(files.block(block).exists() for block in (1, 2, 3))


@pytest.mark.parametrize("name", ["index", "curvature-0123456789abcdef", "ranking-0123456789abcdef"])
def test_a_rebuild_does_not_take_the_files_of_a_command_that_is_running(
    audit_directory, data_file, model_directory, name
):
    layout = Layout(audit_directory)
    model = ModelOptions(str(model_directory), device="cpu")
    options = BuildOptions(str(data_file), audit_directory, model, layers=(1, 2, 3), sae="none", max_tokens=20)
    before = {path: path.stat().st_mtime_ns for path in audit_directory.rglob("*") if path.is_file()}
    with held(layout.lock_of(name), "{who}"), pytest.raises(StoreError, match=r"\(PID \d+.*computes on this audit"):
        build(replace(options, rebuild=True))
    after = {path: path.stat().st_mtime_ns for path in audit_directory.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path in before} == before
    assert Audit(audit_directory).overview().n_rows == 300


def test_a_command_that_begins_after_a_rebuild_does_not_mix_old_rows_in(audit, quick_index, data_file, model_directory):
    sources = audit.opened.sources()
    model = ModelOptions(str(model_directory), device="cpu")
    build(BuildOptions(str(data_file), audit.root, model, layers=(1, 2, 3), sae="none", max_tokens=20, rebuild=True))
    from concept_audit.pipeline.index.build import build_index

    with pytest.raises(StoreError, match="has been built anew meanwhile; open it again"):
        build_index(sources, ONE, Progress())
    assert present_index(Layout(audit.root), ROWS) is None
