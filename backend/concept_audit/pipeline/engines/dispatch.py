"""Handing out shards to processes that come, work, fail and go.

Every process has at most one shard in hand. Whatever a process was doing when it ended is
handed to another one: a shard is committed whole or not at all, and under the same name
whoever makes it, so that doing it again does no harm.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from concept_audit.errors import AuditError, StoreError
from concept_audit.pipeline.engine import Work, missing_of
from concept_audit.pipeline.engines.worker import Failure, Machine, Outcome, Receipt, State
from concept_audit.progress import Progress, Stage
from concept_audit.store.manifest import package_versions

ATTEMPTS = 4
"""How often a shard is tried where a process ends, or the system fails; and how often a process is begun in vain."""
LISTEN_SECONDS = 0.5
PATIENCE_SECONDS = 600.0
"""How long a command waits while it has no process at all."""
SEEN_SECONDS = 30.0
"""How long what another machine has written may take to be seen here: network file systems remember what they saw."""


@dataclass(frozen=True)
class Came:
    """A process is ready."""

    worker: int
    machine: Machine


@dataclass(frozen=True)
class Told:
    """A process says how far it is."""

    worker: int
    state: State


@dataclass(frozen=True)
class Ended:
    """A process has done what it was handed, or could not."""

    worker: int
    outcome: Outcome


@dataclass(frozen=True)
class Gone:
    """A process has ended, or its machine has."""

    worker: int
    reason: str


Event = Came | Told | Ended | Gone


class Crew(Protocol):
    """Processes, numbered from 0; each comes, and comes again when it is begun anew.

    Attributes:
        size: how many there are to be.
    """

    @property
    def size(self) -> int: ...

    def send(self, worker: int, work: Work[Any], number: int) -> None:
        """Hand a shard to a process that is ready."""

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened; waits for something at most so long."""

    def replace(self, worker: int) -> None:
        """Begin a process in the place of one that has gone."""

    def close(self) -> None:
        """End all processes, at once."""

    def wanting(self) -> str:
        """Why none may have come, and what can be done, in words."""


