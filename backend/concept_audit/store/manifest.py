"""The manifest of an audit: what it was made from, by what, and how far it got."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from concept_audit.errors import StoreError
from concept_audit.files import atomic_write
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import TABLE, TENSORS, RowShards, check_command
from concept_audit.types import Rollouts

FORMAT = 2
"""1 had the rows of 256 in a file, whose name did not say what it was of."""
STAGE_OF = {
    "rows": "rows",
    "tokens": "tokens",
    "activations": "activations",
    "token_activations": "activations",
    "answers": "activations",
    "answer_activations": "activations",
    "features": "features",
}
"""Kind of shards → the stage by whose key they are named."""
ON_REQUEST = {"token_activations", "answers", "answer_activations"}
"""Kinds of which a finished build may have none, or some: kept for a while, or made when they are asked for."""
TABLES = {"rows", "tokens", "answers", "features"}
NAMED = ("data", "model", "sae", "cache")
"""Settings that may be paths."""
BESIDE = "beside"
"""Setting: where those that are paths lie, seen from the audit."""
DEMOS: dict[str, tuple[str, list[str]]] = {
    "rows.jsonl": ("demo", []),
    "preferences.jsonl": ("demo-preferences", ["--kind", "preferences"]),
    "agents.jsonl": ("demo-agents", ["--kind", "agents"]),
}
"""The demo's data → the name of their audit, and the words by which `concept-audit demo` makes it."""
PACKAGES = ("concept-audit", "torch", "transformers", "sae-lens", "duckdb")


@dataclass
class Manifest:
    """What ``manifest.json`` holds.

    Attributes:
        configuration: the settings that decide what a build finds (data, model, layers, SAE, ...); with
            ``template_date``, the day that the model's chat template was told it is, if it asks for one, and
            ``beside``, where what is named by a path lies, seen from the audit.
        fingerprints: hashes that tell data, model, tokenizer (with its chat template) and SAE apart.
        stages: stage → key (hash of what it depends on), done, and what it reports.
        versions: of the packages that built it.
        created: when the build began, ISO 8601 in UTC.
    """

    configuration: dict[str, Any]
    fingerprints: dict[str, str]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: package_versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT

    @property
    def complete(self) -> bool:
        """Whether the build came to its end."""
        return bool(self.stages.get("store", {}).get("done"))

    @property
    def reader(self) -> str:
        """What a text's activations and answers hang on: the model, and how text becomes its tokens."""
        # Audits made before the tokenizer was recorded know of the model alone.
        return "-".join(self.fingerprints[name] for name in ("model", "tokenizer") if name in self.fingerprints)

    @property
    def pair(self) -> tuple[str, str] | None:
        """The columns of the chosen and the rejected side, where rows are preference pairs."""
        pair = self.configuration.get("pairs")
        return (pair[0], pair[1]) if pair else None

    @property
    def document(self) -> str | None:
        """The column of the text, where documents are split into windows; None where rows are as they were read."""
        return self.configuration.get("document")

    @property
    def rollouts(self) -> Rollouts | None:
        """What says how much rows weigh, where they are rollouts; None where all weigh alike."""
        made = self.configuration.get("rollouts")
        return Rollouts.from_json(made) if made else None

    def report(self, stage: str) -> dict[str, Any]:
        """What a finished stage said about itself; empty if it has not run."""
        return self.stages.get(stage, {}).get("report", {})

    def key(self, stage: str) -> str:
        """The hash of what a stage depends on, as it was begun last."""
        return self.stages[stage]["key"]

    def shards(self, layout: Layout, kind: str) -> RowShards:
        """The shards of one kind, under the key that this build has for them."""
        partition = RowPartition(self.report("rows")["rows"])
        suffix = TABLE if kind in TABLES else TENSORS
        return RowShards(layout.shards, kind, self.key(STAGE_OF[kind]), partition, suffix)

    def write(self, layout: Layout) -> None:
        """Replace the file in one step, then its copy."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        for path in (layout.manifest, layout.manifest_copy):
            with atomic_write(path) as partial:
                partial.write_text(text, "utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        StoreError: it is absent, damaged, or written by a later version.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        known = values.get("format")
    except FileNotFoundError:
        raise StoreError(
            f"{path.parent}: no audit there (no manifest.json); make one with "
            "`concept-audit build` or `concept-audit demo`, or check the path"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{path}: damaged ({error}); `{check_command(path.parent)}` puts its copy in its place; without one, run "
            "the build again with --rebuild, which keeps the workspace"
        ) from error
    if known == 1:
        raise StoreError(
            f"{path.parent}: made by an earlier version; make it anew with `{rebuild_command(path.parent, values)}`, "
            "which keeps labels, probes and flags"
        )
    if known != FORMAT:
        raise StoreError(
            f"{path}: was written by a newer version of Concept audit (format {known}, this one reads {FORMAT}); "
            "update this one: pip install -U concept-audit"
        )
    values["configuration"] = _located(path.parent, values["configuration"])
    return Manifest(**values)


def beside(root: Path, configuration: Mapping[str, Any]) -> dict[str, str]:
    """Where data, model, SAE and cache lie, seen from an audit, of those that are paths and are there."""
    found = {}
    for name in NAMED:
        if configuration[name] not in ("train", "none") and Path(configuration[name]).exists():
            with suppress(ValueError):  # on another drive
                found[name] = Path(os.path.relpath(configuration[name], root)).as_posix()
    return found


def _located(root: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration with paths as they are now: an audit may have been moved together with what it was made from."""
    moved = {name: Path(os.path.normpath(root / place)) for name, place in configuration.get(BESIDE, {}).items()}
    lost = {name for name in moved if not Path(configuration[name]).exists()}
    return configuration | {name: str(moved[name]) for name in lost if moved[name].exists()}


