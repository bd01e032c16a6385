"""The short form of `engines`: a worker ends in one stage, and a machine of the cluster in the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from concept_audit import BuildOptions, ModelOptions, build
from concept_audit.pipeline.engine import Engine, Work, missing_of
from concept_audit.pipeline.engines.on_ray import RayEngine
from concept_audit.progress import Progress, Stage
from tests.faults import material
from tests.faults.engines import Cluster

ROWS = 1100
"""Five shards."""


@dataclass
class Ending:
    """Ends something as soon as the first shard of a work is there."""

    inner: Engine
    faults: dict[str, Callable[[], bool]]
    ended: list[str] = field(default_factory=list)

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        name = type(work).__name__
        thread = threading.Thread(target=self._end, args=(work, name), daemon=True)
        thread.start()
        self.inner.run(work, missing, stage, progress)
        thread.join()

    def _end(self, work: Work[Any], name: str) -> None:
        while len(missing_of(work)) == len(work.outputs[-1].partition):
            time.sleep(0.01)
        if self.faults[name]():
            self.ended.append(name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray is not installed")
    made = Cluster()
    yield made
    made.close()


def test_a_build_goes_on_where_a_worker_ends_and_then_a_machine(cluster, tmp_path):
    made = material.make(tmp_path / "material", ROWS)

    def options(name: str) -> BuildOptions:
        model = ModelOptions(str(made.model), device="cpu")
        return BuildOptions(data=str(made.data), out=tmp_path / name, model=model, layers=(1, 2), sae="none")

    build(options("local"))
    with RayEngine(cluster.address, workers=2) as engine:
        ending = Ending(engine, {"Tokenizing": cluster.end_worker, "RunningModel": cluster.end_machine})
        build(options("ray"), engine=ending)
    assert ending.ended == ["Tokenizing", "RunningModel"]
    assert not material.differing(*(material.contents(tmp_path / name) for name in ("local", "ray")))
