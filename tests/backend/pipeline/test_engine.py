"""Whoever does the work, in whatever order and in however many processes: the store and the rankings are the same."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch

from concept_audit import Audit, BuildOptions, CurvatureOptions, IndexOptions, InfluenceOptions, ModelOptions, build
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelSource
from concept_audit.pipeline import answers, curvature
from concept_audit.pipeline.engine import Driver, Engine, LocalEngine, Work, Worker, missing_of
from concept_audit.pipeline.engines.dispatch import CrewEngine
from concept_audit.pipeline.engines.on_ray import RayEngine
from concept_audit.pipeline.engines.processes import ProcessEngine
from concept_audit.progress import Progress, Stage
from concept_audit.store import partition
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from tests.backend.influence.test_attribution import labelled
from tests.conftest import SMALL_SAE, chat_rows, write_jsonl

EXACT = InfluenceOptions.of(engine="exact", curvature_tokens=4_000)
FROM_INDEX = InfluenceOptions.of(engine="index")
INDEX = IndexOptions(row_bytes=1024, samples=60, curvature=CurvatureOptions(curvature_tokens=4_000))
SIZES = {
    (partition, "UNIT_ROWS"): 16,
    (partition, "SHARDS_OF_A_SIZE"): 2,
    (curvature, "PART_TOKENS"): 700,
    (answers, "ANSWER_TOKENS"): 12,
}
"""So that little data make several shards, some of several units, and the curvature is summed in parts."""
SHARDS = {0: 16, 1: 16, 2: 32, 3: 32, 4: 24}
WORKS = {"Answering", "CompressingRows", "FindingFeatures", "RunningModel", "Scoring", "Tokenizing"}
CURVATURE = {"Summing", "Decomposing"}
"""Works whose shards are not of the data's rows."""


@lru_cache(maxsize=1)
def loaded(source: ModelSource) -> LanguageModel:
    """A process loads its model once."""
    return load_model(source.options, source.cache, Progress())


@dataclass
class Recording:
    """Keeps what it is asked to do, and has another engine do it."""

    inner: Engine
    works: list[tuple[Work[Any], list[int]]] = field(default_factory=list)

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        self.works.append((work, list(missing)))
        self.inner.run(work, missing, stage, progress)


@dataclass(frozen=True)
class Shuffled:
    """Does shards in an order of chance."""

    chance: random.Random = field(default_factory=lambda: random.Random(3))

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        LocalEngine(loaded).run(work, self.chance.sample(missing, len(missing)), stage, progress)


@dataclass(frozen=True)
class OneByOne:
    """Sends the work anew for each shard, and opens it anew: the last shard first."""

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        for number in reversed(missing):
            sent = pickle.loads(pickle.dumps(work))
            sent.run(sent.open(Worker(loaded, stage.advance, progress.say)), number)


@dataclass(frozen=True)
class Small:
    """A work that makes small shards, whatever process it is done in."""

    work: Work[Any]

    @property
    def outputs(self) -> Any:
        return self.work.outputs

    def open(self, worker: Worker) -> Any:
        for (module, name), value in SIZES.items():
            setattr(module, name, value)
        return self.work.open(worker)

    def run(self, opened: Any, number: int) -> None:
        self.work.run(opened, number)


@dataclass(frozen=True)
class SmallShards:
    """Has another engine make small shards."""

    inner: Engine

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        self.inner.run(Small(work), missing, stage, progress)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for (module, name), value in SIZES.items():
            patched.setattr(module, name, value)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("engine") / "rows.jsonl", chat_rows(sum(SHARDS.values()), seed=5))


def options(data: Path, model: Path, out: Path) -> BuildOptions:
    return BuildOptions(
        data=str(data),
        out=out,
        model=ModelOptions(str(model), device="cpu"),
        layers=(1, 2),
        sae_layer=2,
        sae_training=SMALL_SAE,
        # The activations of some rows are kept, and those of the others computed once more.
        sae_disk=300_000,
    )


