"""Stage: what training on rows would do to every concept on a set of prompts, group by group.

shards/forecast/<key>/000003.safetensors    what the rows of group 3 do, summed: of each prompt the change of the stream
                                            at every layer that is kept, and of every live SAE feature

A group's gradients are summed, preconditioned and put through the prompts by the same worker, and never kept: on disk
is what came out. A group is decided by the contents of its rows, so that the groups of a part are parts of groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from concept_audit.concepts.sae import SaeSource
from concept_audit.errors import ConceptError, ModelError
from concept_audit.influence.curvature import LayerCurvature
from concept_audit.influence.forecast import Encode, changes, gradient_sum
from concept_audit.influence.forecast_intervals import GROUPS, GroupForecasts
from concept_audit.influence.options import CurvatureOptions, InfluenceOptions, content
from concept_audit.influence.pairs import weighted_sequences
from concept_audit.influence.queries import Rows, precondition
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.coverage import check_outside
from concept_audit.model.linear import Layers, LinearLayer, linear_layers, resolve_weights
from concept_audit.model.load import LanguageModel, find_device
from concept_audit.model.options import ModelSource
from concept_audit.model.precision import resolve_precision
from concept_audit.pipeline.curvature import CurvatureFiles, CurvatureFit, curvature_of, fit_curvature
from concept_audit.pipeline.engine import Worker, missing_of
from concept_audit.pipeline.options import key
from concept_audit.pipeline.place import taking_turns
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.examples import TokenizedExample, has_loss, read_examples
from concept_audit.store.forecast import live_features
from concept_audit.store.partition import ListedPartition
from concept_audit.store.queries import content_hashes
from concept_audit.store.rollouts import advantages
from concept_audit.store.shard_store import RowShards, ShardSet, read_about, read_tensors
from concept_audit.types import Message

ROWS_AT_ONCE = 256
"""Rows whose tokens are in memory at one time."""
Prompts = Sequence[Sequence[Message]]
"""Conversations whose assistant turns are the text that is read."""


@dataclass(frozen=True)
class ForecastRequest:
    """A forecast that is asked for.

    Attributes:
        rows: example ids, int64, in the order of the data.
        prompts: conversations whose assistant turns are read.
        options: curvature, weights, precision, `partial`, `alike` and blocks are read; the rest is not.
    """

    rows: np.ndarray
    prompts: Prompts
    options: InfluenceOptions


@dataclass(frozen=True)
class ForecastFiles:
    """The files of a forecast.

    Attributes:
        shards: one a group.
        groups: the example ids of each group's rows; a group may have none.
        features: numbers of the SAE features that it tells of, int64.
    """

    shards: ShardSet
    groups: tuple[tuple[int, ...], ...]
    features: np.ndarray

    @property
    def done(self) -> bool:
        """Whether every group's is there."""
        return not self.shards.missing()

    @cached_property
    def rows(self) -> np.ndarray:
        """Of each group, the rows that are in it: float64 [groups]; those without a finite loss are not."""
        return np.array([read_about(self.shards.path(n))["counted"] for n in self.shards.numbers()], float)

    def of_features(self) -> GroupForecasts:
        """Changes of the activations of `features`."""
        return GroupForecasts(self._stacked("features"), self.rows)

    def along(self, layer: int, directions: np.ndarray) -> GroupForecasts:
        """Changes of the projections onto directions at a layer.

        Args:
            directions: float32 [directions, d_model].
        """
        return GroupForecasts(self._stacked(f"stream.{layer}") @ directions.T, self.rows)

    def _stacked(self, name: str) -> np.ndarray:
        return np.stack([read_tensors(self.shards.path(n))[name].numpy() for n in self.shards.numbers()])


Curvatures = Callable[[int], LayerCurvature]
"""Of each tracked layer, by its index."""
Opened = tuple[LanguageModel, list[LinearLayer], Curvatures | None, Encode | None, Worker]


