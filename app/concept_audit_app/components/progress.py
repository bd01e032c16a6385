"""Progress of long work in the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from concept_audit import Progress, Stage

SECONDS_BETWEEN_UPDATES = 0.2


class PageProgress(Progress):
    """A bar for each stage, which goes when the stage ends; what is said once is a toast.

    Args:
        cancel: offer to stop. The click starts the page anew, which ends the work at the stage's next step; what
            is done is kept, and the work goes on from there when it is asked for again.
    """

    def __init__(self, cancel: bool = False):
        self._cancel = cancel

    def say(self, text: str) -> None:
        st.toast(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        place = st.empty()
        with place.container(horizontal=True, vertical_alignment="center"):
            bar = st.progress(0.0, name)
            if self._cancel:
                st.button("Cancel", icon=":material/close:", key=f"cancel-{name}", help="What is done is kept")
        try:
            yield _PageStage(name, total, unit, bar)
        finally:
            place.empty()


class _PageStage(Stage):
    def __init__(self, name: str, total: int | None, unit: str, bar: DeltaGenerator):
        super().__init__(name, total, unit)
        self._bar = bar
        self._shown = time.monotonic()

    def advance(self, units: int = 1, detail: str | None = None) -> None:
        super().advance(units, detail)
        if time.monotonic() - self._shown >= SECONDS_BETWEEN_UPDATES:
            self._shown = time.monotonic()
            self._bar.progress(share_done(self), f"{self.name}: {self.describe()}")


def share_done(stage: Stage) -> float:
    """How much of a stage is done, 0 to 1; 0 where nobody knows how much there is."""
    return min(stage.done / stage.total, 1.0) if stage.total else 0.0


class WatchedProgress(Progress):
    """Progress of work in a thread, told to whoever watches it; what the watcher raises interrupts the work.

    Args:
        begun: told each stage as it begins.
        advanced: told a stage whenever it is further.
    """

    def __init__(self, begun: Callable[[Stage], None], advanced: Callable[[Stage], None]):
        self._begun, self._advanced = begun, advanced

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        stage = _WatchedStage(name, total, unit, self._advanced)
        self._begun(stage)
        yield stage


class _WatchedStage(Stage):
    def __init__(self, name: str, total: int | None, unit: str, advanced: Callable[[Stage], None]):
        super().__init__(name, total, unit)
        self._advanced = advanced

    def advance(self, units: int = 1, detail: str | None = None) -> None:
        super().advance(units, detail)
        self._advanced(self)
