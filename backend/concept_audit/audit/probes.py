"""Concepts that people draw from labelled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from concept_audit.audit.labels import Labels
from concept_audit.audit.opened import OpenAudit
from concept_audit.audit.probe_file import check_probe, probe_from_json, probe_to_json
from concept_audit.concepts.examples import distinct
from concept_audit.concepts.probe import FITS, TrainedProbe, boundary, check_counts, held_out_scores, train_probe
from concept_audit.concepts.probe_report import ProbeReport, probe_report
from concept_audit.errors import ConceptError
from concept_audit.pipeline.examples import example_activations
from concept_audit.pipeline.kept_queries import forget_influence
from concept_audit.progress import Progress
from concept_audit.store import queries, workspace
from concept_audit.store.cursor import Cursor
from concept_audit.store.workspace import SavedProbe
from concept_audit.types import LabelledExample, ProbeFit


class Probes:
    """Trained probes, with their earlier versions."""

    def __init__(self, opened: OpenAudit, labels: Labels):
        self._opened = opened
        self._labels = labels

    def list(self) -> Sequence[SavedProbe]:
        """Every trained probe with what its training reported."""
        return self._opened.cached_read("probes", workspace.probes)

    def find(self, name: str) -> SavedProbe | None:
        """The trained probe of this name, if there is one."""
        return next((probe for probe in self.list() if probe.name == name), None)

    def train(
        self,
        name: str,
        examples: Sequence[LabelledExample] | None = None,
        layer: int | None = None,
        fits: Sequence[ProbeFit] = FITS,
        progress: Progress | None = None,
    ) -> TrainedProbe:
        """Train a probe and save it under `name`; an earlier one of that name is replaced.

        Args:
            examples: the whole training set; None takes the labels kept under `name`.
            layer: a layer of the audit; None chooses by held-out AUROC.
            fits: ways of fitting to choose from.

        Raises:
            ConceptError: too few examples, one label only, contradicting labels, or a layer not kept.
        """
        name = workspace.check_probe_name(name)
        given = distinct(self._labels.list(name) if examples is None else examples)
        check_counts(sum(e.label == 1 for e in given), sum(e.label == 0 for e in given))
        if layer is not None:
            self._check_layer(layer)
        layers = self._opened.layers if layer is None else (layer,)
        labels = np.array([e.label for e in given])
        fingerprint = self._opened.manifest.fingerprints["model"]
        activations = self._activations(given, layers, progress)
        trained = train_probe(activations, labels, self._opened.read(queries.spreads), fits)
        details = {
            "auroc": trained.auroc,
            "auroc_low": trained.auroc_interval[0],
            "auroc_high": trained.auroc_interval[1],
            "n_positive": trained.n_positive,
            "n_negative": trained.n_negative,
            "boundary": boundary(activations[trained.layer], labels, trained.direction),
            "tried": [{"layer": k, "fit": f, "auroc": a} for (k, f), a in trained.tried.items()],
        }

        def save(cursor: Cursor) -> None:
            if examples is not None:
                workspace.unlabel(cursor, name)
                workspace.label(cursor, name, given)
            workspace.save_probe(cursor, name, trained.layer, trained.fit, trained.direction, details, fingerprint)

        self._opened.change(save)
        self._forget_influence(name)
        return trained

    def delete(self, name: str) -> None:
        """Remove a probe with its labels and rankings."""
        self._opened.change(lambda cursor: workspace.delete_probe(cursor, name))
        self._forget_influence(name)

    def rename(self, name: str, new: str) -> None:
        """Give a probe, with its labels and versions, another name.

        Raises:
            ConceptError: there is no such probe, one of the new name is there, or the name will not do.
        """
        wanted = workspace.check_probe_name(new)
        self._opened.change(lambda cursor: workspace.rename_probe(cursor, name, wanted))
        self._forget_influence(name)

    def versions(self, name: str) -> Sequence[SavedProbe]:
        """Earlier trainings of a probe, the latest first."""
        return self._opened.cached_read(("versions", name), lambda cursor: workspace.probe_versions(cursor, name))

    def restore(self, name: str, version: int) -> None:
        """Make an earlier training the present one again, as a new version; the present one is kept.

        Raises:
            ConceptError: there is no such version.
        """
        old = next((p for p in self.versions(name) if p.version == version), None)
        if old is None:
            raise ConceptError(f"probe {name!r}: it has no earlier version {version}")
        self._save(old, {**old.details, "restored_from": version})

    def set_threshold(self, name: str, threshold: float) -> None:
        """Keep, with a trained probe, the score from which on a row counts as showing the behaviour."""
        self._opened.change(lambda cursor: workspace.set_threshold(cursor, name, float(threshold)))

    def report(self, name: str, progress: Progress | None = None) -> ProbeReport:
        """Held-out evidence for a probe with the labels so far, trained or not.

        Raises:
            ConceptError: too few labels, or an example without a response.
        """
        examples = self._labels.list(name)
        labels = np.array([e.label for e in examples], np.int64)
        check_counts(int((labels == 1).sum()), int((labels == 0).sum()))
        return probe_report(self._activations(examples, self._opened.layers, progress), labels)

    def held_out(self, name: str, progress: Progress | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Held-out scores of a trained probe's labelled examples, fitted as it was, at its layer.

        Returns:
            scores float64 [examples], 0 at the probe's boundary, and labels int [examples].

        Raises:
            ConceptError: there is no trained probe of this name, or too few labels are left.
        """
        saved = self.find(name)
        if saved is None:
            raise ConceptError(f"probe {name!r}: not trained yet")
        examples = self._labels.list(name)
        labels = np.array([e.label for e in examples], np.int64)
        check_counts(int((labels == 1).sum()), int((labels == 0).sum()))
        inputs = self._activations(examples, (saved.layer,), progress)[saved.layer]
        spread = self._opened.read(queries.spreads)[saved.layer]
        return held_out_scores(saved.fit, inputs, labels, spread), labels

    def export(self, name: str) -> str:
        """A trained probe with its labelled examples, as JSON.

        Raises:
            ConceptError: there is no trained probe of this name.
        """
        saved = self.find(name)
        if saved is None:
            raise ConceptError(f"probe {name!r}: not trained yet; train it, then take it away")
        return probe_to_json(saved, self._opened.manifest.configuration["model"], self._labels.list(name))

    def import_(self, content: str, name: str | None = None) -> str:
        """Put a probe from `export` into this audit; returns its name.

        Args:
            name: another name for it.

        Raises:
            ConceptError: not such a file, of another model, or its name is taken.
        """
        saved, examples = probe_from_json(content, name)
        widths = {layer: len(spread) for layer, spread in self._opened.read(queries.spreads).items()}
        check_probe(saved, self._opened.manifest.fingerprints["model"], next(iter(widths.values())))
        if saved.name in self._labels.counts()["probe"].tolist():
            raise ConceptError(f"probe {saved.name!r} is there already; choose another name")
        self._check_layer(saved.layer)
        if examples:
            self._labels.add(saved.name, examples)
        self._save(saved, saved.details)
        return saved.name

    def _save(self, probe: SavedProbe, details: Mapping[str, Any]) -> None:
        self._opened.change(
            lambda cursor: workspace.save_probe(
                cursor, probe.name, probe.layer, probe.fit, probe.direction, details, probe.model_fingerprint
            )
        )
        self._forget_influence(probe.name)

    def _forget_influence(self, name: str) -> None:
        forget_influence(self._opened.layout, f"probe:{name}")

    def _check_layer(self, layer: int) -> None:
        kept = self._opened.layers
        if layer not in kept:
            raise ConceptError(
                f"--layer {layer}: this audit keeps layers {', '.join(map(str, kept))}; choose one of "
                "them, or build again with --layers"
            )

    def _activations(
        self, examples: Sequence[LabelledExample], layers: Sequence[int], progress: Progress | None
    ) -> dict[int, np.ndarray]:
        return example_activations(self._opened.sources(), examples, layers, progress or self._opened.progress)
