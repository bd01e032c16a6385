"""Who does the heavy work: for each shard that is missing, compute and commit.

A stage describes its work once, as a small value that can be sent to another process.
An engine decides where it is done. What a shard holds never depends on that: units of
batching are fixed by the data (`concept_audit.store.partition`), and sums over the data
are taken over fixed partitions, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.progress import Progress, Stage
from concept_audit.store.shard_store import ShardSet

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Worker:
    """A process that does work: where it gets its model, and whom it tells how far it is.

    Attributes:
        model: gives the model; a process loads it once.
        advance: told how many units are done, and a few words on the state; as `Stage.advance`.
        say: told what people should know.
    """

    model: Callable[[ModelSource], LanguageModel]
    advance: Callable[..., None] = lambda units=1, detail=None: None
    say: Callable[[str], None] = lambda text: None


class Work(Protocol[Opened]):
    """What a stage does for each shard. Small and picklable: options, and where shards lie.

    Attributes:
        outputs: the shards that it makes; the last of them is committed last.
    """

    @property
    def outputs(self) -> tuple[ShardSet, ...]: ...

    def open(self, worker: Worker) -> Opened:
        """Load what all shards need: model, SAE, query, projection. Once a worker."""

    def run(self, opened: Opened, number: int) -> None:
        """Compute one shard and commit it."""


class Engine(Protocol):
    """Does work, somewhere."""

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        """Do the shards of these numbers; returns when all are committed."""


@dataclass(frozen=True)
class LocalEngine:
    """Does everything in this process, one shard after the other.

    Attributes:
        model: gives the model.
    """

    model: Callable[[ModelSource], LanguageModel]

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        opened = work.open(Worker(self.model, stage.advance, progress.say))
        for number in missing:
            work.run(opened, number)


@dataclass(frozen=True)
class Driver:
    """Runs stages: finds out which shards are missing, and has an engine make them.

    Attributes:
        engine: does the work.
        progress: told how far it is.
    """

    engine: Engine
    progress: Progress = field(default_factory=Progress)

    def finish(self, work: Work[Any], name: str, sizes: Mapping[int, int], unit: str = "rows") -> Stage:
        """Do what is missing of some work.

        Args:
            name: what people are told is being done.
            sizes: shard → its units, for the progress.

        Returns:
            the stage, with how many units were done and skipped.
        """
        missing = missing_of(work)
        with self.progress.stage(name, sum(sizes.values()), unit) as stage:
            stage.skip(sum(size for number, size in sizes.items() if number not in missing))
            if missing:
                self.engine.run(work, missing, stage, self.progress)
        return stage


def missing_of(work: Work[Any]) -> list[int]:
    """The shards of which any output is missing."""
    return sorted({number for output in work.outputs for number in output.missing()})
