"""The second stage of rankings from the gradient index: exact scores where people look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.audit.rankings import Ranking, Rankings
from concept_audit.errors import StoreError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.influence.two_stages import merged, recall
from concept_audit.metrics import Estimate, correlation
from concept_audit.pipeline.attribution import own_turn
from concept_audit.pipeline.rank import keep_query, scores_of
from concept_audit.pipeline.refine import SEED, Plan, exact_scores, plan
from concept_audit.pipeline.rollouts import by_advantage, weightless
from concept_audit.progress import Progress
from concept_audit.store.cursor import Cursor
from concept_audit.store.derived import require_rankings, save_refined
from concept_audit.store.evidence import ranking_scores
from concept_audit.store.rankings import ranked

TOPS = (10, 50, 200)
"""Of so many rows of the true top it is told how many have been found."""


class Refinements:
    """Exact scores of the first rows of rankings, which take the place of the index's."""

    def __init__(self, opened: OpenAudit, rankings: Rankings):
        self._opened = opened
        self._rankings = rankings

    def refine(
        self,
        concept: str,
        method: str | None = "concept_influence",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> dict[str, Any] | None:
        """Score the first rows of a ranking exactly, and a control drawn from the rest; put all in order anew.

        Further rows follow where too few of the true top are thought to be among them (`Plan.enough`).

        The ranking is computed if it is not in the store, and remains the same ranking. It is put in order anew as
        pieces of the answer come, the first rows first; the scores of all other rows are calibrated on the control,
        and keep their order. What is interrupted goes on where it was; another process that does the same is
        waited for.

        Returns:
            as `Rankings.refinement`; None for a ranking whose scores are exact anyway.

        Raises:
            ConceptError, ModelError, StoreError: as `Rankings.ensure`.
        """
        number = self._rankings.ensure(concept, method, options, progress)
        found = self._rankings.find(concept, method, options)
        if found.request.index is None:
            return None
        known = self._rankings.refinement(concept, method, options)
        if self._opened.read_only or (known and known["done"]):
            return known
        sources, reported = self._opened.sources(), progress or self._opened.progress

        def approximate() -> np.ndarray:
            if known:
                return scores_of(sources, found.request, number, reported)
            n_rows = sum(sources.shards("tokens").partition.sizes().values())
            return self._opened.read(lambda cursor: stored(cursor, n_rows))

        def stored(cursor: Cursor, n_rows: int) -> np.ndarray:
            # Of one that was thrown away a moment ago there would be nothing, and that would be kept.
            require_rankings(cursor, [number])
            return ranking_scores(cursor, number, n_rows)

        with own_turn(sources, number, reported):
            planned = plan(sources, number, approximate)
            keep_query(sources, found.request, number, reported)
            for done, exact in exact_scores(sources, number, planned, reported):
                weighed = by_advantage(sources, exact, found.request.options)
                known = self._save(found, planned, done, weighed)
                if known["done"]:
                    break
        return known

    def in_words(
        self, concept: str, method: str | None = "concept_influence", options: InfluenceOptions = DEFAULTS
    ) -> str | None:
        """What is exact of a ranking, and what may have been missed; None where all of it is exact anyway.

        Raises:
            ConceptError: as `Rankings.ensure`.
        """
        if self._rankings.find(concept, method, options).request.index is None:
            return None
        details = self._rankings.refinement(concept, method, options)
        return refinement_in_words(details) if details else "All scores are the gradient index's; none is exact."

    def _save(self, found: Ranking, planned: Plan, done: int, exact: np.ndarray) -> dict[str, Any]:
        if self._opened.build_id != found.identity.build_id:
            raise StoreError(
                f"{self._opened.name}: was built anew while its rows were scored, so the scores were of rows that are "
                "no more; ask for them again"
            )
        scores, line = merged(planned.approximate, exact, planned.control)
        # No line moves the score of a row that weighs nothing.
        nothing = weightless(self._opened.sources(), found.request.options, len(scores)) & ~np.isnan(scores)
        scores = np.where(nothing, 0.0, scores)
        known = nothing | (~np.isnan(exact) & ~np.isnan(scores))
        rows = ranked(np.array([found.id]), scores[:, None], known)
        enough = planned.enough(exact, done)
        in_order = rows["exact"].to_numpy()
        agreement = correlation(planned.approximate[planned.control], exact[planned.control])
        details = {
            "done": enough,
            "scored": done,
            "wanted": done if enough else planned.wanted(done),
            "exact": int(known.sum()),
            "first": int(np.argmin(in_order)) if not in_order.all() else len(in_order),
            "selected": len(planned.selected) + max(done - planned.certain, 0),
            "control": len(planned.control),
            "seed": SEED,
            "intercept": line.intercept,
            "slope": line.slope,
            "spearman": _numbers(agreement),
            "recall": [],
        }
        if enough:
            estimates = {top: recall(planned.approximate, exact, top) for top in TOPS if top < len(planned.selected)}
            details["recall"] = [{"top": top, **_numbers(each)} for top, each in estimates.items()]
        self._opened.derive(lambda cursor: save_refined(cursor, found.identity, rows, details), [found.id])
        return details


def refinement_in_words(details: Mapping[str, Any]) -> str:
    """What is exact of a ranking, and what may have been missed, in a sentence or two."""
    if details["done"] and not details["control"]:
        return f"All {details['exact']:,} scores are exact."
    first = f"{details['exact']:,} rows have exact scores, among them the first {details['first']:,}."
    if not details["done"]:
        return f"Exact scores: {details['scored']:,} of {details['wanted']:,} rows. {first}"
    told = next((each for each in details["recall"] if each["top"] == 50), None) or next(iter(details["recall"]), None)
    if told and told["value"] is not None:
        low, high = (f"{told[end]:.0f}" for end in ("low", "high"))
        first += (
            f" Of the true top {told['top']} about {told['value']:.0f} (95% interval {low} to {high}) are among them."
        )
    agreement = details["spearman"]
    if agreement["value"] is not None:
        between = "" if agreement["low"] is None else f" ({agreement['low']:.2f} to {agreement['high']:.2f})"
        first += (
            f" On {details['control']:,} rows drawn at random from the rest, the index has a Spearman correlation of "
            f"{agreement['value']:.2f}{between} with exact scores."
        )
    return first


def _numbers(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as JSON: NaN is nothing there."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if np.isnan(value) else round(float(value), 6) for name, value in values.items()}