def rebuild_command(root: Path, values: dict[str, Any]) -> str:
    """The command that makes an audit anew with the settings that its manifest tells."""
    made = values["configuration"]
    for data, (name, words) in DEMOS.items():
        if made["data"].endswith(f"data/demo/{data}") and root.name == name:
            # The demo is built where it lies, which may not be where it was built first.
            return shlex.join(["concept-audit", "demo", *words, "--rebuild", *_cache(root.parent)])
    words = ["concept-audit", "build", "--data", made["data"], "--model", made["model"], "--out", str(root)]
    words += _cache(Path(made["cache"]))
    words += ["--layers", ",".join(map(str, made["layers"])), "--dtype", made["dtype"]]
    words += ["--device", made["device"]] if made.get("device", "auto") != "auto" else []
    words += ["--max-tokens", str(made["max_tokens"])]
    words += ["--sae", made["sae"]] if made["sae"] != "train" else []
    words += ["--sae-layer", str(made["sae_layer"])] if made["sae_layer"] else []
    training = made["sae_training"] or {}
    flags = {"expansion": "--sae-features", "k": "--sae-k", "epochs": "--sae-epochs"}
    words += [word for name, flag in flags.items() if name in training for word in (flag, str(training[name]))]
    words += ["--split", made["split"]] if made["split"] != "train" else []
    words += [
        word
        for name in ("turns", "on_bad_row", "long_documents")
        if made.get(name)
        for word in (f"--{name.replace('_', '-')}", made[name])
    ]
    words += ["--beta", str(made["beta"])] if made.get("beta") else []
    rewards = made.get("rewards") or {}
    words += ["--rollouts"] if rewards.get("rollouts") else []
    columns = {name: column for name, column in {**made["columns"], **rewards}.items() if isinstance(column, str)}
    words += [word for name, column in columns.items() if column for word in (f"--{name}-column", column)]
    words += ["--trust-remote-code"] if made["trust_remote_code"] else []
    return shlex.join([*words, "--rebuild"])


def _cache(directory: Path) -> list[str]:
    return [] if directory.resolve() == Path("cache").resolve() else ["--cache", str(directory)]


def package_versions() -> dict[str, str]:
    """Package → version, of those that decide what is found."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
