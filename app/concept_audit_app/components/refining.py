"""Exact scores of the first rows of a ranking from the gradient index, worked out while people look at it."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import streamlit as st

from concept_audit import Audit, AuditError, InfluenceOptions, Stage
from concept_audit_app.components.progress import WatchedProgress
from concept_audit_app.components.session import current_audit, read_only

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_UNTIL_RETRY = 30.0
SECONDS_TO_END = 10.0
Key = tuple[str, int]
"""The audit's directory, and the ranking."""


@dataclass(frozen=True)
class Wanted:
    """A ranking that somebody looks at."""

    audit: Audit
    concept: str
    method: str
    options: InfluenceOptions


class _InterruptedError(Exception):
    """Something else comes first; what is done is kept."""


class Refiner:
    """Refines one ranking at a time in a thread of its own.

    The ranking that was asked for last comes first: the one in work steps back, keeps what it has and goes on later.
    So it does while a page computes what somebody waits for; see `aside`.
    The thread ends with the process, at the work's next step.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._waiting: dict[Key, Wanted] = {}
        self._current: Key | None = None
        self._step_back = self._ended = False
        self._pages = 0  # that compute what somebody waits for
        self._stage: Stage | None = None
        self._problems: dict[Key, tuple[float, str]] = {}
        self._thread: threading.Thread | None = None

    def want(self, key: Key, wanted: Wanted) -> None:
        """Refine a ranking, unless that is under way."""
        with self._turn:
            failed, _ = self._problems.get(key, (0.0, ""))
            if key == self._current or key in self._waiting or time.monotonic() < failed + SECONDS_UNTIL_RETRY:
                return
            self._problems.pop(key, None)
            self._waiting[key] = wanted
            self._step_back = self._current is not None
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._turn.notify_all()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the processor to what is done within: the work steps back at its next step, and goes on afterwards."""
        with self._turn:
            self._pages += 1
            self._step_back = self._current is not None
        try:
            yield
        finally:
            with self._turn:
                self._pages -= 1
                self._turn.notify_all()

    def describe(self, key: Key) -> tuple[str, str]:
        """What is being done for a ranking, and what went wrong with it; each may be empty."""
        with self._turn:
            stage = self._stage
            doing = f"{stage.name}: {stage.describe()}" if key == self._current and stage is not None else ""
            return doing, self._problems.get(key, (0.0, ""))[1]

    def close(self) -> None:
        """Stop at the next step, for good."""
        with self._turn:
            self._ended = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join(SECONDS_TO_END)

    def begin(self, stage: Stage) -> None:
        """Take note of a stage of the work."""
        self.check()
        self._stage = stage

    def check(self) -> None:
        """Leave the work if something else comes first."""
        if self._ended or self._step_back:
            raise _InterruptedError

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: (self._waiting and not self._pages) or self._ended)
                if self._ended:
                    return
                key, wanted = self._waiting.popitem()
                self._current, self._step_back, self._stage = key, False, None
            watched = WatchedProgress(self.begin, lambda stage: self.check())
            problem = ""
            interrupted = False
            try:
                wanted.audit.refine(wanted.concept, wanted.method, wanted.options, watched)
            except _InterruptedError:
                interrupted = True
            except AuditError as error:
                problem = str(error)
            except Exception as error:  # the thread serves everybody: it outlives whatever one ranking meets
                problem = f"{type(error).__name__}: {error}"
            with self._turn:
                self._current = None
                if interrupted:
                    self._waiting = {key: wanted, **self._waiting}
                if problem:
                    self._problems[key] = time.monotonic(), problem


@st.cache_resource(show_spinner=False)
def refiner() -> Refiner:
    """The one of this process."""
    return Refiner()


def refinement_state(audit: Audit, concept: str, method: str, options: InfluenceOptions) -> None:
    """Say which scores of a ranking from the index are exact, and see that the first ones become so."""
    details = audit.rankings.refinement(concept, method, options)
    if read_only() or (details and details["done"]):
        st.caption(audit.refinements.in_words(concept, method, options))
        return
    key = str(audit.root), audit.rankings.find(concept, method, options).id
    refiner().want(key, Wanted(audit, concept, method, options))
    _refining(key, concept, method, options, details["scored"] if details else 0)


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def _refining(key: Key, concept: str, method: str, options: InfluenceOptions, shown: int) -> None:
    """How far the exact scores are; the page is drawn anew when there are more than it shows.

    Args:
        shown: rows that had been scored when the page was drawn.
    """
    audit = current_audit()
    details = audit.rankings.refinement(concept, method, options)
    if details and details["scored"] != shown:
        st.rerun(scope="app")
    doing, problem = refiner().describe(key)
    if problem:
        st.warning(f"No exact scores: {problem}", icon=":material/warning:")
        return
    st.caption(f"{audit.refinements.in_words(concept, method, options)} {doing or 'Exact scores are on their way'} …")
