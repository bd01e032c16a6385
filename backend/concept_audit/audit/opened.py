"""An audit that is open: its files, its databases, its model."""

from __future__ import annotations

import getpass
import os
import threading
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from concept_audit.audit.memory import Memory
from concept_audit.errors import StoreError
from concept_audit.influence.options import InfluenceOptions
from concept_audit.model.load import LanguageModel, is_here, load_model
from concept_audit.model.template import tokenizer_fingerprint
from concept_audit.pipeline.engine import Engine, LocalEngine
from concept_audit.pipeline.sources import ChosenDevice, Sources, chosen_device, model_source
from concept_audit.progress import Progress
from concept_audit.store import queries
from concept_audit.store.database import database
from concept_audit.store.database_files import log_of
from concept_audit.store.derived import BYTES
from concept_audit.store.filters import RowFilter
from concept_audit.store.index import INDEX
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.under_way import reported

EVERY_ROW = RowFilter()
BYTES_VARIABLE = "CONCEPT_AUDIT_DERIVED_BYTES"
DEFAULTS = InfluenceOptions()


class OpenAudit:
    """What every part of `Audit` works on.

    Args:
        root: the audit's directory.
        progress: told about long work.
        read_only: refuse whatever people do, compute nothing and write nothing: what is there can be looked at,
            also where nothing may be written.
        device: where the model runs; ``auto`` for the fastest there is, None for where the audit was built.
        engine: does the heavy work; None for this process.
        trust_remote_code: run Python code that comes with the model.
        derived_bytes: how large the file of what is computed on demand may grow; None for what the environment
            says (`BYTES_VARIABLE`), or else 2 GiB.

    Attributes:
        layout: where its files are.
        database: its databases.

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
    ):
        self.layout = Layout(Path(root))
        self.progress = progress or Progress()
        self.read_only = read_only
        self._finished()
        self._derived_bytes = _bytes_from_environment() if derived_bytes is None else derived_bytes
        self.database = database(self.layout, read_only)
        self._device = device
        self._trust_remote_code = trust_remote_code
        self._engine = engine or LocalEngine(lambda _: self.model())
        self._lm: LanguageModel | None = None
        self._model_guard = threading.Lock()
        self._memory = Memory(self._files)
        self._memory_of_build = Memory(self._build_files)

    @property
    def root(self) -> Path:
        """The audit's directory."""
        return self.layout.root

    @property
    def name(self) -> str:
        """The name of that directory."""
        return self.layout.root.resolve().name

    @property
    def manifest(self) -> Manifest:
        """What the audit was made from."""
        return read_manifest(self.layout.manifest)

    @property
    def made(self) -> Manifest:
        """The manifest, remembered; not to be changed.

        Raises:
            StoreError: a build is at work on the audit, or was stopped midway: its store and its shards are not of
                one build until it is done.
        """
        return self._memory_of_build.get("manifest", self._finished)

    @property
    def build_id(self) -> str:
        """What identifies the present build, remembered."""
        return self.cached_read("build", queries.build_id, of_build=True)

    @property
    def device(self) -> ChosenDevice:
        """Where the model runs."""
        return self.remembered("device", lambda: chosen_device(self.made, self._device), of_build=True)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose mean response activations are kept; probes live at one of them."""
        return tuple(self.made.configuration["layers"])

    def overview(self) -> queries.Overview:
        """Counts of rows, tokens, duplicates, concepts and flags."""
        return self.cached_read("overview", queries.overview)

    def model(self) -> LanguageModel:
        """The model that the audit was made with, loaded when first asked for.

        Raises:
            ModelError: it cannot be loaded.
            StoreError: its weights are not those that the audit was made with, or nothing is to be computed.
        """
        if self.read_only:
            raise StoreError(f"{self.name}: opened read-only, so the model is not run; open it without --read-only")
        with self._model_guard:
            # A build may have made the audit anew, with another model.
            if self._lm is None or self._lm.fingerprint != self.made.fingerprints["model"]:
                self._lm = self._load_model()
            return self._lm

    @property
    def model_loaded(self) -> bool:
        """Whether something has asked for the model already, so that it takes no further memory."""
        return self._lm is not None

    @property
    def model_here(self) -> bool:
        """Whether loading the model downloads nothing."""
        source = model_source(self.made, self.device.name, self._trust_remote_code)
        return is_here(source.options.name, source.cache)

    def sources(self) -> Sources:
        """The audit, as far as the pipeline needs it."""
        return Sources(
            self.layout,
            self.database,
            self.made,
            self.model,
            self._engine,
            self.device.name,
            self._trust_remote_code,
            self._derived_bytes,
        )

    def searched(self, where: RowFilter) -> RowFilter:
        """The filter with its words looked up in the texts, once for all queries that it goes into."""
        words = where.words()
        if not words or where.found is not None:
            return where
        return replace(where, found=self.database.found(self.build_id, words, where.text_in))

    def read(self, query: Callable) -> Any:
        """What a query of the store finds now.

        Raises:
            StoreError: the audit is being built anew, or another process holds a file.
        """
        _ = self.made
        try:
            with self.database.reading() as cursor:
                return query(cursor)
        finally:
            for notice in self.database.notices():
                self.progress.say(notice)

    def cached_read(self, key: Hashable, query: Callable, of_build: bool = False) -> Any:
        """As `read`, but remembered until a file of the audit changes, whoever changes it.

        Args:
            key: tells this query, with its parameters, from every other; see `Memory`.
            of_build: people cannot change the result: it is remembered until the audit is built anew.
        """
        return self.remembered(key, lambda: self.read(query), of_build)

    def remembered(self, key: Hashable, compute: Callable[[], Any], of_build: bool = False) -> Any:
        """As `cached_read`, for what is not a query alone."""
        return (self._memory_of_build if of_build else self._memory).get(key, compute)

    def derive(self, save: Callable, keep: Collection[int] = ()) -> Any:
        """Keep what has been computed and can be computed again.

        Args:
            keep: rankings that are being shown, and stay.
        """
        _ = self.made
        try:
            with self.database.deriving(self._derived_bytes, keep) as cursor:
                return save(cursor)
        finally:
            self._memory.forget()

    def cache(self, save: Callable) -> None:
        """As `derive`, for what spares time and nothing else: if it cannot be kept, so be it."""
        with suppress(StoreError):
            self.derive(save)

    def forget(self) -> None:
        """Remember nothing that people or demands can change."""
        self._memory.forget()

    def write(self, save: Callable) -> Any:
        """Keep what has been computed and would take long to compute again: evidence."""
        _ = self.made
        try:
            with self.database.writing() as cursor:
                return save(cursor)
        finally:
            self._memory.forget()

    def change(self, change: Callable, keeps: frozenset[str] = frozenset(), ranked: bool = False) -> Any:
        """A change that a person makes.

        Args:
            keeps: the queries whose results it cannot change: these are remembered on.
            ranked: it looks at scores.

        Raises:
            StoreError: the audit was opened to be read only.
        """
        if self.read_only:
            raise StoreError(f"{self.name}: opened read-only, so nothing can be changed; start it without --read-only")
        _ = self.made
        kept: dict[Hashable, Any] = {}
        # Nobody else can write before the lease ends: what is remembered is of the state before or of that after.
        with self.database.writing(ranked, lambda: self._memory.restart(kept)) as cursor:
            kept = self._memory.valid(keeps) if keeps else {}
            return change(cursor)

    def _build_files(self) -> list[Path]:
        return [self.layout.manifest, self.layout.audit]

    def _files(self) -> list[Path]:
        databases = (self.layout.workspace, self.layout.derived)
        logs = map(log_of, databases)
        # A directory changes when an index is begun, and its description when one is finished.
        indexes = self.layout.shards.root / INDEX
        return [*self._build_files(), *databases, *logs, indexes, *sorted(indexes.glob("*/index.json"))]

    def _finished(self) -> Manifest:
        """The manifest of a build that is done.

        Raises:
            StoreError: it is not.
        """
        found = read_manifest(self.layout.manifest)
        if not found.complete:
            now = reported(self.layout.shards, self.layout.progress)
            far = f". {now['stage']}: {now['state']}" if now else ""
            raise StoreError(
                f"{self.root}: this audit is not finished: a build is at work on it, or was stopped midway{far}. Wait for it, "
                "or run the same `concept-audit build` again, it goes on where it was; labels, probes and flags are safe"
            )
        return found

    def _load_model(self) -> LanguageModel:
        manifest = self.manifest
        device = self.device
        if device.note:
            self.progress.say(device.note)
        source = model_source(manifest, device.name, self._trust_remote_code)
        lm = load_model(source.options, source.cache, self.progress)
        if lm.fingerprint != manifest.fingerprints["model"]:
            raise StoreError(
                f"{self.root}: made with a model of fingerprint {manifest.fingerprints['model']}, but "
                f"{lm.name} now has {lm.fingerprint}; put the earlier weights back, or build again with --rebuild"
            )
        recorded = manifest.fingerprints.get("tokenizer")
        if recorded and (now := tokenizer_fingerprint(lm.tokenizer)) != recorded:
            raise StoreError(
                f"{self.root}: made with a tokenizer and chat template of fingerprint {recorded}, but those of "
                f"{lm.name} now have {now}; put the earlier ones back, or build again with --rebuild"
            )
        return lm


def _bytes_from_environment() -> int:
    text = os.environ.get(BYTES_VARIABLE, "")
    if not text:
        return BYTES
    if not text.isdigit():
        raise StoreError(f"{BYTES_VARIABLE}={text}: give a number of bytes, such as {BYTES}")
    return int(text)


def user_name() -> str:
    """The account that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
