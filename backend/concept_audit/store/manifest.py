"""The manifest of an audit: what it was made from, by what, and how far it got."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from concept_audit.errors import StoreError
from concept_audit.store.layout import whole

FORMAT = 1
PACKAGES = ("concept-audit", "torch", "transformers", "sae-lens", "duckdb")


@dataclass
class Manifest:
    """What ``manifest.json`` holds.

    Attributes:
        configuration: the settings that decide what a build finds (data, model, layers, SAE, ...).
        fingerprints: hashes that tell data, model and SAE apart.
        stages: stage → key (hash of what it depends on), done, and what it reports.
        versions: of the packages that built it.
        created: when the build began, ISO 8601 in UTC.
    """

    configuration: dict[str, Any]
    fingerprints: dict[str, str]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT

    @property
    def complete(self) -> bool:
        """Whether the build came to its end."""
        return bool(self.stages.get("store", {}).get("done"))

    def report(self, stage: str) -> dict[str, Any]:
        """What a finished stage said about itself; empty if it has not run."""
        return self.stages.get(stage, {}).get("report", {})

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        with whole(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")


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
            f"{path}: damaged ({error}); run the build again with --rebuild, which keeps the workspace"
        ) from error
    if known != FORMAT:
        raise StoreError(
            f"{path}: written in format {known}, this version reads {FORMAT}; "
            "use the version that wrote it, or build again with --rebuild"
        )
    return Manifest(**values)


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