class CrewEngine:
    """Has a crew do the work. The crew is begun with the first work, and stays until the engine is closed.

    Args:
        begin: begins the crew; told what people should know.
    """

    def __init__(self, begin: Callable[[Callable[[str], None]], Crew]):
        self._begin = begin
        self._crew: Crew | None = None
        self._ready: dict[int, Machine] = {}

    def __enter__(self) -> CrewEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        crew, self._crew, self._ready = self._crew, None, {}
        if crew is not None:
            crew.close()

    def run(self, work: Work[Any], missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        """Do the shards of these numbers; returns when all are committed and seen here.

        Raises:
            AuditError: what the work raises; processes that end again and again, or that do not come.
        """
        if self._crew is None:
            self._crew = self._begin(progress.say)
        try:
            _Dispatch(self._crew, self._ready, work, missing, stage, progress).run()
        except BaseException:
            # Nothing may write on behind a command that has ended.
            self.close()
            raise


class _Dispatch:
    """One work, until all its shards are there.

    Args:
        ready: the processes that wait for something to do; kept between works.
    """

    def __init__(
        self,
        crew: Crew,
        ready: dict[int, Machine],
        work: Work[Any],
        missing: Sequence[int],
        stage: Stage,
        progress: Progress,
    ):
        self._crew, self._ready, self._work = crew, ready, work
        # The largest first (Graham 1969, LPT): one that is begun last is what all others wait for.
        self._queue = deque(sorted(missing, key=lambda number: -work.outputs[-1].partition.size(number)))
        self._busy: dict[int, tuple[int, Machine]] = {}
        self._tries: Counter[int] = Counter()
        self._in_vain: Counter[int] = Counter()
        self._lost = 0
        self._stage, self._progress = stage, progress
        self._units: dict[int, int] = {}
        self._said: set[str] = set()

    def run(self) -> None:
        last_seen = time.monotonic()
        while self._queue or self._busy:
            while self._queue and self._ready:
                worker = min(self._ready)
                number = self._queue.popleft()
                self._busy[worker] = number, self._ready.pop(worker)
                self._crew.send(worker, self._work, number)
            for event in self._crew.events(LISTEN_SECONDS):
                self._settle(event)
            if self._ready or self._busy:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > PATIENCE_SECONDS:
                raise AuditError(
                    f"{self._stage.name}: no worker has come for {PATIENCE_SECONDS / 60:.0f} minutes. "
                    f"{self._crew.wanting()}; then run the same command again, it goes on where it was"
                )
            self._stage.advance(0, self._in_words())

    def _settle(self, event: Event) -> None:
        match event:
            case Came():
                _check_versions(event.machine)
                self._ready[event.worker] = event.machine
            case Told():
                held = self._busy.get(event.worker)
                if held is not None and held[0] == event.state.number:
                    self._count(event.state.number, event.state.units)
                    self._say(event.state.said)
            case Ended():
                _, self._ready[event.worker] = self._busy.pop(event.worker)
                if isinstance(event.outcome, Receipt):
                    self._receive(event.outcome)
                    self._in_vain.clear()
                else:
                    self._failed(event.outcome)
            case Gone():
                self._ready.pop(event.worker, None)
                self._gone(event)

    def _receive(self, receipt: Receipt) -> None:
        """Believe what is seen: the machine may have written to another place of the same name."""
        patience = time.monotonic() + SEEN_SECONDS * (receipt.host != socket.gethostname())
        while True:
            try:
                for output in self._work.outputs:
                    output.confirm(receipt.number)
                break
            except StoreError as error:
                if time.monotonic() >= patience:
                    raise StoreError(
                        f"{self._stage.name}: {receipt.host} has written {', '.join(receipt.shards)}, which cannot be "
                        f"seen from {socket.gethostname()}. The audit must lie where every machine sees the same files "
                        "under the same path; choose another --out"
                    ) from error
                time.sleep(LISTEN_SECONDS)
        self._count(receipt.number, receipt.units)

    def _failed(self, failure: Failure) -> None:
        """Try again what the system may be at fault for; all else is raised, as where it is done in this process."""
        self._count(failure.number, 0)
        self._tries[failure.number] += 1
        error, elsewhere = failure.error, failure.host != socket.gethostname()
        if isinstance(error, AuditError):
            if elsewhere:
                raise type(error)(
                    f"{error} (on {failure.host}; every machine must see the audit, the model and --cache under the "
                    "same paths as this one)"
                ) from error
            raise error
        if isinstance(error, OSError) and self._tries[failure.number] < ATTEMPTS:
            self._lost += 1
            self._queue.append(failure.number)
            return
        error.add_note(f"On {failure.host}:\n{failure.trace}")
        raise error

    def _gone(self, gone: Gone) -> None:
        self._lost += 1
        held = self._busy.pop(gone.worker, None)
        if held is not None:
            number, machine = held
            self._say((f"A worker on {machine.host} ended ({gone.reason}); its work goes to another",))
            if number not in missing_of(self._work):
                self._crew.replace(gone.worker)
                return
            self._count(number, 0)
            self._tries[number] += 1
            if self._tries[number] >= ATTEMPTS:
                raise AuditError(
                    f"{self._stage.name}: {self._tries[number]} workers ended while they made shard {number}, the last "
                    f"on {machine.host} ({gone.reason}). If they ran out of memory, start fewer with --workers; the same "
                    "command goes on where this one was"
                )
            self._queue.append(number)
        else:
            self._in_vain[gone.worker] += 1
            if self._in_vain[gone.worker] >= ATTEMPTS:
                raise AuditError(f"{self._stage.name}: workers end before they begin ({gone.reason})")
        self._crew.replace(gone.worker)

    def _count(self, number: int, units: int) -> None:
        self._stage.advance(units - self._units.get(number, 0))
        self._units[number] = units

    def _say(self, texts: Sequence[str]) -> None:
        """What every worker may notice is said once."""
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                self._progress.say(text)

    def _in_words(self) -> str:
        """Workers, failures and the pace of all together."""
        fresh = self._stage.done - self._stage.skipped
        there = len(self._ready) + len(self._busy)
        words = [f"{there} of {self._crew.size} workers"]
        if fresh and self._stage.elapsed:
            words.insert(0, f"{fresh / self._stage.elapsed:,.1f} {self._stage.unit}/s")
        if self._lost:
            words.append(f"{self._lost} done again after a failure")
        return ", ".join(words)


def _check_versions(machine: Machine) -> None:
    """Raise AuditError where a machine computes with other packages."""
    here = package_versions()
    other = {name: machine.versions.get(name) for name in here if machine.versions.get(name) != here[name]}
    if other:
        differences = "; ".join(f"{name} {theirs}, here {here[name]}" for name, theirs in other.items())
        raise AuditError(
            f"{machine.host} has other packages than this machine ({differences}), and would find other numbers; install "
            "the same versions on every machine"
        )
