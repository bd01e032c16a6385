"""Shards are handed to processes that come, fail and go; each is done, and what cannot be done is told in words."""

from __future__ import annotations

import os
import pickle
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from concept_audit.errors import AuditError, DataError, ModelError, StoreError
from concept_audit.model.options import ModelOptions, ModelSource
from concept_audit.pipeline.engine import Driver, Work, Worker
from concept_audit.pipeline.engines import dispatch
from concept_audit.pipeline.engines.dispatch import ATTEMPTS, Came, CrewEngine, Ended, Event, Gone, Told
from concept_audit.pipeline.engines.processes import ProcessEngine, devices
from concept_audit.pipeline.engines.worker import Machine, Receipt, State, WorkerProcess, own_device
from concept_audit.progress import Progress
from concept_audit.store.partition import ListedPartition
from concept_audit.store.shard_store import ShardSet, ShardStore, read_tensors

SIZES = (3, 1, 2, 5, 4, 2)


@dataclass(frozen=True)
class Numbering:
    """A work without a model: each shard holds its number.

    Attributes:
        fails: what is raised of a shard, by its number.
    """

    made: ShardSet
    fails: dict[int, Exception] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.made,)

    def open(self, worker: Worker) -> Worker:
        worker.say("opened")
        return worker

    def run(self, opened: Worker, number: int) -> None:
        for _ in range(self.made.partition.size(number)):
            opened.advance()
        if number in self.fails:
            raise self.fails[number]
        self.made.write_tensors(number, {"number": torch.tensor([number])})


@dataclass(frozen=True)
class Dying(Numbering):
    """As `Numbering`, but whoever makes a shard of `mortal` first ends without a word.

    Attributes:
        marks: where it is noted who has.
    """

    mortal: tuple[int, ...] = ()
    marks: Path = Path()

    def run(self, opened: Worker, number: int) -> None:
        if number in self.mortal and not list(self.marks.glob(f"{number}-*")):
            opened.advance()
            (self.marks / f"{number}-{os.getpid()}").touch()
            os._exit(3)
        super().run(opened, number)


class Faulty:
    """A crew in this process, of which some end: what befalls a shard is said beforehand."""

    def __init__(self, size: int, faults: dict[int, list[str]] | None = None, host: str | None = None):
        self.size, self.faults, self.closed = size, faults or {}, False
        self.machine = replace(Machine.here(), host=host or Machine.here().host)
        self.coming = list(range(size))
        self.hands: dict[int, tuple[Work[Any], int]] = {}
        self.sent: Counter[int] = Counter()
        self.chance = random.Random(1)
        self.processes = [WorkerProcess(None, 1) for _ in range(size)]

    def send(self, worker: int, work: Work[Any], number: int) -> None:
        assert worker not in self.hands, "one shard at a time"
        self.hands[worker] = (work, number)
        self.sent[number] += 1

    def events(self, seconds: float) -> Sequence[Event]:
        found: list[Event] = [Came(worker, self.machine) for worker in self.coming]
        self.coming = []
        if not self.hands:
            return found
        worker = self.chance.choice(sorted(self.hands))
        work, number = self.hands.pop(worker)
        fault = self.faults.get(number, []).pop(0) if self.faults.get(number) else None
        if fault == "gone after all":
            self.processes[worker].do(work, number)
        if fault in ("gone", "gone after all"):
            return [*found, Told(worker, State(number, 1, ())), Gone(worker, "killed")]
        outcome = self.processes[worker].do(work, number)
        if fault == "not written":
            work.outputs[0].path(number).unlink()
        told = Told(worker, self.processes[worker].state())
        return [*found, told, Ended(worker, replace(outcome, host=self.machine.host))]

    def replace(self, worker: int) -> None:
        self.coming.append(worker)

    def close(self) -> None:
        self.closed = True

    def wanting(self) -> str:
        return "Each needs a machine"


