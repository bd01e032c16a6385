"""The order of the stages: nothing else knows it.

Each stage has a key, the hash of what it depends on, and its shards are named by it. A
stage whose key has not changed does only what is missing of its shards; what is left
under other keys is cleared away. So the same command goes on where a killed build was.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from concept_audit.concepts.sae import SaeSource, SparseAutoencoder, is_readable, load_sae
from concept_audit.concepts.sae_training import HELD_OUT, TokenFeed, remove_checkpoints, train_sae
from concept_audit.data.read import DataSet
from concept_audit.data.read import fingerprint as data_fingerprint
from concept_audit.errors import AuditError, ConceptError, StoreError
from concept_audit.files import as_store_error, digest, remove_leftovers, remove_leftovers_of
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.identity import public_name
from concept_audit.model.load import LanguageModel, default_layers, load_model
from concept_audit.model.load import fingerprint as model_fingerprint
from concept_audit.model.memory import free_on_machine
from concept_audit.model.options import ModelSource
from concept_audit.model.template import ChatTemplate, tokenizer_fingerprint
from concept_audit.model.unembed import logit_effects
from concept_audit.model.windows import Splitter
from concept_audit.pipeline.activations import FindingFeatures, RunningModel, TokenSample
from concept_audit.pipeline.engine import Driver, Engine, LocalEngine, missing_of
from concept_audit.pipeline.loaded_sae import loaded_sae
from concept_audit.pipeline.options import LONGEST_ROW, BuildOptions, key
from concept_audit.pipeline.place import building, idle, layout_at, refuse_foreign
from concept_audit.pipeline.preview import described, groups_in_words, show_rows, splits
from concept_audit.pipeline.read import Tokenizing, read_rows
from concept_audit.pipeline.reconciling import reconciled
from concept_audit.pipeline.reporting import reporting
from concept_audit.progress import Progress
from concept_audit.store.activations import read_means, token_blocks
from concept_audit.store.assemble import SaeDirections, assemble
from concept_audit.store.database_files import opens
from concept_audit.store.examples import token_counts
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import BESIDE, STAGE_OF, Manifest, beside
from concept_audit.store.published import publish, withdraw
from concept_audit.store.removal import own_files, remove_made
from concept_audit.store.schema import FORMAT as STORE_FORMAT
from concept_audit.store.shard_store import RowShards

ANSWERS = ("answers", "answer_activations")
"""Kinds that hang on a stage's key and are made on demand."""
STORE_SHARE = 0.2
"""Of the machine's free memory, what the database may take while it is written."""
ON_DEMAND = {
    # What is computed when it is asked for hangs on the rows as tokens; rankings on the store, too.
    "tokens": ("curvature", "forecast", "influence", "index"),
    "store": ("influence",),
}


def build(options: BuildOptions, progress: Progress | None = None, engine: Engine | None = None) -> Path:
    """Make an audit, or go on making it.

    Args:
        engine: does the heavy work; None for this process.

    Returns:
        the audit's directory.

    Raises:
        AuditError: the data, the model, the SAE or the place to write are not usable; a build
            that had not begun before leaves nothing behind.
    """
    progress = progress or Progress()
    # Cheap checks first: a wrong path should not cost a model download.
    data = described(options, progress)
    layout = layout_at(options.out, options.cache, progress)
    refuse_foreign(layout)
    lm = load_model(options.model, options.cache, progress)
    lm.check_layers((*(options.layers or ()), *((options.sae_layer,) if options.sae_layer else ())))
    lm.check_length(options.max_tokens)
    show_rows(data, options, lm.tokenizer, progress, min(lm.context, LONGEST_ROW))
    sae = loaded_sae(options, lm, progress)
    before = frozenset(own_files(layout)) if layout.root.exists() else None
    with building(layout), reporting(layout.shards, layout.progress, progress) as told:
        driver = Driver(engine or LocalEngine(lambda _: lm), told)
        _run(_Build(layout, options, lm, sae, driver), data, layout, before)
    return layout.root


def _run(made: _Build, data: DataSet, layout: Layout, before: frozenset[Path] | None) -> None:
    """Run the stages; what a new audit has written goes if it comes to nothing, and nothing else.

    Args:
        before: the audit's files that were there already; None if not even its directory was.
    """
    fresh = not layout.manifest.exists()
    try:
        made.run(data)
    except AuditError as error:
        if fresh and not (layout.shards.root / "activations").exists():
            # Where storage failed, what it has may be gone on with.
            if not isinstance(error, StoreError):
                withdraw(layout)
            remove_made(layout, before)
        raise
    except Exception as error:
        # Asked before the leftovers go, since these may be what fills the disk.
        refused = as_store_error(layout.root, error)
        _remove_leftovers(layout)
        if refused is None:
            raise
        raise refused from error


