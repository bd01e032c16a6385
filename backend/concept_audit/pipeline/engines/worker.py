"""A process that does work: it loads the model once, and makes the shards that it is handed one after the other."""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from concept_audit.errors import ModelError
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.engine import Work, Worker
from concept_audit.progress import Progress
from concept_audit.store.manifest import package_versions


@dataclass(frozen=True)
class Machine:
    """Where a process runs.

    Attributes:
        host, pid: of the process.
        versions: of the packages that decide what it computes.
    """

    host: str
    pid: int
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Machine:
        return cls(socket.gethostname(), os.getpid(), package_versions())


@dataclass(frozen=True)
class Receipt:
    """A shard that has been committed.

    Attributes:
        number: of the shard.
        shards: ``kind/key/number`` of each file that holds it.
        rows: that it holds.
        units: how many the worker told to be done.
        seconds: that it took.
        host: where it was made.
    """

    number: int
    shards: tuple[str, ...]
    rows: int
    units: int
    seconds: float
    host: str


@dataclass(frozen=True)
class Failure:
    """A shard that could not be made.

    Attributes:
        error: as the work raised it.
        trace: where, in words, since a traceback cannot be sent.
    """

    number: int
    error: Exception
    trace: str
    host: str


Outcome = Receipt | Failure


@dataclass(frozen=True)
class State:
    """How far a worker is with the shard in hand.

    Attributes:
        units: that are done of it.
        said: what people should know, in order.
    """

    number: int
    units: int
    said: tuple[str, ...]


class WorkerProcess:
    """Does what it is handed; keeps the model, and what the shards of one work share, from one to the next.

    Args:
        gpu: the device that is its own; None if it has none.
        threads: that sums are taken with.
        tell: told the state whenever it changes.
    """

    def __init__(self, gpu: str | None, threads: int, tell: Callable[[State], None] = lambda state: None):
        self._gpu, self._threads, self._tell = gpu, threads, tell
        self._model: tuple[ModelSource, LanguageModel] | None = None
        self._opened: tuple[bytes, Any] | None = None
        self._number, self._units = -1, 0
        self._said: list[str] = []
        self._guard = threading.Lock()

    def do(self, work: Work[Any], number: int) -> Outcome:
        """Make one shard. What goes wrong is given back, for an exception need not survive being sent."""
        # PyTorch keeps the number for each thread that calls it.
        torch.set_num_threads(self._threads)
        with self._guard:
            self._number, self._units, self._said = number, 0, []
        started, host = time.monotonic(), socket.gethostname()
        try:
            work.run(self._open(work), number)
            shards = tuple(f"{out.kind}/{out.key}/{number}" for out in work.outputs)
            rows = work.outputs[-1].partition.size(number)
        except Exception as error:
            self._opened = None
            return Failure(number, _sendable(error), traceback.format_exc(), host)
        return Receipt(number, shards, rows, self._units, time.monotonic() - started, host)

    def state(self) -> State:
        """How far it is; may be asked from another thread."""
        with self._guard:
            return State(self._number, self._units, tuple(self._said))

    def _open(self, work: Work[Any]) -> Any:
        # Each shard comes with a copy of the work. Arrays within have no one truth whether they are equal; bytes have.
        told = pickle.dumps(work)
        if self._opened is None or self._opened[0] != told:
            self._opened = None  # its room is needed for what follows
            for objects in {out.store.objects for out in work.outputs if out.store.objects is not None}:
                objects.settle()
            self._opened = told, work.open(Worker(self._loaded, self._advance, self._say))
        return self._opened[1]

    def _loaded(self, source: ModelSource) -> LanguageModel:
        source = replace(source, options=replace(source.options, device=own_device(source.options.device, self._gpu)))
        if self._model is None or self._model[0] != source:
            self._model = None
            lm = load_model(source.options, source.cache, Progress())
            if lm.fingerprint != source.fingerprint:
                raise ModelError(
                    f"{source.options.name}: its weights on {socket.gethostname()} have the fingerprint "
                    f"{lm.fingerprint}, but {source.fingerprint} where the command runs; put the same files there"
                )
            self._model = source, lm
        return self._model[1]

    def _advance(self, units: int = 1, detail: str | None = None) -> None:
        with self._guard:
            self._units += units
        self._tell(self.state())

    def _say(self, text: str) -> None:
        with self._guard:
            self._said.append(text)
        self._tell(self.state())


def _sendable(error: Exception) -> Exception:
    """The error itself, if another process can be sent it; else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def own_device(asked: str, gpu: str | None) -> str:
    """Where a worker's model runs: on its own GPU, unless another kind of device is asked for."""
    if asked == "auto":
        return gpu or "cpu"
    return gpu or "cuda" if asked.startswith("cuda") else asked
