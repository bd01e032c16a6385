"""An audit in Python: what a notebook, the command line and the app all use."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from concept_audit.audit.comparisons import Comparisons
from concept_audit.audit.concepts import Concepts
from concept_audit.audit.documents import Documents
from concept_audit.audit.evidence import Validations
from concept_audit.audit.exports import Exports
from concept_audit.audit.feature_labels import FeatureLabels
from concept_audit.audit.flags import Flags
from concept_audit.audit.forecast import Forecasts
from concept_audit.audit.index import Index
from concept_audit.audit.labels import Labels
from concept_audit.audit.opened import OpenAudit
from concept_audit.audit.probes import Probes
from concept_audit.audit.queue import Queue
from concept_audit.audit.rankings import Rankings
from concept_audit.audit.refinements import Refinements
from concept_audit.audit.rows import Rows
from concept_audit.audit.trainings import Trainings
from concept_audit.audit.views import Views
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.engine import Engine
from concept_audit.progress import Progress
from concept_audit.store.manifest import Manifest
from concept_audit.store.published import found
from concept_audit.store.queries import Overview
from concept_audit.store.sql import run_query


class Audit:
    """One audit: its rows, concepts, rankings, labels and flags.

    Safe to share between threads. The model is loaded when something first needs it. What people do most is here
    too (`rank`, `train_probe`, …); everything is in the parts.

    Args:
        root: the audit's directory, or its address in object storage (``s3://bucket/mine``).
        progress: told about long work.
        read_only: refuse whatever people do, compute nothing and write nothing.
        device: where the model runs; ``auto`` for the fastest there is, None for where the audit was built.
        engine: does the heavy work; None for this process.
        trust_remote_code: run Python code that comes with the model; asked of each process, whoever built the audit.
        derived_bytes: how large the file of what is computed on demand may grow; None for what the environment
            says (``CONCEPT_AUDIT_DERIVED_BYTES``), or else 2 GiB.
        cache: where this machine keeps its files of an audit in object storage.

    Attributes:
        concepts: SAE features and probes, and what is known of each.
        feature_labels: labels of SAE features, where they are from, and how well they tell where a feature fires.
        labels: the labelled examples of probes.
        probes: training probes, and their versions.
        trainings: what training a probe again has changed.
        queue: rows to label next.
        rankings: rows by influence on a concept.
        refinements: exact scores of the first rows of rankings from the gradient index.
        comparisons: rankings beside each other, and beside what is known of the rows.
        rows: rows in the order of the data; token heatmaps, exact scores and the model's own answers for a few.
        documents: documents that were split into windows, by influence on a concept, and flagged as a whole.
        flags: what people decide about rows, and the log of it.
        views: views that have a name.
        exports: rows to take away.
        evidence: validations by fine-tuning without the rows that methods flag.
        index: the gradient index.
        forecasts: which concepts training on the data would strengthen or weaken.
        opened: its files, databases and memory, which the parts work on.

    Raises:
        StoreError: there is no finished audit there.
    """

    def __init__(
        self,
        root: str | Path,
        progress: Progress | None = None,
        read_only: bool = False,
        device: str | None = None,
        engine: Engine | None = None,
        trust_remote_code: bool = False,
        derived_bytes: int | None = None,
        cache: str | Path = "cache",
    ):
        place = found(root, Path(cache))
        self.opened = OpenAudit(place, progress, read_only, device, engine, trust_remote_code, derived_bytes)
        self.feature_labels = FeatureLabels(self.opened)
        self.labels = Labels(self.opened)
        self.probes = Probes(self.opened, self.labels)
        self.trainings = Trainings(self.opened, self.probes)
        self.concepts = Concepts(self.opened, self.probes)
        self.rankings = Rankings(self.opened, self.concepts)
        self.refinements = Refinements(self.opened, self.rankings)
        self.queue = Queue(self.opened, self.labels, self.probes, self.rankings)
        self.comparisons = Comparisons(self.opened, self.concepts, self.rankings)
        self.rows = Rows(self.opened, self.concepts, self.rankings)
        self.flags = Flags(self.opened, self.rankings)
        self.documents = Documents(self.opened, self.rankings, self.flags)
        self.views = Views(self.opened)
        self.exports = Exports(self.opened, self.concepts, self.probes, self.rankings, self.rows)
        self.evidence = Validations(self.opened, self.concepts)
        self.index = Index(self.opened)
        self.forecasts = Forecasts(self.opened)
        # What people do most, one step nearer.
        self.concept = self.concepts.get
        self.train_probe = self.probes.train
        self.rank = self.rankings.rank
        self.refine = self.refinements.refine
        self.rank_many = self.rankings.ensure_many
        self.groups = self.rankings.groups
        self.build_index = self.index.build
        self.forecast = self.forecasts.forecast
        self.validate = self.evidence.validate
        self.validate_forecast = self.evidence.validate_forecast
        self.evidence_report = self.evidence.report

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.opened.name

    @property
    def root(self) -> Path:
        """Its directory."""
        return self.opened.root

    @property
    def device_note(self) -> str:
        """Why the model does not run on the device that the audit was built on; empty if it does, or as asked."""
        return self.opened.device.note

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

    def query(self, query: str) -> pd.DataFrame:
        """What one SELECT on the contract views finds; it can change nothing.

        Raises:
            StoreError: not one SELECT, or DuckDB refuses it.
        """
        return self.opened.read(lambda cursor: run_query(cursor, query))

    def overview(self) -> Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self.opened.overview()
