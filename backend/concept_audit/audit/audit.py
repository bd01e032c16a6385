"""An audit in Python: what a notebook, the command line and the app all use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from concept_audit.audit.comparisons import Comparisons
from concept_audit.audit.concepts import Concepts
from concept_audit.audit.evidence import Validations
from concept_audit.audit.exports import Exports
from concept_audit.audit.flags import Flags
from concept_audit.audit.index import Index
from concept_audit.audit.labels import Labels
from concept_audit.audit.opened import DEFAULTS, EVERY_ROW, OpenAudit
from concept_audit.audit.probes import Probes
from concept_audit.audit.queue import Queue
from concept_audit.audit.rankings import Rankings
from concept_audit.audit.rows import Rows
from concept_audit.audit.views import Views
from concept_audit.concepts.probe import FITS, TrainedProbe
from concept_audit.influence.options import IndexOptions, InfluenceOptions
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.engine import Engine
from concept_audit.pipeline.validation.options import ValidateOptions
from concept_audit.progress import Progress
from concept_audit.store.evidence import Evidence
from concept_audit.store.filters import RowFilter
from concept_audit.store.manifest import Manifest
from concept_audit.store.queries import Overview
from concept_audit.types import Concept, LabelledExample, ProbeFit


class Audit:
    """One audit on disk: its rows, concepts, rankings, labels and flags.

    Safe to share between threads. The model is loaded when something first needs it. What people do most is a
    method here; everything is in the parts.

    Args:
        root: the audit's directory.
        progress: told about long work.
        read_only: refuse whatever people do: labels, flags, names. Results are still computed and kept.
        device: where the model runs; ``auto`` for the fastest there is.
        engine: does the heavy work; None for this process.

    Attributes:
        concepts: SAE features and probes, and what is known of each.
        labels: the labelled examples of probes.
        probes: training probes, and their versions.
        queue: rows to label next.
        rankings: rows by influence on a concept.
        comparisons: rankings beside each other, and beside what is known of the rows.
        rows: rows in the order of the data; token heatmaps, exact scores and the model's own answers for a few.
        flags: what people decide about rows, and the log of it.
        views: views that have a name.
        exports: rows to take away.
        evidence: validations by fine-tuning without the rows that methods flag.
        index: the gradient index.
        opened: its files, databases and memory, which the parts work on.

    Raises:
        StoreError: there is no finished audit there.
    """

    def __init__(
        self,
        root: str | Path,
        progress: Progress | None = None,
        read_only: bool = False,
        device: str = "auto",
        engine: Engine | None = None,
    ):
        self.opened = OpenAudit(root, progress, read_only, device, engine)
        self.labels = Labels(self.opened)
        self.probes = Probes(self.opened, self.labels)
        self.concepts = Concepts(self.opened, self.probes)
        self.rankings = Rankings(self.opened, self.concepts)
        self.queue = Queue(self.opened, self.labels, self.probes, self.rankings)
        self.comparisons = Comparisons(self.opened, self.concepts, self.rankings)
        self.rows = Rows(self.opened, self.concepts, self.rankings)
        self.flags = Flags(self.opened, self.rankings)
        self.views = Views(self.opened)
        self.exports = Exports(self.opened, self.concepts, self.probes, self.rankings, self.rows)
        self.evidence = Validations(self.opened, self.concepts)
        self.index = Index(self.opened)

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.opened.name

    @property
    def root(self) -> Path:
        """Its directory."""
        return self.opened.root

    @property
    def read_only(self) -> bool:
        """Whether it refuses what people do."""
        return self.opened.read_only

    @property
    def manifest(self) -> Manifest:
        """What it was made from."""
        return self.opened.manifest

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept; probes live at one of them."""
        return self.opened.layers

    def model(self) -> LanguageModel:
        """The model that it was made with; see `OpenAudit.model`."""
        return self.opened.model()

    def overview(self) -> Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self.opened.overview()

    def concept(self, name: str) -> Concept:
        """The concept with this name or id; see `Concepts.get`."""
        return self.concepts.get(name)

    def train_probe(
        self,
        name: str,
        examples: Sequence[LabelledExample] | None = None,
        layer: int | None = None,
        fits: Sequence[ProbeFit] = FITS,
        progress: Progress | None = None,
    ) -> TrainedProbe:
        """Train a probe on labelled examples and save it; see `Probes.train`."""
        return self.probes.train(name, examples, layer, fits, progress)

    def rank(
        self,
        concept: str,
        method: str = "vector_filter",
        top: int | None = None,
        where: RowFilter = EVERY_ROW,
        offset: int = 0,
        options: InfluenceOptions = DEFAULTS,
    ) -> pd.DataFrame:
        """Rows by influence on a concept: rank, score, percentile, then the row; see `Rankings.rank`."""
        return self.rankings.rank(concept, method, top, where, offset, options)

    def rank_many(
        self,
        concepts: Sequence[str],
        method: str = "concept_influence",
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> None:
        """Put the rankings of several concepts into the store; see `Rankings.ensure_many`."""
        self.rankings.ensure_many(concepts, method, options, progress)

    def groups(
        self,
        concept: str,
        method: str = "concept_influence",
        by: str = "sae_feature",
        options: InfluenceOptions = DEFAULTS,
        beside: str | None = None,
        beside_options: InfluenceOptions | None = None,
    ) -> pd.DataFrame:
        """Influence by group of rows: group, label, n_rows, mean, low, high, difference; see `Rankings.groups`."""
        return self.rankings.groups(concept, method, by, options, beside, beside_options)

    def check_exactly(
        self,
        concept: str,
        method: str = "concept_influence",
        top: int = 50,
        options: InfluenceOptions = DEFAULTS,
        progress: Progress | None = None,
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Score the first rows of a ranking exactly: rank, example_id, score, exact_score; see `Rows.check_exactly`."""
        return self.rows.check_exactly(concept, method, top, options, progress)

    def build_index(self, options: IndexOptions | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Build the gradient index, or what is missing of it; see `Index.build`."""
        return self.index.build(options, progress)

    def validate(
        self, concept: str, options: ValidateOptions | None = None, progress: Progress | None = None
    ) -> Evidence:
        """Train without what the methods flag, and tell what it does to the model; see `Validations.validate`."""
        return self.evidence.validate(concept, options, progress)

    def evidence_report(self, evidence_id: str) -> tuple[str, dict[str, str]]:
        """A validation as a report: Markdown and its figures as SVG; see `Validations.report`."""
        return self.evidence.report(evidence_id)
