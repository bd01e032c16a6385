"""What every stage on demand is given: an audit's files, its databases, its model, and who works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from concept_audit.concepts.sae import SaeSource
from concept_audit.errors import ModelError, StoreError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.model.load import LanguageModel, find_device
from concept_audit.model.options import ModelOptions, ModelSource
from concept_audit.pipeline.engine import Driver, Engine
from concept_audit.progress import Progress
from concept_audit.store.cursor import Cursor
from concept_audit.store.database import Database
from concept_audit.store.derived import BYTES
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest
from concept_audit.store.shard_store import RowShards
from concept_audit.types import Rollouts

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sources:
    """An audit, as far as computing on its rows needs it.

    Attributes:
        model: loads the model; called only if it is needed.
        engine: does the heavy work.
        device: where the model runs; ``auto`` for the fastest there is.
        trust_remote_code: run Python code that comes with the model. This process's consent, never the manifest's.
        derived_bytes: how large the file of what is computed on demand may grow.
    """

    layout: Layout
    database: Database
    manifest: Manifest
    model: Callable[[], LanguageModel]
    engine: Engine
    device: str = "auto"
    trust_remote_code: bool = False
    derived_bytes: int = BYTES

    def read(self, query: Callable[[Cursor], Found]) -> Found:
        """Run a query of the store."""
        with self.database.reading() as cursor:
            return query(cursor)

    def cache(self, save: Callable[[Cursor], None]) -> None:
        """Keep what spares time and nothing else; if it cannot be kept, so be it."""
        with suppress(StoreError), self.database.deriving(self.derived_bytes) as cursor:
            save(cursor)

    def driver(self, progress: Progress) -> Driver:
        """Runs stages on this audit's engine."""
        return Driver(self.engine, progress)

    def shards(self, kind: str) -> RowShards:
        """The shards of one kind that belong to the present build."""
        return self.manifest.shards(self.layout, kind)

    @property
    def data(self) -> str:
        """Fingerprint of the rows as tokens."""
        return self.manifest.key("tokens")

    @property
    def pairs(self) -> bool:
        """Whether the rows are preference pairs."""
        return self.manifest.pair is not None

    @property
    def beta(self) -> float:
        """Of the DPO loss, where the rows are preference pairs; else 0."""
        return float(self.manifest.configuration.get("beta") or 0.0)

    @property
    def identity(self) -> dict[str, str | float]:
        """What the gradients of the rows depend on: the model, the rows as tokens and, of pairs, beta."""
        found: dict[str, str | float] = {"model": self.manifest.fingerprints["model"], "data": self.data}
        if self.pairs:
            found["beta"] = self.beta
        return found

    @property
    def rollouts(self) -> Rollouts | None:
        """What says how much rows weigh, where they are rollouts."""
        return self.manifest.rollouts

    def weighs(self, options: InfluenceOptions) -> bool:
        """Whether rows weigh by their advantage: they are rollouts, and are not to count alike."""
        return self.rollouts is not None and not options.scoring.alike

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept."""
        return tuple(self.manifest.configuration["layers"])

    @property
    def model_source(self) -> ModelSource:
        """Where other processes get the model from."""
        return model_source(self.manifest, self.device, self.trust_remote_code)

    @property
    def sae_source(self) -> SaeSource:
        """Where the SAE of this audit is loaded from."""
        made = self.manifest.configuration
        source = str(self.layout.sae) if made["sae"] == "train" else made["sae"]
        return SaeSource(source, made["sae_layer"], bool(made.get("sae_centred")))


@dataclass(frozen=True)
class ChosenDevice:
    """Where an audit's model runs.

    Attributes:
        name: a device's name, or ``auto``.
        note: why it is not the one that the audit was built on, if that is not here; else empty.
    """

    name: str
    note: str = ""


def chosen_device(manifest: Manifest, asked: str | None) -> ChosenDevice:
    """The device that is asked for, else the one that the audit was built on, else the fastest there is."""
    built_on = manifest.configuration.get("device", "auto")
    if asked is not None or built_on == "auto":
        return ChosenDevice(asked or "auto")
    try:
        find_device(built_on)
    except ModelError:
        here = find_device("auto")
        note = f"Built on {built_on}, which is not here: the model runs on {here} (--device chooses)"
        return ChosenDevice("auto", note)
    return ChosenDevice(built_on)


def model_source(manifest: Manifest, device: str = "auto", trust_remote_code: bool = False) -> ModelSource:
    """Where the model of an audit is loaded from.

    An audit is a folder that may come from anybody: that whoever built it trusted the
    model's code is no consent of whoever opens it.

    Raises:
        ModelError: the audit was made with the model's own code, and this process may not run it.
    """
    made = manifest.configuration
    if made["trust_remote_code"] and not trust_remote_code:
        raise ModelError(
            f"{made['model']}: this audit was made with Python code that comes with the model. If you trust it, "
            "pass --trust-remote-code (from Python: Audit(…, trust_remote_code=True))"
        )
    options = ModelOptions(made["model"], device, made["dtype"], trust_remote_code)
    return ModelSource(options, Path(made["cache"]), manifest.fingerprints["model"])