def audited(data: Path, model: Path, out: Path, engine: Engine) -> Path:
    """An audit with all that an engine has a part in."""
    audit = Audit(build(options(data, model, out), engine=engine), engine=engine, device="cpu")
    audit.train_probe("tone", labelled(), layer=2)
    audit.rank("tone", "projection_difference")
    audit.rank("tone", "concept_influence", options=EXACT)
    audit.rank("tone", "influence_function", options=EXACT.changed(curvature="identity", unit_normalised=True))
    audit.build_index(INDEX)
    audit.rank("tone", "concept_influence", options=FROM_INDEX)
    return out


def tables(database: Path, names: Sequence[str] | None = None) -> dict[str, list]:
    """Tables of a database, all or some."""
    with duckdb.connect(str(database), read_only=True) as con:
        every = con.execute("SELECT table_name FROM duckdb_tables() WHERE schema_name = 'base'").fetchall()
        return {
            # When a ranking was asked for last says nothing of it.
            name: con.execute(f"SELECT COLUMNS(lambda c: c <> 'used') FROM base.{name} ORDER BY ALL").fetchall()
            for (name,) in every
            if names is None or name in names
        }


def shards_of(root: Path) -> dict[str, bytes]:
    """Every numbered shard."""
    paths = [path for path in (root / "shards").rglob("*") if path.stem.isdigit()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def recorded(data, model_directory, tmp_path_factory) -> tuple[Path, Recording]:
    """The audit by the local engine, and the works that it did."""
    engine = Recording(LocalEngine(loaded))
    return audited(data, model_directory, tmp_path_factory.mktemp("local") / "audit", engine), engine


def same(found: Path, expected: Path) -> None:
    for file, names in (("audit.duckdb", None), ("derived.duckdb", ["rankings", "ranking_scores"])):
        made, wanted = tables(found / file, names), tables(expected / file, names)
        assert made.keys() == wanted.keys()
        assert {name for name, rows in wanted.items() if not rows} <= {"skipped_rows", "rollouts", "windows"}, (
            "of other rows"
        )
        assert [name for name in wanted if made[name] != wanted[name]] == []
    made_shards, wanted_shards = shards_of(found), shards_of(expected)
    assert made_shards.keys() == wanted_shards.keys()
    assert [name for name in wanted_shards if made_shards[name] != wanted_shards[name]] == []


def test_all_heavy_work_goes_through_the_engine(recorded):
    root, engine = recorded
    assert RowPartition(120).sizes() == SHARDS
    assert {type(work).__name__ for work, _ in engine.works} == WORKS | CURVATURE
    assert all(missing for _, missing in engine.works), "an engine is not asked to do nothing"
    of_rows = [missing for work, missing in engine.works if type(work).__name__ not in CURVATURE]
    assert of_rows == [list(SHARDS)] * len(of_rows)
    assert all(0 < work.sample.share < 1 for work, _ in engine.works if type(work).__name__ == "RunningModel")
    for name in CURVATURE:
        assert max(len(missing) for work, missing in engine.works if type(work).__name__ == name) > 1
    assert {"rows", "tokens", "activations", "features", "answers", "answer_activations", "index"} <= {
        path.split("/")[1] for path in shards_of(root)
    }


def test_works_are_small_values_that_can_be_sent(recorded):
    _, engine = recorded
    for work, _ in engine.works:
        sent = pickle.dumps(work)
        assert len(sent) < 20_000, f"{type(work).__name__} takes its data along"
        assert pickle.loads(sent) == work


@contextmanager
def crew(engine: CrewEngine) -> Iterator[SmallShards]:
    with engine:
        yield SmallShards(engine)


@contextmanager
def here(engine: Engine) -> Iterator[Engine]:
    yield engine


SHARE = 0.5 if torch.cuda.is_available() else None
"""Of an accelerator, where there is one: two workers have room on one card."""
ENGINES = {
    "shuffled": lambda: here(Shuffled()),
    "one by one": lambda: here(OneByOne()),
    "processes": lambda: crew(ProcessEngine(workers=2, gpus_per_worker=SHARE)),
    "ray": lambda: crew(RayEngine(workers=2, gpus_per_worker=SHARE)),
}


@pytest.mark.parametrize("name", list(ENGINES))
def test_other_engines_give_the_same_audit_bit_for_bit(recorded, data, model_directory, tmp_path, name):
    root, _ = recorded
    if name == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    with ENGINES[name]() as engine:
        same(audited(data, model_directory, tmp_path / "audit", engine), root)


def test_scores_do_not_depend_on_how_many_units_a_shard_has(data, model_directory, tmp_path, monkeypatch):
    found = []
    for size in (2, 64):
        monkeypatch.setattr(partition, "SHARDS_OF_A_SIZE", size)
        made = replace(options(data, model_directory, tmp_path / str(size)), sae="none")
        audit = Audit(build(made), device="cpu")
        audit.train_probe("tone", labelled(), layer=2)
        for method in ("vector_filter", "projection_difference", "concept_influence"):
            audit.rank("tone", method, options=EXACT)
        assert len(list((made.out / "shards" / "tokens").rglob("*.parquet"))) == {2: 5, 64: 8}[size]
        found.append((tables(made.out / "audit.duckdb"), tables(made.out / "derived.duckdb", ["ranking_scores"])))
    assert found[0] == found[1]


def test_a_known_sae_goes_along_with_the_pass(recorded, data, model_directory, tmp_path):
    """The features come out in one pass then; they are the same on any engine."""
    root, _ = recorded
    made = BuildOptions(
        data=str(data),
        out=tmp_path / "here",
        model=ModelOptions(str(model_directory), device="cpu"),
        layers=(1, 2),
        sae=str(Layout(root).sae),
        sae_layer=2,
    )
    engine = Recording(LocalEngine(loaded))
    build(made, engine=engine)
    assert [type(work).__name__ for work, _ in engine.works] == ["Tokenizing", "RunningModel"]
    there = replace(made, out=tmp_path / "there")
    build(there, engine=OneByOne())
    assert shards_of(there.out) == shards_of(made.out)


def test_an_engine_is_asked_only_for_what_is_missing(recorded, data, model_directory):
    root, engine = recorded
    (work,) = [work for work, _ in engine.works if type(work).__name__ == "RunningModel"]
    expected = shards_of(root)
    lost = work.means.path(1)
    lost.unlink()
    assert missing_of(work) == [1]
    again = Recording(OneByOne())
    stage = Driver(again).finish(work, "Running the model", SHARDS)
    assert [missing for _, missing in again.works] == [[1]]
    assert (stage.skipped, stage.total) == (104, 120)
    assert shards_of(root) == expected
    Driver(again).finish(work, "Running the model", SHARDS)
    assert len(again.works) == 1


def test_a_shard_that_fails_leaves_the_others_and_is_done_next_time(recorded, data, model_directory, tmp_path):
    root, _ = recorded

    class Failing:
        def run(self, work, missing, stage, progress):
            opened = work.open(Worker(loaded, stage.advance, progress.say))
            for number in missing:
                if type(work).__name__ == "RunningModel" and number == 1:
                    raise OSError("this machine has gone")
                work.run(opened, number)

    made = options(data, model_directory, tmp_path / "audit")
    with pytest.raises(OSError, match="has gone"):
        build(made, engine=Failing())
    engine = Recording(LocalEngine(loaded))
    build(made, engine=engine)
    assert tables(made.out / "audit.duckdb") == tables(root / "audit.duckdb")
    (missing,) = [missing for work, missing in engine.works if type(work).__name__ == "RunningModel"]
    assert missing == [1, 2, 3, 4]