class Saying(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass(frozen=True)
class Odd(Numbering):
    """As `Numbering`, but raises what another process cannot find the class of."""

    def run(self, opened: Worker, number: int) -> None:
        class Own(Exception):
            """Of no module."""

        raise Own("odd")


@dataclass(frozen=True)
class Holding(Numbering):
    """As `Numbering`, with an array, as the prompts of a forecast are."""

    values: np.ndarray = field(default_factory=lambda: np.arange(3))


@pytest.fixture
def made(tmp_path) -> ShardSet:
    return ShardSet(ShardStore(tmp_path / "shards"), "numbers", "key", ListedPartition(SIZES))


def done(crew: Faulty, work: Numbering, progress: Progress | None = None):
    driver = Driver(CrewEngine(lambda say: crew), progress or Progress())
    return driver.finish(work, "Numbering", dict(enumerate(SIZES)))


def numbers(made: ShardSet) -> list[int]:
    return [int(read_tensors(made.complete(number))["number"]) for number in made.numbers()]


def test_what_a_worker_was_doing_when_it_ended_is_done_by_another(made):
    crew, progress = Faulty(2, {0: ["gone"], 3: ["gone", "gone"]}), Saying()
    stage = done(crew, Numbering(made), progress)
    assert numbers(made) == list(range(6))
    assert crew.sent == Counter({0: 2, 1: 1, 2: 1, 3: 3, 4: 1, 5: 1})
    assert stage.done == sum(SIZES), "what is done twice counts once"
    assert stage.detail.endswith("2 of 2 workers, 3 done again after a failure")
    assert progress.said.count("opened") == 1, "what every worker says is told once"
    assert sum("its work goes to another" in text for text in progress.said) == 1


@pytest.mark.parametrize("values", [np.arange(3), np.zeros(0)])
def test_a_worker_opens_a_work_once_whatever_it_holds(made, values):
    worker, said = WorkerProcess(None, 1), []
    for number, of in enumerate((values, values, values + 1)):
        # Every shard comes with a copy of its own.
        sent = pickle.loads(pickle.dumps(Holding(made, values=of)))
        assert isinstance(worker.do(sent, number), Receipt)
        said.append(worker.state().said)
    assert said == [("opened",), (), ("opened",) if len(values) else ()]


def test_the_largest_shards_are_begun_first(made):
    crew = Faulty(1)
    done(crew, Numbering(made))
    assert [SIZES[number] for number in crew.sent] == sorted(SIZES, reverse=True)


def test_a_shard_that_was_there_when_its_worker_ended_is_not_made_again(made):
    crew = Faulty(2, {2: ["gone after all"]})
    stage = done(crew, Numbering(made))
    assert crew.sent == Counter(range(6)) and numbers(made) == list(range(6))
    assert stage.done == sum(SIZES) - 1, "what was told of it"


def test_a_work_that_ends_every_worker_ends_in_words(made):
    crew = Faulty(2, {4: ["gone"] * ATTEMPTS})
    with pytest.raises(AuditError, match=f"{ATTEMPTS} workers ended while they made shard 4.*memory.*--workers"):
        done(crew, Numbering(made))
    assert crew.closed and crew.sent[4] == ATTEMPTS


def test_what_a_work_raises_for_the_user_is_raised_here_and_at_once(made):
    crew = Faulty(2)
    with pytest.raises(DataError, match="^row 7: no assistant turn$"):
        done(crew, Numbering(made, {1: DataError("row 7: no assistant turn")}))
    assert crew.closed and crew.sent[1] == 1


def test_an_error_on_another_machine_says_where(made):
    with pytest.raises(DataError, match="^row 7: no assistant turn .on node-3; every machine must see"):
        done(Faulty(2, host="node-3"), Numbering(made, {1: DataError("row 7: no assistant turn")}))


def test_a_fault_of_the_system_is_tried_again_and_one_of_the_program_is_not(made):
    crew = Faulty(1)
    with pytest.raises(OSError, match="stale file handle"):
        done(crew, Numbering(made, {2: OSError("stale file handle")}))
    assert crew.sent[2] == ATTEMPTS
    crew = Faulty(1)
    with pytest.raises(ZeroDivisionError) as raised:
        done(crew, Numbering(made, {2: ZeroDivisionError("division by zero")}))
    assert crew.sent[2] == 1
    assert "test_dispatch.py" in raised.value.__notes__[0], "where it happened is told"


def test_an_error_that_cannot_be_sent_is_told_all_the_same(made):
    with pytest.raises(RuntimeError, match="Own: odd"):
        done(Faulty(1), Odd(made))


def test_what_a_machine_says_it_has_written_must_be_seen_here(made, monkeypatch):
    monkeypatch.setattr(dispatch, "SEEN_SECONDS", 0.0)
    with pytest.raises(StoreError, match="node-3 has written numbers/key/2, which cannot be seen.*another --out"):
        done(Faulty(1, {2: ["not written"]}, host="node-3"), Numbering(made))


def test_a_machine_with_other_packages_is_refused(made):
    crew = Faulty(1, host="node-3")
    crew.machine = replace(crew.machine, versions=crew.machine.versions | {"torch": "1.0"})
    with pytest.raises(AuditError, match="node-3 has other packages.*torch 1.0, here"):
        done(crew, Numbering(made))


def test_workers_that_never_come_and_those_that_end_before_they_begin_are_told_of(made, monkeypatch):
    monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.0)
    crew = Faulty(1)
    crew.coming = []
    with pytest.raises(AuditError, match="no worker has come.*Each needs a machine"):
        done(crew, Numbering(made))

    class Stillborn(Faulty):
        def events(self, seconds):
            return [Gone(self.coming.pop(), "exit status 1")] if self.coming else []

    monkeypatch.undo()
    with pytest.raises(AuditError, match="end before they begin .exit status 1"):
        done(Stillborn(2), Numbering(made))


