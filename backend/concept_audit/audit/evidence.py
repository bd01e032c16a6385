"""Whether removing what is flagged changes the model, and training as forecast: fine-tuning runs, and what they say."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pandas as pd

from concept_audit.audit.concepts import Concepts
from concept_audit.audit.forecast import neutral_prompts
from concept_audit.audit.opened import DEFAULTS, OpenAudit
from concept_audit.errors import ConceptError
from concept_audit.evidence.report import report
from concept_audit.influence.options import InfluenceOptions
from concept_audit.metrics import Estimate
from concept_audit.pipeline.forecast import Prompts
from concept_audit.pipeline.validate import validate
from concept_audit.pipeline.validation.first_order import first_order
from concept_audit.pipeline.validation.forecast import validate_forecast
from concept_audit.pipeline.validation.forecast_options import ForecastTrial
from concept_audit.pipeline.validation.options import Cost, ValidateOptions, cost_of
from concept_audit.progress import Progress
from concept_audit.store import evidence as store_evidence
from concept_audit.store import forecast as store_forecast
from concept_audit.store.locks import held

REFUSAL = "{name}: {{who}} validates here already, and one at a time is enough; wait for it, or stop it"


class Validations:
    """Evidence by training without the rows that methods flag."""

    def __init__(self, opened: OpenAudit, concepts: Concepts):
        self._opened = opened
        self._concepts = concepts

    def validate(
        self, concept: str, options: ValidateOptions | None = None, progress: Progress | None = None
    ) -> store_evidence.Evidence:
        """Train without what the methods flag, and tell what it does to the model; see `ValidateOptions`.

        A validation that was interrupted, by an error that `progress` raises too, goes on where it was.

        Raises:
            ConceptError: unknown concept, or options that make no sense.
            StoreError: another validation of this audit is under way.
        """
        found = self._concepts.get(concept)
        with self._alone():
            evidence = validate(
                self._opened.sources(), found, options or ValidateOptions(), progress or self._opened.progress
            )
        build = self._opened.build_id
        self._opened.write(lambda cursor: store_evidence.save_evidence(cursor, build, found.version, evidence))
        return evidence

    def validate_forecast(
        self,
        trial: ForecastTrial | None = None,
        prompts: Prompts | None = None,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> store_evidence.Evidence:
        """Train on the rows, and tell how far the concepts change as the forecast says; see `ForecastTrial`.

        Runs that were done are not done again.

        Args:
            prompts: conversations whose assistant turns are read; None for the 64 that come with the package.
            options: of the forecast.

        Raises:
            ConceptError: options that make no sense, no rows to train on, or preference pairs.
            StoreError: another validation of this audit is under way.
        """
        if prompts is not None and not len(prompts):
            raise ConceptError("no prompts: give at least one conversation with an assistant turn")
        opened = self._opened
        model = opened.made.fingerprints["model"]
        probes = opened.read(lambda cursor: store_forecast.probe_directions(cursor, model, opened.layers))
        with self._alone():
            evidence = validate_forecast(
                opened.sources(),
                neutral_prompts() if prompts is None else prompts,
                options,
                trial or ForecastTrial(),
                probes,
                progress or opened.progress,
            )
        build = opened.build_id
        opened.write(lambda cursor: store_evidence.save_evidence(cursor, build, 1, evidence))
        return evidence

    def of_forecasts(self) -> pd.DataFrame:
        """Forecasts held against training that are kept, latest first: evidence_id, number, current."""
        return self._opened.read(store_evidence.list_forecast_evidence)

    def cost(self, options: ValidateOptions | None = None) -> Cost:
        """What a validation takes, before any of it is done.

        Raises:
            ConceptError: options that make no sense.
        """
        return cost_of(options or ValidateOptions(), self._opened.overview().n_rows, self._opened.made.pair is not None)

    def first_order(
        self, concept: str, subsets: int = 40, size: int = 8, pool: int = 96, progress: Progress | None = None
    ) -> tuple[Estimate, pd.DataFrame]:
        """One small step on each of some random subsets, against influence without curvature.

        Args:
            subsets: how many.
            size: rows of each.
            pool: rows that they are drawn from.

        Returns:
            Pearson's correlation, and predicted and actual change of each subset.

        Raises:
            ConceptError: unknown concept, one without queries, or too few rows.
        """
        found = self._concepts.get(concept)
        progress = progress or self._opened.progress
        return first_order(self._opened.sources(), found, progress, subsets, size, pool)

    def list(self) -> pd.DataFrame:
        """Validations of concepts that are kept, latest first; see `concept_audit.store.evidence.list_evidence`."""
        return self._opened.read(store_evidence.list_evidence)

    def get(self, evidence_id: str) -> store_evidence.Evidence:
        """What a validation found.

        Raises:
            ConceptError: there is none with this id.
        """
        return self._opened.read(lambda cursor: store_evidence.read_evidence(cursor, evidence_id))

    def report(self, evidence_id: str) -> tuple[str, dict[str, str]]:
        """A validation as a report: Markdown, where ``{figures}/`` is the place of its figures, and these as SVG.

        Raises:
            ConceptError: there is none with this id.
        """
        return report(self.get(evidence_id))

    def _alone(self) -> AbstractContextManager[None]:
        return held(self._opened.layout.lock_of("validate"), REFUSAL.format(name=self._opened.name))
