"""Labels and probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from concept_audit.api.rankings import Rankings
from concept_audit.concepts.examples import distinct, example_activations
from concept_audit.concepts.probe import FITS, Fit, TrainedProbe, boundary, check_counts, train_probe
from concept_audit.concepts.probe_report import ProbeReport, probe_report
from concept_audit.errors import ConceptError
from concept_audit.pipeline.attribution import forget_influence
from concept_audit.progress import Progress
from concept_audit.store import queries, workspace
from concept_audit.store.filters import RowFilter
from concept_audit.store.shards import messages_from_json, messages_json
from concept_audit.types import LabelledExample

PROBE_FILE = "concept-audit probe"
QUEUE_KINDS = ("likely", "uncertain", "unlikely")


class Probes(Rankings):
    """Drawing concepts from labelled examples."""

    def label(self, probe: str, examples: Sequence[LabelledExample]) -> None:
        """Keep labels for a probe, trained or not yet."""
        name = workspace.check_probe_name(probe)
        self._change(lambda cursor: workspace.label(cursor, name, examples))

    def unlabel(self, probe: str, content_hashes: Sequence[str] | None = None) -> None:
        """Forget labels of a probe: of these texts, or all."""
        self._change(lambda cursor: workspace.unlabel(cursor, probe, content_hashes))

    def labels(self, probe: str) -> list[LabelledExample]:
        """The labelled examples of a probe."""
        return self._kept(("labels", probe), lambda cursor: workspace.labels(cursor, probe))

    def label_counts(self) -> pd.DataFrame:
        """Probes begun or trained: probe, positives, negatives, trained."""
        return self._kept("label_counts", workspace.label_counts)

    def train_probe(
        self,
        name: str,
        examples: Sequence[LabelledExample] | None = None,
        layer: int | None = None,
        fits: Sequence[Fit] = FITS,
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
        given = distinct(self.labels(name) if examples is None else examples)
        check_counts(sum(e.label == 1 for e in given), sum(e.label == 0 for e in given))
        layers = self.layers if layer is None else (self._tracked(layer),)
        fingerprint = self.manifest.fingerprints["model"]
        activations = self._example_activations(given, layers, progress)
        spread = self._read(queries.spreads)
        trained = train_probe(activations, np.array([e.label for e in given]), spread, fits)
        details = {
            "auroc": trained.auroc,
            "auroc_low": trained.auroc_interval[0],
            "auroc_high": trained.auroc_interval[1],
            "n_positive": trained.n_positive,
            "n_negative": trained.n_negative,
            "boundary": boundary(activations[trained.layer], np.array([e.label for e in given]), trained.direction),
            "tried": [{"layer": k, "fit": f, "auroc": a} for (k, f), a in trained.tried.items()],
        }

        def save(cursor) -> None:
            if examples is not None:
                workspace.unlabel(cursor, name)
                workspace.label(cursor, name, given)
            workspace.save_probe(cursor, name, trained.layer, trained.fit, trained.direction, details, fingerprint)

        self._change(save)
        forget_influence(self._layout, f"probe:{name}")
        return trained

    def delete_probe(self, name: str) -> None:
        """Remove a probe with its labels and rankings."""
        self._change(lambda cursor: workspace.delete_probe(cursor, name))
        forget_influence(self._layout, f"probe:{name}")

    def rename_probe(self, name: str, new: str) -> None:
        """Give a probe, with its labels and versions, another name.

        Raises:
            ConceptError: there is no such probe, one of the new name is there, or the name will not do.
        """
        wanted = workspace.check_probe_name(new)
        self._change(lambda cursor: workspace.rename_probe(cursor, name, wanted))
        forget_influence(self._layout, f"probe:{name}")

    def probe_versions(self, name: str) -> list[workspace.SavedProbe]:
        """Earlier trainings of a probe, the latest first."""
        return self._kept(("versions", name), lambda cursor: workspace.probe_versions(cursor, name))

    def restore_probe(self, name: str, version: int) -> None:
        """Make an earlier training the present one again, as a new version; the present one is kept.

        Raises:
            ConceptError: there is no such version.
        """
        old = next((p for p in self.probe_versions(name) if p.version == version), None)
        if old is None:
            raise ConceptError(f"probe {name!r}: it has no earlier version {version}")
        self._save(old, {**old.details, "restored_from": version})

    def set_threshold(self, name: str, threshold: float) -> None:
        """Keep, with a trained probe, the score from which on a row counts as showing the behaviour."""
        self._change(lambda cursor: workspace.set_threshold(cursor, name, float(threshold)))

    def probe_report(self, name: str, progress: Progress | None = None) -> ProbeReport:
        """Held-out evidence for a probe with the labels so far, trained or not.

        Raises:
            ConceptError: too few labels, or an example without a response.
        """
        examples = self.labels(name)
        labels = np.array([e.label for e in examples], np.int64)
        check_counts(int((labels == 1).sum()), int((labels == 0).sum()))
        return probe_report(self._example_activations(examples, self.layers, progress), labels)

    # The queue of rows to label

    def next_to_label(
        self, name: str, where: RowFilter, kinds: Sequence[str] = QUEUE_KINDS
    ) -> tuple[str, pd.Series] | None:
        """A row that has no label and was not skipped, and why it is offered; None if none is left.

        Before the probe is trained rows come in an order that looks random; then likely, uncertain and
        unlikely ones in turn: the highest scores, those nearest to the boundary, the lowest.

        Args:
            kinds: of `QUEUE_KINDS`, those to offer.
        """
        trained = next((p for p in self.probes() if p.name == name), None)
        if trained is None or not kinds:
            found = self._read(lambda cursor: queries.unlabelled(cursor, name, where, None, "shuffled", 0.0))
            return None if found.empty else ("shuffled", found.iloc[0])
        counts = self.label_counts().set_index("probe")
        done = int(counts.loc[name, ["positives", "negatives", "skipped"]].sum()) if name in counts.index else 0
        kind = kinds[done % len(kinds)]
        ranking = self.ranking(f"probe:{name}")
        boundary = float(trained.details.get("boundary", 0.0))
        found = self._read(lambda cursor: queries.unlabelled(cursor, name, where, ranking, kind, boundary))
        return None if found.empty else (kind, found.iloc[0])

    def skip(self, name: str, content_hashes: Sequence[str]) -> None:
        """Offer these texts no more for labelling."""
        self._change(lambda cursor: workspace.skip(cursor, workspace.check_probe_name(name), content_hashes))

    def unskip(self, name: str, content_hash: str) -> None:
        """Offer a text again."""
        self._change(lambda cursor: workspace.unskip(cursor, name, content_hash))

    # Files

    def export_probe(self, name: str) -> str:
        """A trained probe with its labelled examples, as JSON.

        Raises:
            ConceptError: there is no trained probe of this name.
        """
        saved = next((p for p in self.probes() if p.name == name), None)
        if saved is None:
            raise ConceptError(f"probe {name!r}: not trained yet; train it, then take it away")
        told = {
            "kind": PROBE_FILE,
            "name": saved.name,
            "layer": saved.layer,
            "fit": saved.fit,
            "model_fingerprint": saved.model_fingerprint,
            "model": self.manifest.configuration["model"],
            "details": dict(saved.details),
            "direction": [float(x) for x in saved.direction],
            "examples": [
                {"messages": json.loads(messages_json(e.messages)), "label": e.label} for e in self.labels(name)
            ],
        }
        return json.dumps(told, ensure_ascii=False, indent=1) + "\n"

    def import_probe(self, content: str, name: str | None = None) -> str:
        """Put a probe from `export_probe` into this audit; returns its name.

        Args:
            name: another name for it.

        Raises:
            ConceptError: not such a file, of another model, or its name is taken.
        """
        try:
            told = json.loads(content)
            if told["kind"] != PROBE_FILE:
                raise KeyError("kind")
            wanted = workspace.check_probe_name(name or told["name"])
            direction = np.asarray(told["direction"], np.float32)
            examples = [
                LabelledExample(messages_from_json(json.dumps(e["messages"])), int(e["label"]))
                for e in told["examples"]
            ]
            saved = workspace.SavedProbe(
                wanted,
                1,
                int(told["layer"]),
                str(told["fit"]),
                direction,
                dict(told["details"]),
                str(told["model_fingerprint"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConceptError(
                f"not a probe that was taken away from here ({error!r}); choose a file of `Export`"
            ) from error
        here = self.manifest.fingerprints["model"]
        if saved.model_fingerprint != here:
            raise ConceptError(
                f"probe {saved.name!r}: made for a model of fingerprint {saved.model_fingerprint}, this audit has "
                f"{here}; upload its examples instead and train it here"
            )
        if not np.isfinite(direction).all() or abs(float(np.linalg.norm(direction)) - 1) > 1e-3:
            raise ConceptError(f"probe {saved.name!r}: its direction is not of unit length; the file is damaged")
        if wanted in self.label_counts()["probe"].tolist():
            raise ConceptError(f"probe {wanted!r} is there already; choose another name")
        self._tracked(saved.layer)
        if examples:
            self.label(wanted, examples)
        self._save(saved, saved.details)
        return wanted

    def _save(self, probe: workspace.SavedProbe, details: dict[str, Any]) -> None:
        self._change(
            lambda cursor: workspace.save_probe(
                cursor, probe.name, probe.layer, probe.fit, probe.direction, details, probe.model_fingerprint
            )
        )
        forget_influence(self._layout, f"probe:{probe.name}")

    def _example_activations(
        self, examples: Sequence[LabelledExample], layers: Sequence[int], progress: Progress | None
    ) -> dict[int, np.ndarray]:
        manifest = self.manifest
        return example_activations(
            self._layout,
            self._database,
            examples,
            layers,
            manifest.fingerprints["model"],
            manifest.configuration["max_tokens"],
            self.model,
            progress or self._progress,
        )
