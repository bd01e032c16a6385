"""What is worked out of rankings from the gradient index while people look.

Exact scores of the first rows of the ranking that is on screen; and the ranking itself of the concept that is, before
somebody asks for its influence.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import streamlit as st

from concept_audit import Audit, AuditError, Concept, InfluenceOptions, Progress, Stage
from concept_audit_app.components.progress import WatchedProgress
from concept_audit_app.components.session import current_audit, read_only

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_SIGNS = 0.2
SECONDS_UNTIL_RETRY = 30.0
SECONDS_TO_END = 10.0
LOWER = 10
"""By how much less urgent the work is than the pages, where the system tells threads apart."""
FORESEEN = "concept_influence"
"""The method by which a concept that is looked at is ranked before it is asked for."""
Key = tuple[str, int]
"""The audit's directory, and the ranking."""


@dataclass(frozen=True)
class Wanted:
    """A ranking that somebody looks at, or may ask for next."""

    audit: Audit
    concept: str
    method: str
    options: InfluenceOptions


class _InterruptedError(Exception):
    """Something else comes first; what is done is kept."""


class Refiner:
    """Works on one ranking at a time in a thread of its own.

    What was asked for last comes first: the work under way steps back, keeps what it has and goes on later. So it
    does while a page computes what somebody waits for; see `aside`. Whatever is refined waits for a ranking that is
    foreseen, which takes seconds. The thread ends with the process, at the work's next step.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._waiting: dict[Key, Wanted] = {}
        self._foreseen: tuple[Key, Wanted] | None = None
        self._current: Key | None = None
        self._ahead = False  # the current one is ranked, not refined
        self._step_back = self._ended = False
        self._pages = 0  # that compute what somebody waits for
        self._stage: Stage | None = None
        self._problems: dict[Key, tuple[float, str]] = {}
        self._hopeless: set[Key] = set()  # to rank ahead; who asks for one is told why
        self._thread: threading.Thread | None = None

    def want(self, key: Key, wanted: Wanted) -> None:
        """Refine a ranking, unless that is under way."""
        with self._turn:
            failed, _ = self._problems.get(key, (0.0, ""))
            under_way = key == self._current and not self._ahead
            if under_way or key in self._waiting or time.monotonic() < failed + SECONDS_UNTIL_RETRY:
                return
            self._problems.pop(key, None)
            self._waiting[key] = wanted
            self._begin_soon()

    def foresee(self, key: Key, wanted: Wanted) -> None:
        """Put a ranking into the store before somebody asks for it; only the last that was foreseen is."""
        with self._turn:
            if key in (self._current, self._foreseen and self._foreseen[0]) or key in self._hopeless:
                return
            self._foreseen = key, wanted
            self._begin_soon()

    def _begin_soon(self) -> None:
        self._step_back = self._current is not None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            atexit.register(self.close)
        self._turn.notify_all()

    @contextmanager
    def aside(self, key: Key | None = None, progress: Progress | None = None) -> Iterator[None]:
        """Leave the processor to what is done within: the work steps back at its next step, and goes on afterwards.

        Args:
            key: a ranking that is about to be computed. If that is just what is being done ahead, it is waited for.
            progress: told while it is.
        """
        with self._turn:
            self._pages += 1
            self._step_back = self._current is not None and not self._ranks(key)
        try:
            if key is not None and self._ranks(key):
                with (progress or Progress()).stage("Gradient of the concept on its queries") as stage:
                    while self._ranks(key):
                        with self._turn:
                            self._turn.wait(SECONDS_BETWEEN_SIGNS)
                        stage.advance(0)
            yield
        finally:
            with self._turn:
                self._pages -= 1
                self._turn.notify_all()

    def _ranks(self, key: Key | None) -> bool:
        """Whether a ranking is just being put into the store."""
        return self._ahead and self._current == key

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
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWER)
        while True:
            with self._turn:
                self._turn.wait_for(lambda: ((self._foreseen or self._waiting) and not self._pages) or self._ended)
                if self._ended:
                    return
                self._ahead = self._foreseen is not None
                key, wanted = self._foreseen or self._waiting.popitem()
                self._current, self._step_back, self._stage, self._foreseen = key, False, None, None
            watched = WatchedProgress(self.begin, lambda stage: self.check())
            asked = wanted.concept, wanted.method, wanted.options
            problem = ""
            interrupted = False
            try:
                if self._ahead:
                    wanted.audit.rankings.ensure(*asked, watched)
                else:
                    wanted.audit.refine(*asked, watched)
            except _InterruptedError:
                interrupted = True
            except AuditError as error:
                problem = str(error)
            except Exception as error:  # the thread serves everybody: it outlives whatever one ranking meets
                problem = f"{type(error).__name__}: {error}"
            with self._turn:
                self._current = None
                if interrupted and self._ahead:
                    self._foreseen = self._foreseen or (key, wanted)
                elif interrupted:
                    self._waiting = {key: wanted, **self._waiting}
                elif problem and self._ahead:
                    self._hopeless.add(key)
                elif problem:
                    self._problems[key] = time.monotonic(), problem
                self._ahead = False
                self._turn.notify_all()


@st.cache_resource(show_spinner=False)
def refiner() -> Refiner:
    """The one of this process."""
    return Refiner()


def foresee(audit: Audit, concept: Concept) -> None:
    """Rank by a concept's influence before somebody asks for it, where the gradient index answers that.

    The model is loaded for it where it takes little of the free memory: a machine that only shows an audit may have no
    room for it.
    """
    asked = concept.concept_id, FORESEEN, InfluenceOptions()
    if read_only():
        return
    try:
        served = audit.index.at_hand() and audit.rankings.served_by_index(*asked)
        if served and not audit.rankings.has(*asked):
            refiner().foresee(ranking_key(audit, *asked), Wanted(audit, *asked))
    except AuditError:
        return  # whoever asks for it is told


def ranking_key(audit: Audit, concept: str, method: str, options: InfluenceOptions) -> Key:
    """What tells rankings apart here."""
    return str(audit.root), audit.rankings.find(concept, method, options).id


def refinement_state(audit: Audit, concept: str, method: str, options: InfluenceOptions) -> None:
    """Say which scores of a ranking from the index are exact, and see that the first ones become so."""
    details = audit.rankings.refinement(concept, method, options)
    if read_only() or (details and details["done"]):
        st.caption(audit.refinements.in_words(concept, method, options))
        return
    key = ranking_key(audit, concept, method, options)
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
