"""The demo: each data set that ships with the project, audited with its probes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from concept_audit.audit.audit import Audit
from concept_audit.data.demo import DATA, DemoKind
from concept_audit.data.read import read_labelled
from concept_audit.errors import FinishedIndexError
from concept_audit.influence.options import CurvatureOptions, IndexOptions
from concept_audit.model.builtin import SMOLLM2
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions
from concept_audit.progress import Progress

INDEX = IndexOptions(samples=256, curvature=CurvatureOptions(curvature_tokens=8_000))
"""Less than the usual sizes, for a data set of 439 rows on a laptop."""
RANKED_FEATURES = 24
"""SAE features whose influence is ranked behind the app; that of any other takes seconds when it is asked for."""
FEATURES_AT_ONCE = 8
"""In one sweep of the index, after which their rankings are there."""


def build_demo(
    cache: Path, progress: Progress, rebuild: bool = False, device: str | None = None, kind: DemoKind = "chats"
) -> Audit:
    """Build the audit of a demo data set with its probes, and of the chats an SAE, or what is missing of it.

    Probes that are there already are left as they are: people may have changed their labels.

    Args:
        device: where the model runs; None for the fastest there is.
    """
    data = DATA[kind]
    options = BuildOptions(
        data=str(data.rows),
        out=cache / data.audit,
        model=ModelOptions(SMOLLM2.name, device or "auto"),
        cache=cache,
        layers=(8, 12, 16),
        sae="train" if kind == "chats" else "none",  # the others are too few rows to train one on
        rebuild=rebuild,
    )
    audit = Audit(build(options, progress), progress)
    there = {probe.name for probe in audit.probes.list()}
    for name, examples in data.probes.items():
        if name not in there:
            with progress.stage(f"Training the probe {name}") as stage:
                trained = audit.train_probe(name, read_labelled(examples), progress=Progress())
                low, high = trained.auroc_interval
                stage.detail = f"held-out AUROC {trained.auroc:.2f} ({low:.2f} to {high:.2f})"
        audit.rankings.ensure(name)
    return audit


def finish_demo(audit: Audit, progress: Progress, kind: DemoKind = "chats") -> None:
    """Build the demo's gradient index, and the influence rankings of its probes and most varied features.

    Of pairs and trajectories the probes are ranked exactly, which on so few rows takes less than an index.

    What people meet first comes first: the probes are ranked as soon as the index answers, before its agreement with
    exact scores is measured; then the features, a few at a time, those that differ most between rows first.
    """

    def rank_probes() -> None:
        there = {probe.name for probe in audit.probes.list()}  # people may have deleted one meanwhile
        audit.rank_many([f"probe:{name}" for name in DATA[kind].probes if name in there], progress=progress)

    if kind != "chats":
        rank_probes()
        return

    about = audit.index.describe()
    if about is None or "fidelity" not in about:
        with suppress(FinishedIndexError):  # one that somebody has made with other options stays
            audit.build_index(INDEX, progress=progress, answering=rank_probes)
    rank_probes()
    features = audit.concepts.spread(RANKED_FEATURES)
    for first in range(0, len(features), FEATURES_AT_ONCE):
        audit.rank_many(features[first : first + FEATURES_AT_ONCE], progress=progress)
