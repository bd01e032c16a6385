"""The order of the stages: nothing else knows it.

Each stage has a key, the hash of what it depends on. A stage whose key has not
changed keeps its shards and does only what is missing; one whose key has changed
loses them. So the same command goes on where a killed build was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import filelock

from concept_audit.concepts.sae import SparseAutoencoder, check_fits, load_sae
from concept_audit.concepts.sae_training import HELD_OUT, TokenFeed, train_sae
from concept_audit.data.read import fingerprint as data_fingerprint
from concept_audit.data.read import read_examples
from concept_audit.errors import AuditError, ConceptError, StoreError
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.load import LanguageModel, default_layers, load_model
from concept_audit.model.load import fingerprint as model_fingerprint
from concept_audit.model.unembed import logit_effects
from concept_audit.pipeline.activations import TokenSample, activation_stage, count_tokens, feature_stage
from concept_audit.pipeline.options import LONGEST_ROW, BuildOptions, key
from concept_audit.pipeline.read import read_stage
from concept_audit.progress import Progress
from concept_audit.store.assemble import SaeDirections, assemble
from concept_audit.store.layout import Layout, as_store_error
from concept_audit.store.manifest import Manifest, read_manifest
from concept_audit.store.schema import FORMAT as STORE_FORMAT
from concept_audit.store.shards import read_activations, token_blocks

SHARDS_OF = {
    # What is computed on demand hangs on the rows as tokens; answers on the layers kept, too.
    "read": ("examples", "curvature", "influence", "index"),
    "activations": ("activations", "tokens", "answers", "answer_activations"),
    "sae": (),
    "features": ("features",),
    "store": ("influence",),
}
HOLDER = "build.pid"
"""Names the process that holds the lock."""


def build(options: BuildOptions, progress: Progress | None = None) -> Path:
    """Make an audit, or go on making it.

    Returns:
        the audit's directory.

    Raises:
        AuditError: the data, the model, the SAE or the place to write are not usable; a build
            that had not begun before leaves nothing behind.
    """
    progress = progress or Progress()
    layout = Layout(options.out)
    # Cheap checks first: a wrong path should not cost a model download.
    examples = read_examples(options.data, columns=options.columns, split=options.split)
    _refuse_foreign(layout)
    lm = load_model(options.model, options.cache, progress)
    lm.check_layers((*(options.layers or ()), *((options.sae_layer,) if options.sae_layer else ())))
    sae = _known_sae(options, lm, progress)
    with _held(layout):
        _run(_Build(layout, options, lm, sae, progress), examples, layout)
    return layout.root


def _run(made: _Build, examples: Iterator, layout: Layout) -> None:
    """Run the stages; what a new audit has written goes if it comes to nothing."""
    fresh = not layout.manifest.exists()
    try:
        made.run(examples)
    except AuditError:
        if fresh and not layout.shard_numbers("activations"):
            shutil.rmtree(layout.root, ignore_errors=True)
        raise
    except Exception as error:
        # Asked before the leftovers go, since these may be what fills the disk.
        refused = as_store_error(layout.root, error)
        layout.remove_leftovers()
        if refused is None:
            raise
        raise refused from error


class _Build:
    """One run through the stages."""

    def __init__(
        self,
        layout: Layout,
        options: BuildOptions,
        lm: LanguageModel,
        sae: SparseAutoencoder | None,
        progress: Progress,
    ):
        self._layout, self._options, self._lm, self._sae, self._progress = layout, options, lm, sae, progress
        layers = set(options.layers or default_layers(lm.n_layers))
        ordered = sorted(layers)
        self._sae_layer = sae.layer if sae else options.sae_layer or ordered[(len(ordered) - 1) // 2]
        if options.sae != "none":
            layers.add(self._sae_layer)
        self._layers = tuple(sorted(layers))
        self._max_tokens = options.max_tokens or min(lm.context, LONGEST_ROW)

    def run(self, examples: Iterator) -> None:
        """Do what is missing."""
        self._manifest = self._open_manifest()
        self._read(examples)
        total, content = count_tokens(self._layout)
        training = self._options.sae == "train"
        sample = self._sample(content) if training else None
        self._activations(sample, total)
        if training:
            self._sae = self._train(sample)
        if self._sae is not None:
            self._features()
        self._store()

    def _read(self, examples: Iterator) -> None:
        opened = self._open(
            "read", self._manifest.fingerprints, self._options.columns, self._options.split, self._max_tokens
        )
        if not opened:
            return
        renderer = ChatRenderer(self._lm.tokenizer, self._max_tokens)
        with self._progress.stage("Reading and tokenizing rows") as stage:
            read_stage(self._layout, examples, renderer, stage)
        self._close("read", {"rows": stage.done})

    def _sample(self, content: int) -> TokenSample:
        least = 2 * self._options.sae_training.batch
        if content - content // HELD_OUT < least:
            raise ConceptError(
                f"--sae train: the data have {content:,} response tokens to train on, and an SAE takes "
                f"{least:,} at least; add rows, load an SAE, or pass --sae none and use probes"
            )
        wanted = content * self._lm.d_model * 4
        return TokenSample(self._sae_layer, min(1.0, self._options.sae_disk / max(wanted, 1)))

    def _activations(self, sample: TokenSample | None, total: int) -> None:
        opened = self._open("activations", self._key("read"), self._layers, asdict(sample) if sample else None)
        if not opened and not (sample and self._lacks_tokens()):
            return
        known = self._sae
        if known is not None:
            self._open("features", self._key("read"), self._sae_key())
        with self._progress.stage(f"Running the model to layer {max(self._layers)}", total, "tokens") as stage:
            activation_stage(self._layout, self._lm, self._layers, sample, known, stage)
        self._close("activations", {"tokens": total, "layers": list(self._layers)})

    def _lacks_tokens(self) -> bool:
        """Whether an SAE is still to be trained on token activations that have been deleted since."""
        entry = self._manifest.stages.get("sae", {"key": None, "done": False})
        trained = entry["done"] and entry["key"] == key(self._key("activations"), asdict(self._options.sae_training))
        return not trained and self._layout.shard_numbers("tokens") != self._layout.shard_numbers("examples")

    def _train(self, sample: TokenSample) -> SparseAutoencoder:
        settings = self._options.sae_training
        if self._open("sae", self._key("activations"), asdict(settings)):
            blocks = token_blocks(self._layout)
            n_tokens = sum(size - size // HELD_OUT for size, _ in blocks)
            steps = settings.steps(n_tokens)
            with self._progress.stage(f"Training an SAE on layer {sample.layer}", steps, "steps") as stage:
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
                )
                stage.detail = f"held-out explained variance {quality.explained_variance:.3f}, L0 {quality.l0:.1f}"
            self._close("sae", asdict(quality))
        return load_sae(str(self._layout.sae), self._lm.device)

    def _features(self) -> None:
        self._open("features", self._key("read"), self._sae_key())
        rows = self._manifest.report("read")["rows"]
        with self._progress.stage("Finding the SAE features of every token", rows, "rows") as stage:
            feature_stage(self._layout, self._lm, self._sae, stage)
        self._close("features", {"features": self._sae.n_features})

    def _store(self) -> None:
        features = self._key("features") if self._sae else None
        if not self._open("store", STORE_FORMAT, self._key("activations"), features) and self._layout.audit.exists():
            self._progress.say(f"{self._layout.root}: built already; nothing left to do")
            return
        assemble(self._layout, self._key("store"), self._layers, self._directions(), self._progress)
        self._close("store", {})

    def _directions(self) -> SaeDirections | None:
        if self._sae is None:
            return None
        layer = self._sae_layer
        directions = self._sae.directions()
        token_text = ChatRenderer(self._lm.tokenizer, self._max_tokens).decode_token
        with self._progress.stage("Tokens that the SAE features promote", len(directions), "features") as stage:
            promoted, suppressed = logit_effects(self._lm, directions, token_text, stage)
        return SaeDirections(
            layer=layer,
            directions=directions,
            fingerprint=self._sae_key(),
            promoted=promoted,
            suppressed=suppressed,
            token_text=token_text,
            score=lambda v: vector_filter(read_activations(self._layout, layer), v),
            score_cells=self._options.score_cells,
        )

    def _open_manifest(self) -> Manifest:
        options = self._options
        configuration = {
            "data": options.data,
            "model": options.model.name,
            "dtype": str(next(self._lm.model.parameters()).dtype).removeprefix("torch."),
            "adapter": type(self._lm.model).__name__ if hasattr(self._lm.model, "peft_config") else None,
            "trust_remote_code": options.model.trust_remote_code,
            "columns": asdict(options.columns),
            "split": options.split,
            "layers": list(self._layers),
            "max_tokens": self._max_tokens,
            "sae": options.sae,
            "sae_layer": self._sae_layer if options.sae != "none" else None,
            "sae_training": asdict(options.sae_training) if options.sae == "train" else None,
            "cache": str(options.cache.resolve()),
        }
        fingerprints = {"data": data_fingerprint(options.data, options.split), "model": self._lm.fingerprint}
        if self._sae is not None:
            fingerprints["sae"] = model_fingerprint(self._sae.module)
        manifest = Manifest(configuration, fingerprints)
        if self._layout.manifest.exists():
            manifest = self._reconcile(manifest)
        self._layout.root.mkdir(parents=True, exist_ok=True)
        self._layout.remove_leftovers()
        manifest.write(self._layout.manifest)
        return manifest

    def _reconcile(self, wanted: Manifest) -> Manifest:
        """Go on with the earlier build if it is the same; replace it only if told to."""
        if self._options.rebuild:
            try:
                wanted.stages = read_manifest(self._layout.manifest).stages
            except StoreError:
                shutil.rmtree(self._layout.root / "shards", ignore_errors=True)
            return wanted
        found = read_manifest(self._layout.manifest)
        before = {**found.configuration, **{f"{k} (content)": v for k, v in found.fingerprints.items()}}
        after = {**wanted.configuration, **{f"{k} (content)": v for k, v in wanted.fingerprints.items()}}
        # Names of data and model may change: what counts is their content.
        names = [name for name in {**before, **after} if name not in ("data", "model", "cache")]
        ours = [name for name in names if before.get(name) != after.get(name)]
        if ours:
            told = "; ".join(f"{n} was {_short(before.get(n))}, is now {_short(after.get(n))}" for n in ours)
            raise StoreError(
                f"{self._layout.root}: an audit made with other settings ({told}). Choose another --out, or "
                "pass --rebuild to replace what the build found; labels, probes and flags are kept"
            )
        return found

    def _open(self, stage: str, *depends: object) -> bool:
        """Whether a stage has work left; its shards go if what it depends on has changed."""
        wanted = key(*depends)
        entry = self._manifest.stages.get(stage)
        changed = entry is None or entry["key"] != wanted
        if not changed and entry["done"]:
            return False
        # Until this stage is done the store speaks of shards that are not there any more.
        self._manifest.stages.get("store", {})["done"] = False
        if changed:
            self._manifest.stages[stage] = {"key": wanted, "done": False, "report": {}}
        self._manifest.write(self._layout.manifest)
        if changed:
            for kind in SHARDS_OF[stage]:
                shutil.rmtree(self._layout.shards(kind), ignore_errors=True)
            if stage == "sae":
                shutil.rmtree(self._layout.sae_training, ignore_errors=True)
        return True

    def _close(self, stage: str, report: dict) -> None:
        self._manifest.stages[stage].update(done=True, report=report)
        self._manifest.write(self._layout.manifest)

    def _key(self, stage: str) -> str:
        return self._manifest.stages[stage]["key"]

    def _sae_key(self) -> str:
        return model_fingerprint(self._sae.module)


def _refuse_foreign(layout: Layout) -> None:
    """Raise StoreError for a directory that holds something else than an audit."""
    ours = layout.manifest.exists() or layout.lock.exists()
    if not ours and layout.root.exists() and any(layout.root.iterdir()):
        raise StoreError(
            f"{layout.root}: not empty and not an audit (no manifest.json); choose another --out, or empty it"
        )


def _known_sae(options: BuildOptions, lm: LanguageModel, progress: Progress) -> SparseAutoencoder | None:
    if options.sae in ("train", "none"):
        return None
    with progress.stage(f"Loading the SAE {options.sae}"):
        sae = load_sae(options.sae, lm.device)
    check_fits(sae, lm.name, lm.d_model, lm.n_layers)
    if sae.layer is None and options.sae_layer is None:
        raise ConceptError(f"--sae {options.sae}: its metadata do not say at which layer it reads; pass --sae-layer")
    return SparseAutoencoder(sae.module, options.sae_layer or sae.layer, sae.name)


def _check_place(layout: Layout) -> None:
    """Refuse a directory with other files. A build killed at its very start has left its lock, and no manifest."""
    root = layout.root
    if layout.manifest.exists() or not root.exists():
        return
    if not root.is_dir():
        raise StoreError(f"{root}: a file; choose another --out")
    ours = {layout.lock.name, HOLDER, f".{layout.manifest.name}.partial"}
    if any(path.name not in ours for path in root.iterdir()):
        raise StoreError(f"{root}: not empty and not an audit (no manifest.json); choose another --out, or empty it")


@contextmanager
def _held(layout: Layout) -> Iterator[None]:
    """Keep other builds of this audit out."""
    lock = filelock.FileLock(layout.lock)
    holder = layout.root / HOLDER
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = f" (PID {holder.read_text().strip()})" if holder.exists() else ""
        raise StoreError(
            f"{layout.root}: another process{who} is building this audit; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        refused = as_store_error(layout.root, error)
        if refused is None:
            raise
        raise refused from error
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
