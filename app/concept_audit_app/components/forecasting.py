"""Forecasts that are computed in the background, while people go on looking; with progress, and a way to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import streamlit as st

from concept_audit import Audit, AuditError, Progress, RowFilter, Stage
from concept_audit_app.components.progress import WatchedProgress, share_done

SECONDS_BETWEEN_LOOKS = 1.5
Key = tuple[str, str]
"""The audit's directory, and what the forecast is of."""


class _CancelledError(Exception):
    """Somebody stopped it; what is done is kept."""


@dataclass
class Job:
    """One computation, in a thread that ends with the process.

    Attributes:
        doing: what is done at present, in words; empty before the first stage.
        share: of that stage, 0 to 1.
        problem: what went wrong; empty if nothing did.
        done: whether it has ended.
    """

    doing: str = ""
    share: float = 0.0
    problem: str = ""
    done: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Leave the work if it was stopped."""
        if self.cancelled.is_set():
            raise _CancelledError

    def begin(self, stage: Stage) -> None:
        """Take note of a stage of the work."""
        self.check()
        self.doing, self.share = stage.name, 0.0

    def advance(self, stage: Stage) -> None:
        """Take note of how far a stage is."""
        self.doing, self.share = f"{stage.name}: {stage.describe()}", share_done(stage)
        self.check()


class Jobs:
    """The forecasts that are being computed in this process, one for each that is asked for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._jobs: dict[Key, Job] = {}

    def find(self, key: Key) -> Job | None:
        """The job of a forecast, if it was ever started and not forgotten since."""
        return self._jobs.get(key)

    def under_way(self) -> dict[Key, Job]:
        """The jobs that have not ended."""
        return {key: job for key, job in list(self._jobs.items()) if not job.done}

    def start(self, key: Key, compute: Callable[[Progress], None]) -> None:
        """Compute a forecast, unless that is under way."""
        with self._guard:
            there = self._jobs.get(key)
            if there is not None and not there.done:
                return
            job = self._jobs[key] = Job()
        threading.Thread(target=self._run, args=(job, compute), daemon=True).start()

    def forget(self, key: Key) -> None:
        """Do not tell of a job any more that has ended."""
        with self._guard:
            if (job := self._jobs.get(key)) is not None and job.done:
                del self._jobs[key]

    @staticmethod
    def _run(job: Job, compute: Callable[[Progress], None]) -> None:
        try:
            compute(WatchedProgress(job.begin, job.advance))
        except _CancelledError:
            pass
        except AuditError as error:
            job.problem = str(error)
        except Exception as error:  # the page says it: nobody reads a thread's traceback
            job.problem = f"{type(error).__name__}: {error}"
        finally:
            job.done = True


@st.cache_resource(show_spinner=False)
def jobs() -> Jobs:
    """Those of this process."""
    return Jobs()


def needed(audit: Audit, parts: Sequence[RowFilter], what: str, sealed: bool) -> bool:
    """See that forecasts are there: offer those that are not, or say how far they are.

    Args:
        parts: the rows of each.
        what: they are for, in words.
        sealed: nothing may be computed.

    Returns:
        whether all are there.
    """
    missing = [where for where in parts if not audit.forecasts.has(where)]
    key = str(audit.root), repr(list(parts))
    if not missing:
        return True
    job = jobs().find(key)
    if job is not None and not job.done:
        _under_way(key)
        return False
    with st.container(border=True, key="forecast-offer"):
        st.markdown(f"**{what} has not been computed yet.**")
        n_rows = sum(audit.forecasts.count(where) for where in missing)
        st.caption(
            f"A forward and a backward pass over {n_rows:,} rows, and up to 16 passes over the prompts: about a second a row "
            "on a laptop, and a fraction on a GPU. The first time, the curvature is fitted as well. It goes on in the "
            "background if you leave this page, and where it was if it is stopped."
        )
        if job is not None and job.problem:
            st.error(job.problem, icon=":material/error:")
        if sealed:
            st.info("Read-only: nothing is computed here.", icon=":material/lock:")
        elif st.button("Compute the forecast", type="primary", icon=":material/play_arrow:", key="forecast-compute"):

            def compute(progress: Progress) -> None:
                for where in missing:
                    audit.forecasts.ensure(where, progress=progress)

            jobs().start(key, compute)
            st.rerun()
    return False


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def _under_way(key: Key) -> None:
    job = jobs().find(key)
    if job is None or job.done:
        st.rerun(scope="app")
        return
    with st.container(horizontal=True, vertical_alignment="center"):
        words = "Stopping …" if job.cancelled.is_set() else f"{job.doing or 'The model is being loaded'} …"
        st.progress(job.share, words)
        if st.button("Cancel", icon=":material/close:", key="forecast-cancel", help="What is done is kept"):
            job.cancelled.set()