@dataclass(frozen=True)
class Forecasting:
    """What each group of rows does to the prompts.

    Attributes:
        tokens: the rows as the model reads them.
        results: to be made, one shard a group.
        groups: the example ids of each group's rows.
        prompts: as tokens, with the masks of what is read.
        layers: whose streams are told.
        sae: whose features are told; None for none.
        features: their numbers.
        curvature: files of the factors; None for the identity.
        beta: of the DPO loss, where rows are preference pairs.
        advantages: of each group's rows, where they are rollouts; None where all weigh alike.
    """

    tokens: RowShards
    results: ShardSet
    groups: tuple[tuple[int, ...], ...]
    prompts: Rows
    layers: tuple[int, ...]
    sae: SaeSource | None
    features: np.ndarray
    model: ModelSource
    blocks: tuple[int, int]
    weights: Layers
    precision: str
    curvature: CurvatureFiles | None
    options: CurvatureOptions
    beta: float
    advantages: tuple[tuple[float, ...], ...] | None = None

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.results,)

    def open(self, worker: Worker) -> Opened:
        lm = worker.model(self.model).in_dtype(getattr(torch, self.precision))
        # Who asked for the forecast was asked whether weights may be left out.
        layers = linear_layers(lm, *self.blocks, self.weights, partial=True)
        encode: Encode | None = None
        if self.sae is not None:
            module, live = self.sae.load(lm.device).module, torch.from_numpy(self.features).to(lm.device)
            encode = lambda stream: module.encode(stream.to(module.W_dec))[:, live]  # noqa: E731
        curvatures = (
            None if self.curvature is None else curvature_of(self.curvature, layers, self.options.curvature, lm.device)
        )
        return lm, layers, curvatures, encode, worker

    def run(self, opened: Opened, number: int) -> None:
        lm, layers, curvatures, encode, worker = opened
        step, counted = self._step(lm, layers, curvatures, number, worker)
        found: dict[str, np.ndarray] = {
            f"stream.{layer}": np.zeros((len(self.prompts), lm.d_model), np.float32) for layer in self.layers
        }
        if encode is not None:
            found["features"] = np.zeros((len(self.prompts), len(self.features)), np.float32)
        if counted:
            encoded_at = None if self.sae is None else self.sae.layer
            for batch in changes(lm, layers, step, self.prompts, self.layers, encode, encoded_at):
                for each in batch:
                    for layer, change in each.streams.items():
                        found[f"stream.{layer}"][each.index] = change
                    if each.features is not None:
                        found["features"][each.index] = each.features
        if not all(np.isfinite(values).all() for values in found.values()):
            raise ModelError(
                f"{lm.name}: the model's numbers overflow in {self.precision} on the rows of group {number}; "
                "forecast with --precision float32"
            )
        tensors = {name: torch.from_numpy(values) for name, values in found.items()}
        self.results.write_tensors(number, tensors, {"counted": counted})

    def _step(
        self, lm: LanguageModel, layers: list[LinearLayer], curvatures: Curvatures | None, number: int, worker: Worker
    ) -> tuple[list[torch.Tensor], int]:
        """Δθ of the rows of a group, −(H + λI)⁻¹ of the sum of their gradients; and how many rows that are."""
        total: list[torch.Tensor] | None = None
        counted = 0
        ids = self.groups[number]
        weights = dict(zip(ids, self.advantages[number], strict=True)) if self.advantages is not None else {}
        for start in range(0, len(ids), ROWS_AT_ONCE):
            every = read_examples(self.tokens, ids[start : start + ROWS_AT_ONCE])
            rows = [row for row in every if has_loss(row)]
            summed, added = _summed(lm, layers, rows, self.beta, weights, worker)
            total = summed if total is None else [a.add_(b) for a, b in zip(total, summed, strict=True)]
            counted += len(added)
            worker.advance(len(every))
        if total is None or not counted:
            return [], 0
        if curvatures is not None:
            total = precondition(total, curvatures, self.options.damping)
        return [-matrix for matrix in total], counted


def forecast_files(sources: Sources, wanted: ForecastRequest) -> ForecastFiles:
    """Where a forecast is kept, or would be; the model is not loaded.

    Raises:
        ConceptError: there are no rows, or the audit keeps no layer to read.
    """
    if not len(wanted.rows):
        raise ConceptError("no row passes the filter, so there is nothing to forecast; widen it")
    live = sources.read(live_features)
    features = live["feature_id"].to_numpy(np.int64)
    options = wanted.options
    dtype = getattr(torch, sources.manifest.configuration["dtype"])
    precision = resolve_precision(options.scoring.precision, dtype, find_device(sources.device))
    made_of = {
        "model": sources.manifest.fingerprints["model"],
        "data": sources.data,
        "rows": hashlib.blake2b(wanted.rows.tobytes(), digest_size=16).hexdigest(),
        "n_rows": len(wanted.rows),
        "prompts": _digest(wanted.prompts),
        "n_prompts": len(wanted.prompts),
        "max_tokens": sources.manifest.configuration["max_tokens"],
        "layers": list(sources.layers),
        "features": sources.manifest.key("features") if len(features) else None,
        "groups": GROUPS,
        "weights": options.scoring.weights,
        "partial": options.scoring.partial,
        "blocks": options.scoring.blocks,
        "precision": precision,
        "beta": sources.beta,
        **({"store": sources.manifest.key("store")} if sources.weighs(options) else {}),
        **content(options.curvature),
    }
    groups = _groups(sources, wanted.rows)
    partition = ListedPartition(tuple(map(len, groups)))
    shards = ShardSet(sources.layout.shards, "forecast", key(made_of), partition)
    return ForecastFiles(shards, groups, features)


