"""``--engine ray``: the workers of a Ray cluster, or of a Ray that is started on this machine.

One actor a worker. Data do not pass through Ray: an actor reads shards from the audit's
directory and writes shards to it, and what is sent is a work (a small value), a number,
and a receipt. Ray starts no actor again by itself (`max_restarts`): one that has gone is
replaced here, since only here is it known what it was doing and how often that has failed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from concept_audit.errors import AuditError, first_line
from concept_audit.pipeline.engine import Work
from concept_audit.pipeline.engines.dispatch import Came, CrewEngine, Ended, Event, Gone, Told
from concept_audit.pipeline.engines.processes import cores
from concept_audit.pipeline.engines.worker import Machine, Outcome, State, WorkerProcess

ADDRESS_VARIABLE = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 80 << 20
"""Of a Ray that is started here: Ray's least, for nothing but receipts pass through it."""
END_SECONDS = 10.0


class RayEngine(CrewEngine):
    """Does the work in actors of a Ray cluster, with as many threads each as this process has.

    An actor that ends is replaced, and what it was doing is done again. The audit, the model and the cache must
    lie where every machine sees the same files under the same paths.

    Args:
        address: of the cluster, ``HOST:PORT``, or ``auto`` for the one that this machine is part of; None for what
            ``RAY_ADDRESS`` says, else a Ray is started on this machine. Where Ray is initialised already it is used.
        workers: how many; None for one a GPU or, without GPUs, as many as the CPUs have room for.
        gpus_per_worker: 1 or a share of one; 0 leaves GPUs alone, None takes 1 where the cluster has GPUs.

    Raises:
        AuditError: Ray is not installed, the address is one of Ray Client, or a worker is to have several GPUs.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, gpus_per_worker: float | None = None):
        _ray()
        address = address or os.environ.get(ADDRESS_VARIABLE) or "local"
        if address.startswith("ray://"):
            raise AuditError(
                f"--ray-address {address}: Ray Client runs a command far from its cluster, and this one writes files; "
                "run the command on a machine of the cluster with --ray-address auto"
            )
        if gpus_per_worker is not None and gpus_per_worker > 1:
            raise AuditError(f"--gpus-per-worker {gpus_per_worker:g}: a worker uses one GPU; give 1, or a share of one")
        super().__init__(lambda say: _Actors(address, workers, gpus_per_worker, torch.get_num_threads(), say))


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise AuditError(
            "--engine ray: Ray is not installed; run: pip install 'concept-audit[ray]' (on every machine of the cluster)"
        ) from None
    return ray


class _Actor(WorkerProcess):
    """A worker as an actor; `state` is asked in a thread of its own."""

    def __init__(self, gpu: str | None, threads: int, place: str):
        # Paths may be relative to where the command runs; a machine that has no such place sees whole paths alone.
        with suppress(OSError):
            os.chdir(place)
        super().__init__(gpu, threads)

    def machine(self) -> Machine:
        return Machine.here()


class _Actors:
    """A crew of actors."""

    def __init__(
        self, address: str, workers: int | None, gpus_per_worker: float | None, threads: int, say: Callable[[str], None]
    ):
        self._ray, self._threads = _ray(), threads
        self._began = not self._ray.is_initialized()
        if self._began:
            self._join(address, workers)
        total = self._ray.cluster_resources()
        gpus = float(total.get("GPU", 0) > 0) if gpus_per_worker is None else gpus_per_worker
        # With a GPU, a core feeds it; without, each thread has one.
        self._need = {"CPU": 1.0 if gpus else float(threads), "GPU": float(gpus)}
        self._gpu = "cuda" if gpus else None
        self.size = workers or self._room()
        self._handles: dict[int, Any] = {}
        self._coming: dict[Any, int] = {}
        self._doing: dict[Any, int] = {}
        self._telling: dict[Any, int] = {}
        for worker in range(self.size):
            self.replace(worker)
        machines = sum(node["Alive"] for node in self._ray.nodes())
        say(f"Ray: {self.size} workers on {machines} machine{'s' * (machines != 1)}, {self._each()} each")

    def replace(self, worker: int) -> None:
        made = self._ray.remote(
            num_cpus=self._need["CPU"],
            num_gpus=self._need["GPU"],
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"telling": 1},
        )(_Actor)
        handle = self._handles[worker] = made.remote(self._gpu, self._threads, os.getcwd())
        self._coming[handle.machine.remote()] = worker

    def send(self, worker: int, work: Work[Any], number: int) -> None:
        self._doing[self._handles[worker].do.remote(work, number)] = worker

    def events(self, seconds: float) -> list[Event]:
        for worker in set(self._doing.values()) - set(self._telling.values()):
            asked = self._handles[worker].state.options(concurrency_group="telling").remote()
            self._telling[asked] = worker
        awaited = [*self._coming, *self._doing]
        every = [*awaited, *self._telling]
        try:
            self._ray.wait(awaited, num_returns=1, timeout=seconds)
            done, _ = self._ray.wait(every, num_returns=len(every), timeout=0)
        except self._ray.exceptions.RayError as error:
            raise AuditError(
                f"--engine ray: the cluster is gone ({first_line(error)}); when it is there again, run the same command: "
                "it goes on where it was"
            ) from error
        # What is told is told before its end.
        order = sorted(done, key=lambda ref: ref not in self._telling)
        return [event for ref in order if (event := self._event(ref)) is not None]

    def close(self) -> None:
        with suppress(self._ray.exceptions.RayError):  # the cluster may be gone, and they with it
            for handle in self._handles.values():
                self._ray.kill(handle)
            if self._doing:
                # Until they have ended they may write.
                self._ray.wait([*self._doing], num_returns=len(self._doing), timeout=END_SECONDS)
        for of in (self._handles, self._coming, self._doing, self._telling):
            of.clear()
        if self._began:
            self._ray.shutdown()

    def wanting(self) -> str:
        free = self._ray.available_resources()
        has = ", ".join(f"{free.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        return f"Each needs {self._each()}, and the cluster has {has} free: give it more, or ask for less"

    def _each(self) -> str:
        return " and ".join(f"{count:g} {name}" for name, count in self._need.items() if count)

    def _join(self, address: str, workers: int | None) -> None:
        # Nothing is told to anybody of who uses what.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            cpus = max(cores(), (workers or 1) * self._threads)
            quiet |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        try:
            self._ray.init(address=address, **quiet)
        except Exception as error:  # Ray raises a plain one where it does not start in time
            if address == "local":
                raise AuditError(
                    f"--engine ray: Ray did not start on this machine ({first_line(error)}); see what else it does, or use "
                    "--engine processes"
                ) from error
            raise AuditError(
                f"--ray-address {address}: no Ray cluster there ({first_line(error)}); start one with `ray start --head`, "
                "or leave the option out to start Ray on this machine"
            ) from error

    def _room(self) -> int:
        """Workers that the machines have room for, one at least."""
        name = "GPU" if self._need["GPU"] else "CPU"
        there = (node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"])
        return max(1, sum(math.floor(count / self._need[name] + 1e-9) for count in there))

    def _event(self, ref: Any) -> Event | None:
        """What a call gave; None for nothing to be told."""
        of: dict[Any, int] = next(d for d in (self._coming, self._doing, self._telling) if ref in d)
        worker = of.pop(ref)
        try:
            found: Machine | Outcome | State = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if of is self._telling:
                return None  # what it was doing ends in the same way
            # It may be alive and out of reach: then it goes, too.
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(self._handles[worker])
            return Gone(worker, first_line(error))
        if isinstance(found, Machine):
            return Came(worker, found)
        return Told(worker, found) if isinstance(found, State) else Ended(worker, found)
