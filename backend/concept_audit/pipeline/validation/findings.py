"""From what the runs measured to findings: the tables that the store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.evidence import statistics
from concept_audit.evidence.measures import QUANTITIES
from concept_audit.metrics import NAN, Estimate, correlation, paired
from concept_audit.pipeline.sources import Sources
from concept_audit.pipeline.validation.options import CONCEPT, RANDOM, Candidate, ResolvedOptions
from concept_audit.pipeline.validation.runs import Run
from concept_audit.pipeline.validation.scores import redrawn_scores
from concept_audit.pipeline.validation.setting import Setting
from concept_audit.progress import Progress
from concept_audit.store.evidence import RUN_COLUMNS


def run_frame(runs: Sequence[Run], measured: Sequence[dict[str, Any]]) -> pd.DataFrame:
    lines = [
        [
            run.kind,
            run.method,
            run.share,
            run.number,
            run.seed,
            len(run.rows),
            *(_mean(unit.get(quantity)) for quantity in QUANTITIES),
        ]
        for run, unit in zip(runs, measured, strict=True)
    ]
    return pd.DataFrame(lines, columns=RUN_COLUMNS)


def _mean(values: Sequence[float] | None) -> float:
    known = [v for v in values or () if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else NAN


def findings(
    frame: pd.DataFrame, runs: Sequence[Run], scores: dict[str, np.ndarray], setting: Setting, options: ResolvedOptions
) -> list[list[Any]]:
    """Lines of `RESULT_COLUMNS`."""
    found: list[list[Any]] = []

    def add(measure: str, quantity: str, method: str, other: str, share: float, e: Estimate) -> None:
        found.append([measure, quantity, method, other, share, e.value, e.low, e.high, e.p, e.n])

    for quantity in QUANTITIES:
        if not frame[quantity].notna().any():
            continue
        value = frame.set_index(["kind", "method", "share", "number", "seed"])[quantity].to_dict()
        base = value["base", "", 0.0, 0, 0]
        seeds = range(options.seeds)
        whole = np.array([value["whole", "", 1.0, 0, s] for s in range(options.whole_seeds)])
        add("whole", quantity, "", "base", 1.0, paired(whole - base))
        for share in options.shares if options.removed else ():
            given = {"swap": setting.pairs, "rewrite": options.rewrite, "retention": options.retention}
            for kind in ("removal", *(kind for kind, there in given.items() if there)):
                chance = np.array([value[kind, RANDOM, share, 0, s] for s in seeds])
                for method in (RANDOM, *options.removed):
                    own = np.array([value[kind, method, share, 0, s] for s in seeds])
                    change = own - base if kind == "retention" else own[: len(whole)] - whole
                    other = "base" if kind == "retention" else "whole"
                    add(kind, quantity, method, other, share, paired(change))
                    if kind in ("swap", "rewrite"):
                        removed = np.array([value["removal", method, share, 0, s] for s in seeds])
                        add(kind, quantity, method, "removal", share, paired(own - removed))
                    if method != RANDOM:
                        add(kind, quantity, method, RANDOM, share, paired(own - chance))
        for strength in options.strengths if options.steer else ():
            chance, towards = (
                np.array([value["steer", method, strength, 0, s] for s in seeds]) for method in (RANDOM, CONCEPT)
            )
            for method, own in ((RANDOM, chance), (CONCEPT, towards)):
                add("steer", quantity, method, "whole", strength, paired(own[: len(whole)] - whole))
            add("steer", quantity, CONCEPT, RANDOM, strength, paired(towards - chance))
        if options.subsets and quantity != "loss":
            subsets = [run for run in runs if run.kind == "subset" and run.seed == 0]
            actual = np.array(
                [
                    np.mean([value["subset", "", run.share, run.number, s] for s in range(options.subset_seeds)])
                    for run in subsets
                ]
            )
            for method, worth in scores.items():
                predicted = np.array([np.nansum(worth[list(run.rows)]) for run in subsets])
                lds = correlation(predicted, actual)
                add("lds", quantity, method, "", options.subset_share, lds)
    for method, worth in scores.items():
        known = setting.judged
        k = max(1, round(options.shares[0] * len(setting.rows)))
        topics = [t for t, kept in zip(setting.topics, known, strict=True) if kept] if setting.topics else None
        for name, estimate in statistics.against_labels(worth[known], setting.labels[known], k, topics).items():
            share = options.shares[0] if name == "precision_at_k" else 1.0
            add(name, "labels", method, options.origin or "", share, estimate)
    matrix = statistics.rank_correlations(scores)
    for one in matrix.index:
        for other in matrix.columns:
            e = Estimate(float(matrix.loc[one, other]), n=len(setting.rows))
            add("agreement", "scores", one, other, 1.0, e)
    return found


def stability_findings(
    sources: Sources, setting: Setting, scores: dict[str, np.ndarray], options: ResolvedOptions, progress: Progress
) -> dict[str, Any]:
    """How far rankings depend on what was drawn: queries, labelled examples, samples of the Fisher matrix.

    Queries are redrawn where that is cheap: for concept influence from the gradient index, which scores
    every query alone in one sweep, and for the direction of vector filter, fitted anew to redrawn examples.
    Candidates that differ in their seed alone tell what the samples of the Fisher matrix matter.
    """
    results: list[list[Any]] = []
    intervals = {}

    def add(quantity: str, candidate: Candidate, other: str, e: Estimate) -> None:
        results.append(["stability", quantity, candidate.name, other, 1.0, e.value, e.low, e.high, e.p, e.n])

    for candidate in options.methods:
        redrawn = redrawn_scores(sources, setting, candidate, progress)
        if redrawn is not None:
            found = statistics.stability(redrawn, scores[candidate.name])
            intervals[candidate.name] = (found.low, found.high)
            add("queries", candidate, "", found.spearman)
        for other in options.methods:
            seeds = (candidate.options.curvature.seed, other.options.curvature.seed)
            reseeded = other.options.changed(seed=seeds[0])
            if seeds[0] < seeds[1] and candidate.method == other.method and reseeded == candidate.options:
                matrix = statistics.rank_correlations({name: scores[name] for name in (candidate.name, other.name)})
                add("fisher", candidate, other.name, Estimate(matrix.to_numpy(float)[0, 1].item(), n=len(setting.rows)))
    return {"results": results, "intervals": intervals}


def score_frame(
    scores: dict[str, np.ndarray], setting: Setting, intervals: dict[str, tuple[np.ndarray, np.ndarray]]
) -> pd.DataFrame:
    n_rows = len(setting.rows)
    nothing = np.full(n_rows, NAN)
    label = pd.array(setting.labels, "Int8")
    label[~setting.judged] = pd.NA
    parts = []
    for method, worth in scores.items():
        low, high = intervals.get(method, (nothing, nothing))
        parts.append(
            pd.DataFrame(
                {
                    "method": method,
                    "example_id": np.arange(n_rows),
                    "score": worth,
                    "label": label,
                    "percentile_low": low,
                    "percentile_high": high,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
