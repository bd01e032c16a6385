"""Where the files of an audit lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from concept_audit.store.objects import SHARDS, objects_of
from concept_audit.store.shard_store import ShardStore


@dataclass(frozen=True)
class Layout:
    """The files of one audit.

    Attributes:
        root: the audit's directory.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """Configuration, versions, fingerprints and the state of each stage."""
        return self.root / "manifest.json"

    @property
    def manifest_copy(self) -> Path:
        """The same once more, should the first be damaged; written after it."""
        return self.root / "manifest.copy.json"

    @property
    def audit(self) -> Path:
        """What the pipeline found; read-only once built."""
        return self.root / "audit.duckdb"

    @property
    def workspace(self) -> Path:
        """What people did, which nothing can make again: probes, labels, flags, notes, views, evidence, the log."""
        return self.root / "workspace.duckdb"

    @property
    def derived(self) -> Path:
        """What was computed on demand: rankings, token values. Bounded; may be deleted at any time."""
        return self.root / "derived.duckdb"

    @property
    def databases(self) -> tuple[Path, ...]:
        """All databases."""
        return self.audit, self.workspace, self.derived

    @property
    def turn(self) -> Path:
        """Held by the process whose turn it is to open the databases; empty."""
        return self.root / "turn.lock"

    @property
    def backups(self) -> Path:
        """Copies of the workspace: those asked for, and those made before it was changed as a whole."""
        return self.root / "backups"

    @property
    def lock(self) -> Path:
        """Held by the process that builds the audit."""
        return self.root / "build.lock"

    @property
    def progress(self) -> Path:
        """How far the build is; gone when it ends."""
        return self.root / "build.json"

    @property
    def locks(self) -> Path:
        """Where the locks of all that is made on demand lie; see `lock_of`."""
        return self.root / "locks"

    def lock_of(self, name: str) -> Path:
        """Held by the process that makes something on demand: ``index``, ``curvature-<key>``, ``ranking-<id>``."""
        return self.locks / f"{name}.lock"

    @property
    def sae(self) -> Path:
        """The sparse autoencoder, in SAELens' format."""
        return self.root / "sae"

    @property
    def sae_training(self) -> Path:
        """Checkpoint of an SAE training that is under way."""
        return self.root / "sae-training"

    @property
    def shards(self) -> ShardStore:
        """What stages have made."""
        return ShardStore(self.root / SHARDS, objects_of(self.root))
