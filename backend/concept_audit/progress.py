"""Progress of long work: bars with the time left, and never a silent terminal.

Work reports to a `Progress`; where the reports go is the caller's choice: a
terminal (`TerminalProgress`), a log without a terminal (`LineProgress`), nowhere
(`Progress` itself), or a widget of the app.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

HEARTBEAT_SECONDS = 3.0
REDRAW_SECONDS = 0.2


class Stage:
    """One piece of work in progress.

    Attributes:
        name: what is being done.
        total: how many units there are, or None if that is not known.
        unit: what is counted ("rows", "tokens").
        done: how many units are finished.
        skipped: how many of these an earlier run had finished.
        detail: a few words on the present state ("explained variance 0.87").
    """

    def __init__(self, name: str, total: int | None, unit: str):
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.detail = ""
        self.skipped = 0
        self._started = time.monotonic()

    def advance(self, units: int = 1, detail: str | None = None) -> None:
        """Count `units` more as finished."""
        self.done += units
        if detail is not None:
            self.detail = detail

    def skip(self, units: int) -> None:
        """Count units that an earlier run had finished; they do not enter the time left."""
        self.done += units
        self.skipped += units

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Time left at the mean pace so far, or None while it cannot be told."""
        fresh = self.done - self.skipped
        if self.total is None or fresh <= 0:
            return None
        return self.elapsed / fresh * max(self.total - self.done, 0)

    def describe(self) -> str:
        """The state in one line: count, time left or time taken, and the detail."""
        parts = []
        if self.total is not None:
            share = f" ({self.done / self.total:.0%})" if self.total else ""
            parts.append(f"{self.done:,}/{self.total:,} {self.unit}{share}")
        elif self.done:
            parts.append(f"{self.done:,} {self.unit}")
        left = self.seconds_left
        parts.append(f"{clock(left)} left" if left is not None else f"{clock(self.elapsed)} so far")
        if self.detail:
            parts.append(self.detail)
        return ", ".join(parts)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:07, 12:30, 1:02:03."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Progress:
    """Reports go nowhere; the base of those that show them."""

    def say(self, text: str) -> None:
        """Tell the user something once."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        """Announce a piece of work; the body reports to the stage that is handed out."""
        yield Stage(name, total, unit)


class LineProgress(Progress):
    """Lines of text for logs and pipes: one at the start, then one every few seconds."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        stage = Stage(name, total, unit)
        self.say(f"{name} ...")
        with _repeating(HEARTBEAT_SECONDS, lambda: self.say(f"{name}: {stage.describe()}")):
            yield stage
        self.say(f"{name}: {_summary(stage)}")


class TerminalProgress(Progress):
    """Live bars on a terminal, redrawn several times a second."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        from rich import progress as bars

        stage = Stage(name, total, unit)
        with bars.Progress(
            bars.SpinnerColumn(),
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            transient=True,
        ) as live:
            task = live.add_task(name, total=total, state="")

            def redraw() -> None:
                live.update(task, completed=stage.done, state=stage.describe())

            with _repeating(REDRAW_SECONDS, redraw):
                yield stage
        self.say(f"✓ {name}: {_summary(stage)}")


@contextmanager
def _repeating(seconds: float, report: Callable[[], None]) -> Iterator[None]:
    """Call `report` from a thread of its own every so often while the body runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            report()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _summary(stage: Stage) -> str:
    parts = [f"{stage.done:,} {stage.unit}"] if stage.done else []
    parts.append(f"done in {clock(stage.elapsed)}")
    if stage.detail:
        parts.append(stage.detail)
    return ", ".join(parts)


def for_this_terminal() -> Progress:
    """Bars where standard error is a terminal, lines where it is not."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()
