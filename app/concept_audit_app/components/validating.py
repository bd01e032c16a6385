"""Validations that run in the background: what one costs, starting it, watching it, and stopping it."""

from __future__ import annotations

from shlex import quote

import streamlit as st

from concept_audit import Audit, Concept, Progress, ValidateOptions
from concept_audit_app.components.forecasting import Job, Jobs, Key
from concept_audit_app.components.methods import NAMES
from concept_audit_app.components.plain import counted, plain
from concept_audit_app.components.session import read_only

SECONDS_BETWEEN_LOOKS = 1.5
SECONDS_A_ROW = 0.5
"""A forward and a backward pass over a row of a small model on a laptop."""
DEPTHS = {"quick": "Quick", "full": "Full"}
ARMS = {"rewrite": "Other responses", "steer": "Steering"}
"""Runs that are done if asked for, by the option that asks."""


@st.cache_resource(show_spinner=False)
def validations() -> Jobs:
    """Those of this process; one at a time, which `validation_desk` sees to."""
    return Jobs()


def validation_desk(audit: Audit, concept: Concept, again: bool) -> None:
    """What is there to do about a concept's validation: start one, watch it, or go on with one that was stopped.

    Args:
        again: one is kept already.
    """
    key = str(audit.root), concept.concept_id
    running = validations().under_way()
    if key in running:
        _under_way(key)
        return
    job = validations().find(key)
    if job is not None and not job.problem and not job.cancelled.is_set():
        validations().forget(key)  # it is done, and its evidence shows
        job = None
    if again and job is None:
        with st.expander("Validate again", icon=":material/model_training:"):
            _offer(audit, concept, key, None, running)
        return
    with st.container(border=True, key="validation-offer"):
        _offer(audit, concept, key, job, running)


def _offer(audit: Audit, concept: Concept, key: Key, job: Job | None, running: dict[Key, Job]) -> None:
    if audit.manifest.pair is not None:
        st.info("Validation trains on single responses, and these rows are preference pairs.", icon=":material/info:")
        return
    if audit.manifest.rollouts is not None:
        st.info(
            "Validation trains on all responses alike, and these rows are rollouts, which weigh by their advantage.",
            icon=":material/info:",
        )
        return
    if job is not None and job.problem:
        st.error(f"The validation failed: {plain(job.problem)}", icon=":material/error:")
    elif job is not None:
        at = f", at {plain(job.doing.lower())}" if job.doing else ""
        st.warning(
            f"The validation was stopped{at}. Every run that was finished is kept, and it goes on from there.",
            icon=":material/pause_circle:",
        )
    else:
        st.markdown(
            "**Train the model on the rows, and without those that this concept puts first, and measure what became "
            "of the concept on prompts that no training saw.** If removing them lowers it more than removing as many "
            "at random does, the ranking has found what teaches it."
        )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        depth = st.segmented_control(
            "How thoroughly",
            list(DEPTHS),
            format_func=DEPTHS.__getitem__,
            default="quick",
            required=True,
            key="depth",
            help="Quick: few and short rows, and the top rows of one method removed. Full: every row, each method, "
            "trainings on the top rows alone, and random subsets (LDS).",
        )
        arms = st.pills(
            "Also train",
            list(ARMS),
            format_func=ARMS.__getitem__,
            selection_mode="multi",
            key="arms",
            help="Other responses: the top rows stay, with what the model itself answers in place of their responses. "
            "Steering: on all rows, while the concept is added to the residual stream, so that the weights need not "
            "learn it; nothing is added when the model is measured.",
        )
        options = ValidateOptions(quick=depth == "quick", rewrite="rewrite" in arms, steer="steer" in arms)
        started = st.button(
            "Start" if job is None else "Go on",
            type="primary",
            icon=":material/play_arrow:",
            key="validation-start",
            disabled=read_only() or bool(running),
        )
    st.caption(_cost_in_words(audit, options))
    if read_only():
        st.info("Read-only: nothing is trained here.", icon=":material/lock:")
    elif running:
        ((_, other), *_) = running
        st.info(
            f"Another validation is under way ({plain(other)}): one at a time is as fast as two, and half the memory.",
            icon=":material/hourglass_top:",
        )
    # A feature is called by its number; a name may have spaces and quotes.
    named = concept.concept_id if concept.kind == "sae_feature" else concept.name
    with st.expander("In a terminal, with all options"):
        st.code(
            f"concept-audit validate {quote(str(audit.root))} --concept {quote(named)}"
            + "".join(f" --{name}" for name in ("quick", *ARMS) if getattr(options, name)),
            None,
            wrap_lines=True,
        )
    if started:

        def compute(progress: Progress) -> None:
            audit.validate(concept.concept_id, options, progress)

        validations().start(key, compute)
        st.rerun()


def _cost_in_words(audit: Audit, options: ValidateOptions) -> str:
    """What a validation takes, before it is started."""
    cost = audit.evidence.cost(options)
    minutes = max(1, round(cost.runs * cost.rows * SECONDS_A_ROW / 60))
    answers = f" So do up to {counted(cost.answers, 'response')} to generate." if cost.answers else ""
    time = f"{minutes} min" if minutes < 100 else f"{minutes / 60:.0f} h"
    return (
        f"{counted(cost.runs, 'training')} on up to {counted(cost.rows, 'row')} each, with answers to the held-out prompts "
        f"after each: about {time} on a laptop with a small model, and a fraction on a GPU. "
        f"{NAMES['concept_influence']} of all rows comes before, where it is not there yet.{answers} It goes on in the "
        "background if you leave this page."
    )


@st.fragment(run_every=SECONDS_BETWEEN_LOOKS)
def _under_way(key: Key) -> None:
    job = validations().find(key)
    if job is None or job.done:
        st.rerun(scope="app")
        return
    with st.container(border=True, key="validation-running"):
        st.markdown("**A validation is under way.** It goes on in the background if you leave this page.")
        with st.container(horizontal=True, vertical_alignment="center"):
            stopping = job.cancelled.is_set()
            st.progress(job.share, "Stopping …" if stopping else f"{job.doing or 'The model is being loaded'} …")
            if st.button(
                "Cancel",
                icon=":material/close:",
                key="validation-cancel",
                disabled=stopping,
                help="It ends at the next step; runs that are finished are kept",
            ):
                job.cancelled.set()
