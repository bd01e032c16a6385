"""An audit that is open: its files, its databases, its model."""

from __future__ import annotations

import getpass
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from concept_audit.errors import ConceptError, StoreError
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.attribution import InfluenceOptions
from concept_audit.pipeline.rank import Request, Sources, request
from concept_audit.progress import Progress
from concept_audit.store import queries, workspace
from concept_audit.store.database import database
from concept_audit.store.filters import RowFilter
from concept_audit.store.index import index_files
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.rankings import ranking_id
from concept_audit.types import Concept

EVERY_ROW = RowFilter()
DEFAULTS = InfluenceOptions()
MOST_REMEMBERED = 400
STAMP = "the state of the files that a memory is of"


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
                f"{root}: this audit is not finished; run the same `concept-audit build` again, it goes on where it was"
            )
        self._database = database(self._layout)
        self._lm: LanguageModel | None = None
        self._model_guard = threading.Lock()
        self._memory: dict[Hashable, Any] = {}
        self._build_memory: dict[Hashable, Any] = {}

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
    def _made(self) -> Manifest:
        """The manifest, remembered; not to be changed."""
        return self._remembered("manifest", lambda: read_manifest(self._layout.manifest), of_build=True)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept; probes live at one of them."""
        return tuple(self._made.configuration["layers"])

    def overview(self) -> queries.Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self._kept("overview", queries.overview)

    def metadata_fields(self) -> pd.DataFrame:
        """Metadata fields with their most frequent values: field, n_rows, n_values, top_values."""
        return self._kept_of_build("metadata_fields", queries.metadata_fields)

    def concepts(self, live_only: bool = False) -> pd.DataFrame:
        """Every concept: concept_id, name, kind, layer, label, version, details (JSON).

        Args:
            live_only: leave out SAE features that never fire on the data.
        """
        return self._kept(("concepts", live_only), lambda cursor: queries.concepts(cursor, live_only))

    def concept(self, name: str) -> Concept:
        """The concept with this name or id (``probe:flattery``, ``flattery``, ``sae:17``).

        Raises:
            ConceptError: there is none, or it is a probe of another model or of a layer not kept here.
        """
        concept = self._kept(("concept", name), lambda cursor: queries.concept(cursor, name))
        if concept.kind == "probe":
            self._check_probe(concept)
        return concept

    def probes(self) -> list[workspace.SavedProbe]:
        """Every trained probe with what its training reported."""
        return self._kept("probes", workspace.probes)

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
        return Sources(self._layout, self._database, self._made, self.model)

    def _request(self, concept: Concept, method: str, options: InfluenceOptions) -> tuple[int, Request]:
        wanted = request(self._sources(), concept, method, options)
        build = self._kept_of_build("build", queries.build_id)
        version, parameters = concept.version, wanted.parameters
        return ranking_id(build, concept.concept_id, version, method, parameters), wanted

    def _stored(self, ranking: int) -> bool:
        return self._read(lambda cursor: queries.ranking_stored(cursor, ranking))

    def _searched(self, where: RowFilter) -> RowFilter:
        """The filter with its words looked up in the texts, once for all queries that it goes into."""
        words = where.words()
        if not words or where.found is not None:
            return where
        return replace(where, found=self._database.found(self._kept_of_build("build", queries.build_id), words))

    def _tracked(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConceptError(
                f"--layer {layer}: this audit keeps layers {', '.join(map(str, self.layers))}; choose one of "
                "them, or build again with --layers"
            )
        return layer

    def _check_probe(self, concept: Concept) -> None:
        made_for = next(p for p in self.probes() if p.name == concept.name).model_fingerprint
        if made_for != self._made.fingerprints["model"] or concept.layer not in self.layers:
            raise ConceptError(
                f"probe {concept.name!r} was trained at layer {concept.layer} of the model {made_for}, and this "
                f"audit keeps layers {', '.join(map(str, self.layers))} of "
                f"{self.manifest.fingerprints['model']}; train it again, its labels are kept"
            )

    def _read(self, query: Callable):
        with self._database.reading() as cursor:
            return query(cursor)

    def _kept(self, key: Hashable, query: Callable):
        """As `_read`, but remembered until a file of the audit changes, whoever changes it.

        Args:
            key: tells this query, with its parameters, from every other.
        """
        return self._remembered(key, lambda: self._read(query))

    def _kept_of_build(self, key: Hashable, query: Callable):
        """As `_kept`, for what people cannot change: it is remembered until the audit is built anew."""
        return self._remembered(key, lambda: self._read(query), of_build=True)

    def _remembered(self, key: Hashable, compute: Callable[[], Any], of_build: bool = False):
        known = self._build_memory if of_build else self._memory
        stamp = self._stamp(of_build)
        if stamp != known.get(STAMP) or len(known) > MOST_REMEMBERED:
            known = {STAMP: stamp}
            if of_build:
                self._build_memory = known
            else:
                self._memory = known
        if key not in known:
            known[key] = compute()
        found = known[key]
        # The columns of a frame may be changed by who asked; what is remembered stays as it was.
        return found.copy(deep=False) if isinstance(found, pd.DataFrame) else found

    def _stamp(self, of_build: bool) -> tuple:
        """Changes whenever somebody writes to the audit."""
        workspace = self._layout.workspace
        paths = [self._layout.manifest, self._layout.audit]
        if not of_build:
            index = index_files(self._layout).description
            paths += [workspace, workspace.with_name(f"{workspace.name}.wal"), index]
        states: list[tuple[int, int, int] | None] = []
        for path in paths:
            try:
                state = path.stat()
                states.append((state.st_ino, state.st_mtime_ns, state.st_size))
            except FileNotFoundError:
                states.append(None)
        return tuple(states)

    def _write(self, change: Callable):
        try:
            with self._database.writing() as cursor:
                return change(cursor)
        finally:
            self._memory = {}

    def _change(self, change: Callable, keeps: frozenset[str] = frozenset()):
        """A change that a person makes.

        Args:
            keeps: the queries whose results it cannot change: these are remembered on.

        Raises:
            StoreError: the audit was opened to be read only.
        """
        if self.read_only:
            raise StoreError(f"{self.name}: opened read-only, so nothing can be changed; start it without --read-only")
        kept: dict[Hashable, Any] = {}
        with self._database.writing() as cursor:
            # Nobody else can write now: what is remembered is of the state before, or it is not kept.
            if self._memory.get(STAMP) == self._stamp(of_build=False):
                kept = {key: found for key, found in self._memory.items() if _name(key) in keeps}
            result = change(cursor)
        self._memory = {**kept, STAMP: self._stamp(of_build=False)} if kept else {}
        return result


def _name(key: Hashable) -> Hashable:
    """What a remembered result is of, without its parameters."""
    return key[0] if isinstance(key, tuple) else key


def user_name() -> str:
    """The account that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
