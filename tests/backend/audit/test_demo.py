"""The order in which the demo is finished behind the app: what people meet first comes first."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace

import pytest

from concept_audit import Audit, CurvatureOptions, IndexOptions, ModelOptions
from concept_audit.audit import demo
from concept_audit.cli import building
from concept_audit.data.demo import DATA, PROBES
from concept_audit.progress import Progress
from tests.backend.influence.test_attribution import labelled

FEW = IndexOptions(row_bytes=512, samples=48, curvature=CurvatureOptions(curvature_tokens=500), precision="float32")
NAMES = [f"probe:{name}" for name in PROBES]


@pytest.fixture
def audit(built, tmp_path, monkeypatch):
    audit = Audit(shutil.copytree(built, tmp_path / "demo"))
    for name in PROBES:
        audit.train_probe(name, labelled(), layer=2)
    monkeypatch.setattr(demo, "INDEX", FEW)
    monkeypatch.setattr(demo, "RANKED_FEATURES", 5)
    monkeypatch.setattr(demo, "FEATURES_AT_ONCE", 2)
    return audit


@pytest.fixture
def done(audit, monkeypatch) -> list:
    """What has been done, in order."""
    steps: list = []
    rank, measure = audit.rank_many, "concept_audit.pipeline.index.build.measure_fidelity"

    def ranking(concepts, progress):
        before = [audit.rankings.has(name, "concept_influence") for name in concepts]
        rank(concepts, progress=progress)
        assert all(audit.rankings.served_by_index(name, "concept_influence") for name in concepts)
        assert all(audit.rankings.has(name, "concept_influence") for name in concepts)
        if not all(before):
            steps.append(list(concepts))

    def measuring(*arguments):
        steps.append("fidelity")
        return {"spearman": 1.0}

    monkeypatch.setattr(audit, "rank_many", ranking)
    monkeypatch.setattr(measure, measuring)
    return steps


def test_probes_come_first_then_fidelity_then_features_a_few_at_a_time(audit, done):
    demo.finish_demo(audit, Progress())
    features = list(audit.concepts.spread(5))
    assert done == [NAMES, "fidelity", features[:2], features[2:4], features[4:]]
    assert audit.index.describe()["fidelity"] == {"spearman": 1.0}
    demo.finish_demo(audit, Progress())
    assert len(done) == 5


def test_a_demo_that_was_stopped_while_its_index_was_checked_goes_on_there(audit, done, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("concept_audit.pipeline.index.build.measure_fidelity", stopped)
        demo.finish_demo(audit, Progress())
    assert done == [NAMES]
    demo.finish_demo(audit, Progress())
    assert done[1] == "fidelity" and len(done) == 5


def test_a_probe_deleted_meanwhile_and_an_index_of_other_options_are_left_alone(audit, done):
    theirs = audit.build_index(IndexOptions(row_bytes=256, samples=32, curvature=FEW.curvature, precision="float32"))
    audit.probes.delete(next(iter(PROBES)))
    demo.finish_demo(audit, Progress())
    assert audit.index.describe() == theirs
    assert done[:2] == ["fidelity", NAMES[1:]] and len(done) == 5


@pytest.mark.parametrize("kind", ["preferences", "agents"])
def test_pairs_and_trajectories_have_audits_of_their_own_with_their_probes_ranked(
    kind, tmp_path, model_directory, monkeypatch
):
    small = demo.build
    options = {"layers": (2,), "model": ModelOptions(str(model_directory), device="cpu"), "max_tokens": 256}
    monkeypatch.setattr(demo, "build", lambda asked, progress: small(replace(asked, **options), progress))
    audit = demo.build_demo(tmp_path, Progress(), kind=kind)
    assert audit.root == tmp_path / f"demo-{kind}" and bool(audit.manifest.pair) == (kind == "preferences")
    (name,) = DATA[kind].probes
    ranked = audit.rankings.table(name)
    assert (ranked["origin"] == DATA[kind].origin[name]).sum() == {"preferences": 15, "agents": 10}[kind]
    asked: list = []
    monkeypatch.setattr(audit, "rank_many", lambda concepts, progress: asked.append(concepts))
    demo.finish_demo(audit, Progress(), kind)
    assert asked == [[f"probe:{name}"]] and audit.index.describe() is None


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="priorities are POSIX's")
def test_what_runs_behind_the_app_gives_way_to_it(tmp_path, monkeypatch):
    waiting = tmp_path / "waiting"
    waiting.write_text("#!/bin/sh\nexec sleep 60\n")
    waiting.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(waiting))
    with building._in_background(["demo"], tmp_path / "log") as process:
        assert process.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == building.NICENESS > os.getpriority(os.PRIO_PROCESS, 0)
    assert process.poll() is not None