def _remove_leftovers(layout: Layout) -> None:
    """Delete what killed builds had not finished writing: theirs alone, since other commands may be writing now."""
    for path in (layout.manifest, layout.manifest_copy, layout.progress, layout.audit, layout.sae):
        remove_leftovers_of(path)
    remove_leftovers(layout.sae_training)
    for kind in STAGE_OF:
        if kind not in ANSWERS:
            remove_leftovers(layout.shards.path(kind, "", ""))


class _Build:
    """One run through the stages."""

    def __init__(
        self, layout: Layout, options: BuildOptions, lm: LanguageModel, sae: SparseAutoencoder | None, driver: Driver
    ):
        self._layout, self._options, self._lm, self._sae, self._driver = layout, options, lm, sae, driver
        # In the precision that it has here: left open, another machine may choose another one.
        self._model = ModelSource(replace(options.model, dtype=lm.dtype_name), options.cache, lm.fingerprint)
        layers = set(options.layers or default_layers(lm.n_layers))
        ordered = sorted(layers)
        self._sae_layer = (sae and sae.layer) or options.sae_layer or ordered[(len(ordered) - 1) // 2]
        if options.sae != "none":
            layers.add(self._sae_layer)
        self._layers = tuple(sorted(layers))
        self._max_tokens = options.max_tokens or min(lm.context, LONGEST_ROW)

    def run(self, data: DataSet) -> None:
        """Do what is missing."""
        self._manifest = self._open_manifest(data)
        self._rows(data)
        self._tokens()
        counts = token_counts(self._shards("tokens"))
        sizes = {number: tokens for number, (tokens, _) in counts.items()}
        training = self._options.sae == "train"
        sample = self._sample(sum(content for _, content in counts.values())) if training else None
        self._activations(sample, sizes)
        if sample is not None:
            self._sae = self._train(sample)
        if self._sae is not None:
            self._features(self._sae)
        self._store()

    def _rows(self, data: DataSet) -> None:
        fingerprints, skipping = self._manifest.fingerprints, self._options.on_bad_row == "skip"
        # Nothing more where an earlier version knew of nothing more, so that its audits go on.
        further: list[Any] = [self._options.turns] if self._options.turns != "mask" else []
        further += data.layout.pair or ()
        further += ["skip", fingerprints["tokenizer"]] if skipping else []
        # What it is that rows hold, and without what they are left out.
        further += [data.rollouts.as_json()] if data.rollouts else []
        split = self._splitter(data)
        further += ["split", self._max_tokens, fingerprints["tokenizer"]] if split else []
        changed = self._begin("rows", fingerprints["data"], self._options.columns, self._options.split, *further)
        if not changed and not self._shards("rows").missing():
            return
        with self._driver.progress.stage("Reading rows") as stage:
            skipping_by = ChatRenderer(self._lm.tokenizer, self._max_tokens) if skipping else None
            left_out = read_rows(self._layout.shards, self._manifest.key("rows"), data, skipping_by, stage, split)
        self._end("rows", {"rows": stage.done, **({"skipped": left_out} if left_out else {})})

    def _splitter(self, data: DataSet) -> Splitter | None:
        """What splits the rows; None where they stay as they are."""
        if not splits(data, self._options):
            return None
        return Splitter(ChatRenderer(self._lm.tokenizer, self._max_tokens))

    def _tokens(self) -> None:
        reader = self._lm.fingerprint, self._manifest.fingerprints["tokenizer"]
        opened = self._begin("tokens", self._manifest.key("rows"), *reader, self._max_tokens)
        work = Tokenizing(self._shards("rows"), self._shards("tokens"), self._model, self._max_tokens)
        if opened or missing_of(work):
            self._driver.finish(work, "Tokenizing rows", self._shards("rows").partition.sizes())
            self._end("tokens", {})

    def _sample(self, content: int) -> TokenSample:
        least = 2 * self._options.sae_training.batch
        if content - content // HELD_OUT < least:
            raise ConceptError(
                f"--sae train: the data have {content:,} response tokens to train on, and an SAE takes "
                f"{least:,} at least; add rows, load an SAE, or pass --sae none and use probes"
            )
        wanted = content * self._lm.d_model * 4
        return TokenSample(self._sae_layer, min(1.0, self._options.sae_disk / max(wanted, 1)))

    def _activations(self, sample: TokenSample | None, sizes: dict[int, int]) -> None:
        opened = self._begin("activations", self._manifest.key("tokens"), self._layers, sample and asdict(sample))
        known = self._sae
        if known is not None:
            self._begin("features", self._manifest.key("tokens"), self._reading(known))
        # Once the SAE is trained its tokens may be deleted.
        kept = sample is not None and not self._trained()
        work = RunningModel(
            self._shards("tokens"),
            self._shards("activations"),
            self._model,
            self._layers,
            sample if kept else None,
            self._shards("token_activations") if kept else None,
            self._sae_source() if known else None,
            self._shards("features") if known else None,
        )
        if opened or missing_of(work):
            self._driver.finish(work, f"Running the model to layer {max(self._layers)}", sizes, "tokens")
            self._end(
                "activations",
                {"tokens": sum(sizes.values()), "layers": list(self._layers), "sae_disk": self._options.sae_disk},
            )

    def _trained(self) -> bool:
        """Whether the SAE of this configuration is there."""
        entry = self._manifest.stages.get("sae", {"key": None, "done": False})
        wanted = key(self._manifest.key("activations"), asdict(self._options.sae_training))
        return entry["done"] and entry["key"] == wanted and is_readable(self._layout.sae)

    def _train(self, sample: TokenSample) -> SparseAutoencoder:
        settings = self._options.sae_training
        if self._begin("sae", self._manifest.key("activations"), asdict(settings)) or not self._trained():
            blocks = token_blocks(self._shards("token_activations"))
            steps = settings.steps(sum(size - size // HELD_OUT for size, _ in blocks))
            with self._driver.progress.stage(f"Training an SAE on layer {sample.layer}", steps, "steps") as stage:
                quality = train_sae(
                    TokenFeed(blocks, settings.batch, settings.seed),
                    steps,
                    self._lm.d_model,
                    sample.layer,
                    settings,
                    self._lm.device,
                    self._layout.sae_training,
                    self._layout.sae,
                    stage,
                    {"model_name": public_name(self._lm), "model_fingerprint": self._lm.fingerprint},
                    self._driver.progress.say,
                )
                stage.detail = f"held-out explained variance {quality.explained_variance:.3f}, L0 {quality.l0:.1f}"
            files = {path.name: digest(path) for path in sorted(self._layout.sae.iterdir()) if path.is_file()}
            self._end("sae", {**asdict(quality), "files": files})
        return load_sae(str(self._layout.sae), self._lm.device)

    def _features(self, sae: SparseAutoencoder) -> None:
        opened = self._begin("features", self._manifest.key("tokens"), self._reading(sae))
        kept = self._shards("token_activations") if self._options.sae == "train" else None
        source = self._sae_source()
        work = FindingFeatures(self._shards("tokens"), self._shards("features"), self._model, source, kept)
        if opened or missing_of(work):
            self._driver.finish(work, "Finding the SAE features of every token", self._shards("rows").partition.sizes())
            self._end("features", {"features": sae.n_features, "trained_on": sae.module.cfg.metadata.model_name})

    def _store(self) -> None:
        features = self._manifest.key("features") if self._sae else None
        opened = self._begin("store", STORE_FORMAT, self._manifest.key("activations"), features)
        if not opened and opens(self._layout.audit):
            self._driver.progress.say(f"{self._layout.root}: built already; nothing left to do")
            return
        key = self._manifest.key("store")
        directions, memory = self._directions(), int(STORE_SHARE * free_on_machine())
        progress = self._driver.progress
        groups = assemble(self._layout, self._manifest, key, self._layers, directions, progress, memory)
        files = {self._layout.audit.name: digest(self._layout.audit)}
        report = {"files": files, "score_cells": self._options.score_cells}
        if groups is not None:
            progress.say(groups_in_words(groups))
        self._end("store", report if groups is None else {**report, "rollouts": groups})

    def _directions(self) -> SaeDirections | None:
        if self._sae is None:
            return None
        layer, means = self._sae_layer, self._shards("activations")
        directions = self._sae.directions()
        token_text = ChatRenderer(self._lm.tokenizer, self._max_tokens).decode_token
        named = "Tokens that the SAE features promote"
        with self._driver.progress.stage(named, len(directions), "features") as stage:
            promoted, suppressed = logit_effects(self._lm, directions, token_text, stage)
        return SaeDirections(
            layer=layer,
            directions=directions,
            fingerprint=model_fingerprint(self._sae.module),
            promoted=promoted,
            suppressed=suppressed,
            token_text=token_text,
            score=lambda v: vector_filter(read_means(means, layer), v),
            score_cells=self._options.score_cells,
        )

    def _open_manifest(self, data: DataSet) -> Manifest:
        options = self._options
        configuration = {
            "data": options.data,
            "model": options.model.name,
            "device": options.model.device,
            "dtype": self._lm.dtype_name,
            "adapter": type(self._lm.model).__name__ if hasattr(self._lm.model, "peft_config") else None,
            "trust_remote_code": options.model.trust_remote_code,
            "columns": asdict(options.columns),
            "split": options.split,
            "turns": options.turns if options.turns != "mask" else None,
            "on_bad_row": options.on_bad_row if options.on_bad_row != "stop" else None,
            "long_documents": options.long_documents if splits(data, options) else None,
            "document": data.layout.document if splits(data, options) else None,
            "pairs": list(data.layout.pair) if data.layout.pair else None,
            "beta": options.beta if data.layout.pair else None,
            "rewards": asdict(options.rewards) if options.rewards.asked else None,
            "rollouts": data.rollouts.as_json() if data.rollouts else None,
            "layers": list(self._layers),
            "max_tokens": self._max_tokens,
            "sae": options.sae,
            "sae_layer": self._sae_layer if options.sae != "none" else None,
            "sae_training": asdict(options.sae_training) if options.sae == "train" else None,
            # None where an earlier version wrote nothing, so that its audits go on.
            "sae_from_other_model": options.sae_from_other_model or None,
            "sae_centred": (self._sae is not None and self._sae.centred) or None,
            "cache": str(options.cache.resolve()),
            # Of this process and of every worker: sums are taken in an order that depends on it.
            "threads": torch.get_num_threads(),
        }
        if date := ChatTemplate(self._lm.tokenizer).date:
            configuration["template_date"] = date
        configuration[BESIDE] = beside(self._layout.root, configuration)
        fingerprints = {
            "data": data_fingerprint(options.data, options.split),
            "model": self._lm.fingerprint,
            "tokenizer": tokenizer_fingerprint(self._lm.tokenizer),
        }
        if self._sae is not None:
            fingerprints["sae"] = model_fingerprint(self._sae.module)
        manifest = Manifest(configuration, fingerprints)
        if self._layout.manifest.exists():
            manifest = reconciled(self._layout, manifest, self._options.rebuild)
        _remove_leftovers(self._layout)
        if manifest.stages and not manifest.complete:
            with idle(self._layout, "what it reads is to be made anew"):
                self._write(manifest)
        else:
            self._write(manifest)
        return manifest

    def _write(self, manifest: Manifest) -> None:
        manifest.write(self._layout)
        publish(self._layout, manifest)

    def _begin(self, stage: str, *depends: object) -> bool:
        """Whether a stage has work left; what is left of earlier configurations goes."""
        wanted = key(*depends)
        entry = self._manifest.stages.get(stage, {})
        changed = entry.get("key") != wanted
        if not changed and entry["done"]:
            return False
        if not changed:
            self._write_begun(stage, entry)
            return True
        with idle(self._layout, "what it reads is to be made anew"):
            self._write_begun(stage, {"key": wanted, "done": False, "report": {}})
            for kind in (kind for kind, of in STAGE_OF.items() if of == stage):
                self._layout.shards.remove_others(kind, wanted)
            for kind in ON_DEMAND.get(stage, ()):
                self._layout.shards.remove(kind)
            if stage == "sae":
                remove_checkpoints(self._layout.sae_training)
        return True

    def _write_begun(self, stage: str, entry: dict) -> None:
        # Until this stage is done the store speaks of shards that are not there any more.
        self._manifest.stages.get("store", {})["done"] = False
        self._manifest.stages[stage] = entry
        self._write(self._manifest)

    def _end(self, stage: str, report: dict) -> None:
        self._manifest.stages[stage].update(done=True, report=report)
        self._write(self._manifest)

    def _shards(self, kind: str) -> RowShards:
        return self._manifest.shards(self._layout, kind)

    def _sae_source(self) -> SaeSource:
        source = str(self._layout.sae) if self._options.sae == "train" else self._options.sae
        return SaeSource(source, self._sae_layer, self._sae is not None and self._sae.centred)

    def _reading(self, sae: SparseAutoencoder) -> str:
        """Tells apart what may fire: by the weights, and, where it was loaded, by where and how it reads."""
        weights = model_fingerprint(sae.module)
        return weights if self._options.sae == "train" else key(weights, self._sae_layer, sae.centred)