def compute_forecast(sources: Sources, wanted: ForecastRequest, progress: Progress) -> ForecastFiles:
    """Make what is missing of a forecast; another process that makes the same one is waited for.

    One pass forward and backward over the rows; and for each group that has any, one solve with the curvature and one
    forward pass with dual numbers over the prompts, which costs about three plain ones.

    Raises:
        ConceptError: there are no rows, or a prompt has no assistant turn within the tokens that the audit reads.
        ModelError: the model has no weights to attribute to, or its numbers overflow.
    """
    files = forecast_files(sources, wanted)
    if files.done:
        return files
    scoring, curvature = wanted.options.scoring, wanted.options.curvature
    lm = sources.model().differentiable()
    prompts = rendered_prompts(lm, wanted.prompts, sources.manifest.configuration["max_tokens"])
    made = sources.manifest.configuration
    sae = sources.sae_source if len(files.features) else None
    reach = max([*sources.layers, *([made["sae_layer"]] if sae is not None else [])])
    first, last = scoring.blocks or (1, reach)
    if not 1 <= first <= last <= reach:
        raise ConceptError(f"--blocks {first}-{last}: concepts depend on blocks 1 to {reach}; choose from these")
    weights = resolve_weights(lm, scoring.weights)
    linear_layers(lm, first, last, weights, scoring.partial)
    if weights == "lora" and not scoring.partial:
        check_outside(lm, False)
    dtype = getattr(torch, made["dtype"])
    precision = resolve_precision(scoring.precision, dtype, find_device(sources.device))
    lock, doing = f"forecast-{files.shards.key}", "makes the same forecast; it will serve here, too"
    with taking_turns(sources.layout, sources.manifest, lock, doing, progress.say):
        factors = None
        if curvature.curvature != "identity":
            fit = CurvatureFit.of(curvature, weights, precision)
            factors = fit_curvature(sources, lm, fit, range(first, last + 1), progress)
        work = Forecasting(
            sources.shards("tokens"),
            files.shards,
            files.groups,
            prompts,
            sources.layers,
            sae,
            files.features,
            sources.model_source,
            (first, last),
            weights,
            precision,
            factors,
            curvature,
            sources.beta,
            _advantages(sources, files.groups) if sources.weighs(wanted.options) else None,
        )
        if missing_of(work):
            sizes = {number: len(group) for number, group in enumerate(files.groups)}
            sources.driver(progress).finish(work, "Forecast, group by group", sizes)
    # What it remembers of its groups may be from before.
    return replace(files)


def _groups(sources: Sources, rows: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The rows of each group: a hash of its content says which a row is in, so copies are together."""
    chosen = set(rows.tolist())
    groups: list[list[int]] = [[] for _ in range(GROUPS)]

    def assign(cursor: Any) -> None:
        for content_hash, number in content_hashes(cursor):
            if number in chosen:
                drawn = hashlib.blake2b(f"forecast:{content_hash}".encode(), digest_size=4).digest()
                groups[int.from_bytes(drawn, "big") % GROUPS].append(number)

    sources.read(assign)
    return tuple(tuple(sorted(group)) for group in groups)


def _advantages(sources: Sources, groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """How much the rows of each group weigh, which are rollouts."""
    weights = sources.read(advantages)
    return tuple(tuple(weights[list(group)].tolist()) for group in groups)


def _summed(
    lm: LanguageModel,
    layers: list[LinearLayer],
    rows: Sequence[TokenizedExample],
    beta: float,
    advantages: Mapping[int, float],
    worker: Worker,
) -> tuple[list[torch.Tensor], set[int]]:
    parts = weighted_sequences(as_rows([*rows]), beta)
    # One of the two weighs: rollouts are no pairs.
    weights = [
        weight * advantages.get(rows[owner].example_id, 1.0)
        for weight, owner in zip(parts.weights.tolist(), parts.owner.tolist(), strict=True)
    ]
    return gradient_sum(lm, layers, parts.rows, weights, parts.owner.tolist(), say=worker.say)


def rendered_prompts(lm: LanguageModel, prompts: Prompts, max_tokens: int) -> Rows:
    renderer = ChatRenderer(lm.tokenizer, max_tokens)
    made = []
    for number, messages in enumerate(prompts, start=1):
        try:
            row = renderer.render(tuple(messages))
        except ModelError as error:
            raise ConceptError(f"prompt {number}: {error}") from error
        if not row.response.any():
            raise ConceptError(
                f"prompt {number} has no assistant turn within the first {max_tokens:,} tokens, so there is nothing "
                "to read; give it one, or shorten what stands before"
            )
        made.append(row)
    return Rows([row.input_ids for row in made], [row.response for row in made])


def _digest(prompts: Prompts) -> str:
    return key([[asdict(message) for message in messages] for messages in prompts])