def test_a_crew_stays_from_one_work_to_the_next(made):
    begun = []

    def begin(say):
        begun.append(Faulty(2))
        return begun[-1]

    other = replace(made, key="other")
    with CrewEngine(begin) as engine:
        for shards in (made, other):
            Driver(engine).finish(Numbering(shards), "Numbering", dict(enumerate(SIZES)))
    (crew,) = begun
    assert numbers(made) == numbers(other) and crew.closed


def test_a_receipt_says_what_was_made(made):
    receipt = WorkerProcess(None, 1).do(Numbering(made), 3)
    assert isinstance(receipt, Receipt)
    assert (receipt.shards, receipt.rows, receipt.units) == (("numbers/key/3",), 5, 5)


@dataclass(frozen=True)
class Loading(Numbering):
    """As `Numbering`, with a model."""

    model: ModelSource | None = None

    def open(self, worker: Worker) -> Worker:
        assert self.model is not None
        worker.model(self.model)
        return worker


def test_a_model_that_is_not_the_one_that_is_meant_is_refused_once(made, model_directory, tmp_path):
    source = ModelSource(ModelOptions(str(model_directory), device="cpu", dtype="float32"), tmp_path, "0123")
    crew = Faulty(2)
    with pytest.raises(ModelError, match="its weights on .* have the fingerprint .*, but 0123 where the command runs"):
        done(crew, Loading(made, model=source))
    assert sum(crew.sent.values()) <= crew.size
    with pytest.raises(ModelError, match="--model nowhere/to/be/found: does not exist"):
        done(Faulty(1), Loading(made, model=replace(source, options=ModelOptions("nowhere/to/be/found", "cpu"))))


def test_a_worker_runs_the_model_on_its_own_gpu_unless_another_kind_of_device_is_asked_for():
    assert own_device("auto", "cuda:3") == own_device("cuda:0", "cuda:3") == "cuda:3"
    assert own_device("auto", None) == own_device("cpu", "cuda:3") == "cpu"
    assert own_device("cuda:1", None) == "cuda"


def test_a_process_that_ends_is_begun_anew(made, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    progress = Saying()
    with ProcessEngine(workers=2, gpus_per_worker=0) as engine:
        work = Dying(made, mortal=(1,), marks=marks)
        stage = Driver(engine, progress).finish(work, "Numbering", dict(enumerate(SIZES)))
    assert numbers(made) == list(range(6)) and len(list(marks.iterdir())) == 1
    assert stage.done == sum(SIZES) and any("exit status 3" in text for text in progress.said)


def test_each_process_has_its_share_of_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices(None, None) == ("cuda:0", "cuda:1")
    assert devices(1, None) == ("cuda:0",)
    assert devices(None, 0.5) == ("cuda:0", "cuda:0", "cuda:1", "cuda:1")
    assert devices(3, 0) == (None, None, None)
    for workers, share in ((3, 1), (1, 2)):
        with pytest.raises(AuditError, match="2 GPUs, which is room for"):
            devices(workers, share)
