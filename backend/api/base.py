"""An audit that is open: its files, its databases, its model."""

from __future__ import annotations

import getpass
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from backend.errors import ConceptError, StoreError
from backend.model.load import LanguageModel, ModelOptions, load_model
from backend.pipeline.attribution import InfluenceOptions
from backend.pipeline.rank import Request, Sources, request
from backend.progress import Progress
from backend.store import queries, workspace
from backend.store.database import database
from backend.store.filters import RowFilter
from backend.store.layout import Layout
from backend.store.manifest import Manifest, read_manifest
from backend.store.rankings import ranking_id
from backend.types import Concept

EVERY_ROW = RowFilter()
DEFAULTS = InfluenceOptions()


class OpenAudit:
    """What every part of `Audit` builds on.

    Args:
        root: the audit's directory.
        progress: told about long work.
        read_only: refuse whatever people do: labels, flags, names. Results are still computed and kept.

    Raises:
        StoreError: there is no finished audit there.
    """

    def __init__(self, root: str | Path, progress: Progress | None = None, read_only: bool = False):
        self._layout = Layout(Path(root))
        self._progress = progress or Progress()
        self.read_only = read_only
        if not self.manifest.complete:
            raise StoreError(
                f"{root}: this audit is not finished; run the same `concept-audit build` again, "
                "it goes on where it was"
            )
        self._database = database(self._layout)
        self._lm: LanguageModel | None = None
        self._model_guard = threading.Lock()

    @property
    def root(self) -> Path:
        return self._layout.root

    @property
    def name(self) -> str:
        return self._layout.root.resolve().name

    @property
    def manifest(self) -> Manifest:
        """What the audit was made from."""
        return read_manifest(self._layout.manifest)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept; probes live at one of them."""
        return tuple(self.manifest.configuration["layers"])

    def overview(self) -> queries.Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self._read(queries.overview)

    def metadata_fields(self) -> pd.DataFrame:
        """Metadata fields with their most frequent values: field, n_rows, n_values, top_values."""
        return self._read(queries.metadata_fields)

    def concepts(self, live_only: bool = False) -> pd.DataFrame:
        """Every concept: concept_id, name, kind, layer, label, version, details (JSON).

        Args:
            live_only: leave out SAE features that never fire on the data.
        """
        return self._read(lambda cursor: queries.concepts(cursor, live_only))

    def concept(self, name: str) -> Concept:
        """The concept with this name or id (``probe:flattery``, ``flattery``, ``sae:17``).

        Raises:
            ConceptError: there is none, or it is a probe of another model or of a layer not kept here.
        """
        concept = self._read(lambda cursor: queries.concept(cursor, name))
        if concept.kind == "probe":
            self._check_probe(concept)
        return concept

    def probes(self) -> list[workspace.SavedProbe]:
        """Every trained probe with what its training reported."""
        return self._read(workspace.probes)

    def model(self) -> LanguageModel:
        """The model that the audit was made with.

        Raises:
            ModelError: it cannot be loaded.
            StoreError: its weights are not those that the audit was made with.
        """
        with self._model_guard:
            if self._lm is None:
                self._lm = self._load_model()
            return self._lm

    def _load_model(self) -> LanguageModel:
        manifest = self.manifest
        made_with: Mapping[str, Any] = manifest.configuration
        options = ModelOptions(
            made_with["model"], dtype=made_with["dtype"], trust_remote_code=made_with["trust_remote_code"]
        )
        lm = load_model(options, Path(made_with["cache"]), self._progress)
        if lm.fingerprint != manifest.fingerprints["model"]:
            raise StoreError(
                f"{self.root}: made with a model of fingerprint {manifest.fingerprints['model']}, but "
                f"{lm.name} now has {lm.fingerprint}; put the earlier weights back, or build again with --rebuild"
            )
        return lm

    def _sources(self) -> Sources:
        return Sources(self._layout, self._database, self.manifest, self.model)

    def _request(self, concept: Concept, method: str, options: InfluenceOptions) -> tuple[int, Request]:
        wanted = request(self._sources(), concept, method, options)
        build = self._read(queries.build_id)
        version, parameters = concept.version, wanted.parameters
        return ranking_id(build, concept.concept_id, version, method, parameters), wanted

    def _stored(self, ranking: int) -> bool:
        return self._read(lambda cursor: queries.ranking_stored(cursor, ranking))

    def _tracked(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConceptError(
                f"--layer {layer}: this audit keeps layers {', '.join(map(str, self.layers))}; choose one of "
                "them, or build again with --layers"
            )
        return layer

    def _check_probe(self, concept: Concept) -> None:
        made_for = next(p for p in self.probes() if p.name == concept.name).model_fingerprint
        if made_for != self.manifest.fingerprints["model"] or concept.layer not in self.layers:
            raise ConceptError(
                f"probe {concept.name!r} was trained at layer {concept.layer} of the model {made_for}, and this "
                f"audit keeps layers {', '.join(map(str, self.layers))} of "
                f"{self.manifest.fingerprints['model']}; train it again, its labels are kept"
            )

    def _read(self, query: Callable):
        with self._database.reading() as cursor:
            return query(cursor)

    def _write(self, change: Callable):
        with self._database.writing() as cursor:
            return change(cursor)

    def _change(self, change: Callable):
        """A change that a person makes.

        Raises:
            StoreError: the audit was opened to be read only.
        """
        if self.read_only:
            raise StoreError(
                f"{self.name}: opened read-only, so nothing can be changed; start it without --read-only"
            )
        return self._write(change)


def user_name() -> str:
    """The account that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
