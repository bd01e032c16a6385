"""``--engine processes``: several processes on this machine, each with a GPU or a share of the CPU."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from concept_audit.errors import AuditError
from concept_audit.pipeline.engine import Work
from concept_audit.pipeline.engines.dispatch import Came, CrewEngine, Ended, Event, Gone, Told
from concept_audit.pipeline.engines.worker import Failure, Machine, Receipt, State, WorkerProcess

TELL_SECONDS = 0.5
JOIN_SECONDS = 10.0


class ProcessEngine(CrewEngine):
    """Does the work in processes of this machine, with as many threads each as this one has.

    A process that ends is begun anew, and what it was doing is done again.

    Args:
        workers: how many; None for one a GPU or, without GPUs, as many as the CPUs have room for.
        gpus_per_worker: 1 or a share of one; 0 leaves GPUs alone, None takes 1 where there are GPUs.

    Raises:
        AuditError: a number that makes no sense here.
    """

    def __init__(self, workers: int | None = None, gpus_per_worker: float | None = None):
        self.devices = devices(workers, gpus_per_worker)
        super().__init__(lambda say: _Processes(self.devices, torch.get_num_threads()))


def devices(workers: int | None, gpus_per_worker: float | None) -> tuple[str | None, ...]:
    """The GPU of each worker; None for those without.

    Raises:
        AuditError: there are not so many GPUs, or a worker cannot have so many.
    """
    gpus = torch.cuda.device_count()
    share = float(gpus > 0) if gpus_per_worker is None else gpus_per_worker
    if not share:
        return (None,) * (workers or max(1, cores() // torch.get_num_threads()))
    room = math.floor(gpus / share + 1e-9) if share <= 1 else 0
    if workers and workers > room or not room:
        raise AuditError(
            f"--gpus-per-worker {share:g}: this machine has {gpus} GPUs, which is room for {room} workers; start so "
            "many with --workers, or give each a smaller share (1 at most)"
        )
    # As many on each GPU as it has room for.
    return tuple(f"cuda:{worker * gpus // room}" for worker in range(workers or room))


def cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Processes:
    """A crew of processes that share nothing with this one but the disk."""

    def __init__(self, devices: Sequence[str | None], threads: int):
        self._devices, self._threads = devices, threads
        # Spawned: what CUDA and threads hold does not survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._there: dict[int, tuple[SpawnProcess, connection.Connection]] = {}
        for worker in range(self.size):
            self.replace(worker)

    @property
    def size(self) -> int:
        return len(self._devices)

    def replace(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self._devices[worker], self._threads), name=f"worker {worker}", daemon=True
        )
        process.start()
        # Only they hold it then, and it closes when they end.
        theirs.close()
        self._there[worker] = process, ours

    def send(self, worker: int, work: Work[Any], number: int) -> None:
        try:
            self._there[worker][1].send((work, number))
        except OSError:
            return  # it has ended, which is told where its pipe is read

    def events(self, seconds: float) -> list[Event]:
        ends = {ours: worker for worker, (_, ours) in self._there.items()}
        return [self._read(ends[ours]) for ours in connection.wait(list(ends), seconds)]  # type: ignore[index]

    def close(self) -> None:
        for process, _ in self._there.values():
            process.kill()
        for process, ours in self._there.values():
            process.join(JOIN_SECONDS)
            ours.close()
        self._there.clear()

    def wanting(self) -> str:
        return "Processes are begun, and load neither Python nor PyTorch: see what else this machine does"

    def _read(self, worker: int) -> Event:
        process, ours = self._there[worker]
        try:
            match ours.recv():
                case Machine() as machine:
                    return Came(worker, machine)
                case State() as state:
                    return Told(worker, state)
                case Receipt() | Failure() as outcome:
                    return Ended(worker, outcome)
                case other:
                    raise TypeError(f"a worker said {other!r}")
        except (EOFError, OSError):
            process.join(JOIN_SECONDS)
            ours.close()
            del self._there[worker]
            return Gone(worker, how_it_ended(process.exitcode))


def serve(theirs: connection.Connection, gpu: str | None, threads: int) -> None:
    """What a process does: as it is told, until nobody is there to tell it."""
    # Ctrl-C goes to all processes of a terminal; the one that began them ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = 0.0

    def tell(state: State) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            theirs.send(state)

    try:
        worker = WorkerProcess(gpu, threads, tell)
        theirs.send(Machine.here())
        while True:
            work, number = theirs.recv()
            theirs.send(worker.do(work, number))
    except (EOFError, OSError):
        return


def how_it_ended(code: int | None) -> str:
    """The exit status of a process, in words."""
    if code is None:
        return "it does not answer"
    if code < 0:
        out_of_memory = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{out_of_memory}"
    return f"exit status {code}"
