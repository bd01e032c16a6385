"""Stage: does removing what a ranking flags change the model?

Fine-tunes on the whole set, on the set less its top rows by each method, on only
those, and on random subsets, and measures the concept on prompts that neither the
rankings nor the training saw. On preference pairs it trains by DPO, and with the sides
of the top pairs exchanged, too; on other rows, if asked, with other responses in the top
rows, and with the concept added to the residual stream. Every run is a unit of its own, whole or absent, so
that a killed validation goes on where it was.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from concept_audit.influence.options import InfluenceOptions
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.options import key
from concept_audit.pipeline.rollouts import refuse_training
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.findings import findings, run_frame, score_frame, stability_findings
from concept_audit.pipeline.validation.first_order import first_order
from concept_audit.pipeline.validation.options import VERSION, Candidate, ResolvedOptions, ValidateOptions, resolved
from concept_audit.pipeline.validation.rewriting import check_prompts, rewritten_rows
from concept_audit.pipeline.validation.runs import done_runs, plan, precision_of, shared_by_runs
from concept_audit.pipeline.validation.scores import all_scores
from concept_audit.pipeline.validation.setting import Setting, digest, setting_of
from concept_audit.pipeline.validation.shared import Arms
from concept_audit.pipeline.validation.steering import steering_of
from concept_audit.progress import Progress
from concept_audit.store.evidence import RESULT_COLUMNS, Evidence
from concept_audit.types import Concept

OWN = "the audited model"


def validate(sources: Sources, concept: Concept, options: ValidateOptions, progress: Progress) -> Evidence:
    """Do the runs that are missing, and tell what they say.

    Raises:
        ConceptError: options that make no sense, too few labelled examples, no rows to train on, or rollouts.
        AuditError: the judge cannot be used.
    """
    refuse_training(sources)
    chosen = resolved(options, sources.pairs)
    lm = sources.model()
    setting = setting_of(sources, concept, chosen, lm, progress)
    if chosen.rewrite:
        check_prompts(sources, setting)
    steering = steering_of(sources, setting) if chosen.steer else None
    scores = all_scores(sources, setting, chosen, progress)
    runs = plan(setting, scores, chosen)
    wanted = {row for run in runs for row in run.rewritten}
    arms = Arms(rewritten_rows(sources, setting, chosen, wanted, progress), steering)
    measured = done_runs(sources, setting, runs, arms, chosen, lm, progress)
    about = _about(sources, concept, setting, chosen, lm) | _about_arms(chosen, arms)
    checked: list[list[Any]] = []
    if chosen.first_order:
        e, _ = first_order(sources, concept, progress, chosen.first_order)
        name = "concept_influence without curvature"
        checked.append(["first_order", "shown", name, "", 1.0, e.value, e.low, e.high, e.p, e.n])
    frame = run_frame(runs, measured)
    with progress.stage("Comparing the methods"):
        results = findings(frame, runs, scores, setting, chosen)
        steady = stability_findings(sources, setting, scores, chosen, progress)
        results += steady["results"] + checked
        evidence = Evidence(
            evidence_id=key(VERSION, about),
            concept_id=concept.concept_id,
            about=about,
            runs=frame,
            results=pd.DataFrame(results, columns=RESULT_COLUMNS),
            scores=score_frame(scores, setting, steady["intervals"]),
        )
    return evidence


def _about(
    sources: Sources, concept: Concept, setting: Setting, options: ResolvedOptions, lm: LanguageModel
) -> dict[str, Any]:
    """What the evidence is about, as JSON values."""
    names = (
        "retention",
        "seeds",
        "whole_seeds",
        "subsets",
        "subset_seeds",
        "subset_share",
        "pool_rows",
        "origin",
        "topic",
        "first_order",
        "judge_url",
        "judge_model",
        "judge_behaviour",
        "quick",
    )
    common = shared_by_runs(sources, setting, options, lm, precision_of(lm, options.recipe))
    return {
        **common,
        **{name: getattr(options, name) for name in names},
        "shares": list(options.shares),
        "removed": list(options.removed),
        "positive": list(options.positive),
        "concept": concept.name,
        "concept_version": concept.version,
        "audit": sources.layout.root.resolve().name,
        "model_name": lm.name,
        "methods": {c.name: _candidate_about(c) for c in options.methods},
        "n_rows": len(setting.rows),
        "n_pool": len(setting.ids),
        "n_prompts": len(setting.held_out.prompts),
        "n_held_out_left_out": setting.left_out,
        "n_rows_untrained": setting.untrained,
        "n_shown": len(setting.held_out.shown),
        "n_natural": len(setting.held_out.natural),
        "n_fitted": int(((setting.labels >= 0) & setting.fitted).sum()),
        "natural": f"rows of another {options.origin}" if options.origin else "rows drawn at random",
        "ranked_by": "half of the labels" if setting.ranked_here else "the audit's concept",
    }


def _about_arms(options: ResolvedOptions, arms: Arms) -> dict[str, Any]:
    """What evidence with runs that rewrite or steer is about, besides."""
    about: dict[str, Any] = {}
    if options.rewrite:
        parts = [part for row in arms.rewritten.values() for part in row]
        about["rewritten_by"] = options.rewrite_model or OWN
        about |= {"rewrite_url": options.rewrite_url, "n_rewritten": len(arms.rewritten), "rewritten": digest(parts)}
    if arms.steering is not None:
        about |= {"strengths": list(options.strengths), "spread": arms.steering.spread}
    return about


def _candidate_about(candidate: Candidate) -> dict[str, Any]:
    """The method, and the options that are not at their defaults."""
    pairs = zip(InfluenceOptions().parts(), candidate.options.parts(), strict=True)
    given = {
        name: value
        for usual, part in pairs
        for name, value in vars(part).items()
        if value != getattr(usual, name) and name != "queries"
    }
    queries = candidate.options.query.queries
    if queries is not None:
        given["queries"] = key(sorted(f"{e.content_hash}:{e.label}" for e in queries))
    return {"method": candidate.method, **given}
