"""Stage: the gradient index, from which the influence of a new concept follows in seconds.

The curvature is fitted, the projection is learned on a sample of the rows, one pass
over the data projects the gradient of every row, and a sample of rows and concepts is
scored exactly to see how faithful the index is. Each step's files are complete or
absent, and a second run does only what is missing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import filelock
import numpy as np
import torch
from scipy.stats import spearmanr

from concept_audit.errors import ConceptError, StoreError
from concept_audit.influence import projection
from concept_audit.influence.fitting import Fisher, FisherKind, uniform
from concept_audit.influence.projection import LayerProjection, RandomConcepts, SecondMoments, Sides, TwoSided
from concept_audit.influence.queries import Gradients, Lack, Rows, query_gradient
from concept_audit.influence.scoring import score_rows_for_many
from concept_audit.influence.targets import Projection
from concept_audit.model.batches import batches_by_length
from concept_audit.model.gradients import GradientPass, gradient_tokens_per_batch
from concept_audit.model.linear import LinearLayer, Weights, linear_layers, resolve_weights
from concept_audit.model.load import LanguageModel, native_bfloat16
from concept_audit.pipeline.attribution import as_rows, has_loss
from concept_audit.pipeline.curvature import CurvatureFit, curvature_of, fit_curvature
from concept_audit.progress import Progress, Stage
from concept_audit.store.index import IndexFiles, index_files, sweep
from concept_audit.store.influence import read_tensors, write_tensors
from concept_audit.store.layout import Layout
from concept_audit.store.shards import TokenizedExample, read_tokens

Precision = Literal["auto", "float32", "bfloat16"]
SIDE_ROWS = 48
FIDELITY_ROWS = 64
FIDELITY_CONCEPTS = 6
QUERY_ROWS = 8
"""Query examples of a concept that fidelity is measured with."""
MANY_SAMPLE_BYTES = 3 << 30
TOP_SHARE = 0.2
COST = {"curvature": 3.5, "sides": 2.5, "samples": 0.7, "rows": 1.0, "exact": 2.5}
"""What a token of each step takes, in gradient passes over a token: measured with SmolLM2 on a CPU."""


@dataclass(frozen=True)
class IndexOptions:
    """How an index is built.

    Attributes:
        numbers: kept of each row, a byte each.
        samples: concepts drawn to learn the projection from.
        fisher, curvature_tokens, damping, weights, seed: as in `InfluenceOptions`; the curvature is EK-FAC.
        precision: in which the model runs; ``auto`` is bfloat16 where the processor computes in it.
    """

    numbers: int = 32_768
    samples: int = 1024
    fisher: FisherKind = "sampled"
    curvature_tokens: int = 20_000
    damping: float = 10.0
    weights: Weights = "auto"
    precision: Precision = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """A query that is to be put to the index.

    Attributes:
        quantity: what of the query examples is differentiated.
        queries: the query examples as tokens.
        weights: of the query examples.
        reach: the deepest block that the quantity depends on.
    """

    quantity: Any
    queries: Rows
    weights: Sequence[float]
    reach: int


def build_index(
    layout: Layout,
    lm: LanguageModel,
    data: str,
    concept_layers: Sequence[int],
    options: IndexOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Build what is missing of the index.

    Args:
        data: fingerprint of the rows as tokens.
        concept_layers: where concepts may live; the index tracks the blocks up to the deepest.

    Returns:
        the finished description.

    Raises:
        ConceptError: an option makes no sense.
        ModelError: the model has no weights to track.
    """
    _check(options)
    files = index_files(layout)
    settled = _settled(lm, options)
    made_of = {
        "model": lm.fingerprint,
        "data": data,
        "layers": sorted(concept_layers),
        "blocks": [1, max(concept_layers)],
        **asdict(settled),
    }
    found = files.describe()
    if found is not None and {k: found.get(k) for k in made_of} != made_of:
        shutil.rmtree(files.root)
        found = None
    if found is not None and found.get("done"):
        return found
    if found is None:
        files.write_description({**made_of, "done": False})
    try:
        with filelock.FileLock(files.root / "index.lock", timeout=0), _reporting(files, progress) as told:
            return _Building(layout, files, lm, settled, made_of, told).run()
    except filelock.Timeout:
        raise StoreError(f"{layout.root}: another process is building its index; wait for it") from None


def open_index(layout: Layout, model: str, data: str, reach: int | None = None) -> dict[str, Any]:
    """The description of a finished index that fits the audit.

    Args:
        model, data: fingerprints that it has to have.
        reach: the deepest block that a query depends on; None for any.

    Raises:
        StoreError: there is none, or it is of another model or data set.
        ConceptError: the query reaches deeper than the index.
    """
    root = layout.root
    found = index_files(layout).describe()
    if found is None or not found.get("done"):
        raise StoreError(f"{root}: no gradient index yet; make one with `concept-audit index {root}`")
    for name, wanted in (("model", model), ("data", data)):
        if found[name] != wanted:
            raise StoreError(
                f"{root}: the gradient index is of another {name} (fingerprint {found[name]}, the audit has "
                f"{wanted}); build it again with `concept-audit index {root}`"
            )
    if reach is not None and reach > found["blocks"][1]:
        raise ConceptError(
            f"a concept at layer {reach} is deeper than the gradient index, which ends with block "
            f"{found['blocks'][1]}; extend it with `concept-audit index {root} --layers {reach}`, or rank with "
            "--exact"
        )
    return found


def index_scores(
    layout: Layout,
    lm: LanguageModel,
    about: Mapping[str, Any],
    targets: Sequence[Target],
    damping: float,
    progress: Progress,
) -> np.ndarray:
    """Influence of every row on several concepts, in one sweep of the index.

    Args:
        about: the index's description.

    Returns:
        float64 [rows, targets]; NaN where a row has no loss.

    Raises:
        ConceptError: a target has no gradient in the weights of the index.
    """
    files = index_files(layout)
    opened = _Opened(layout, files, lm, about, progress)
    columns = []
    with progress.stage(
        "Gradients of the concepts" if len(targets) > 1 else "Gradient of the concept on its queries",
        len(targets),
        "concepts",
    ) as stage:
        for target in targets:
            columns.append(opened.numbers(target, damping))
            stage.advance()
    longest = max(map(len, columns))
    queries = np.zeros((longest, len(columns)), np.float32)
    for place, column in enumerate(columns):
        queries[: len(column), place] = column
    spread = read_tensors(files.sides)["spread"].numpy()
    queries *= spread[:longest, None]
    with progress.stage("Reading the index", len(files.shard_numbers()), "shards") as stage:
        blocks = []
        for block in sweep(files, queries, longest):
            blocks.append(block)
            stage.advance()
    return np.concatenate(blocks)


def solved_query(
    layout: Layout, lm: LanguageModel, about: Mapping[str, Any], target: Target, damping: float, progress: Progress
) -> Gradients:
    """(H + λI)⁻¹ of a target's gradient, whole, with the curvature of the index."""
    opened = _Opened(layout, index_files(layout), lm, about, progress)
    with progress.stage("Applying the curvature to the whole query"):
        return opened.solved(target, damping)


def warm_index(layout: Layout, lm: LanguageModel, about: Mapping[str, Any]) -> None:
    """Make the copy of the model that queries are differentiated on, and put one small query to it."""
    opened = _Opened(layout, index_files(layout), lm, about, Progress())
    ids = np.arange(1, 17)
    quantity = Lack(Projection(about["blocks"][1], np.ones(lm.d_model, np.float32)))
    target = Target(quantity, Rows([ids], [ids > 4]), [1.0], about["blocks"][1])
    opened.numbers(target, about["damping"])


class _Opened:
    """A finished projection, to put queries to."""

    def __init__(
        self, layout: Layout, files: IndexFiles, lm: LanguageModel, about: Mapping[str, Any], progress: Progress
    ):
        self._files, self._about = files, about
        self._lm = lm.in_dtype(getattr(torch, about["precision"]))
        self._layers = linear_layers(self._lm, *about["blocks"], about["weights"])
        fit = CurvatureFit(
            Fisher(about["fisher"], about["seed"]), about["curvature_tokens"], about["weights"], about["precision"]
        )
        blocks = range(about["blocks"][0], about["blocks"][1] + 1)
        curvature = fit_curvature(layout, lm, fit, about["data"], blocks, progress)
        self._curvatures = curvature_of(curvature, self._layers, "ekfac", lm.device)

    def gradients(self, target: Target) -> tuple[list[LinearLayer], Gradients]:
        """The layers that a target reaches, and its gradient in each."""
        layers = [layer for layer in self._layers if layer.block <= target.reach]
        # Queries are few: large batches are faster, and what they take is soon given back.
        budget = 4 * gradient_tokens_per_batch(self._lm.device)
        return layers, query_gradient(self._lm, layers, target.quantity, target.queries, target.weights, budget)

    def numbers(self, target: Target, damping: float) -> np.ndarray:
        """A target as the index takes it: float32 [numbers of the blocks that it reaches]."""
        _, gradients = self.gradients(target)
        if not any(bool(gradient.any()) for gradient in gradients):
            raise ConceptError(
                "the concept has no gradient on its query examples (an SAE feature's activation has none where it "
                "does not fire); choose other queries, or --target direction"
            )
        read = _projection_reader(self._files, self._layers, self._lm.device)
        found = projection.compress_query(gradients, self._curvatures, read, damping, self._lm.dtype)
        return found.cpu().numpy()

    def solved(self, target: Target, damping: float) -> Gradients:
        """(H + λI)⁻¹ of a target's gradient, whole."""
        _, gradients = self.gradients(target)
        return [self._curvatures(i).solve(gradient, damping) for i, gradient in enumerate(gradients)]


class _Building:
    """One run through the steps."""

    def __init__(
        self,
        layout: Layout,
        files: IndexFiles,
        lm: LanguageModel,
        options: IndexOptions,
        made_of: Mapping[str, Any],
        progress: Progress,
    ):
        self._layout, self._files, self._options, self._made_of = layout, files, options, made_of
        self._whole, self._progress = lm, progress
        self._lm = lm.in_dtype(getattr(torch, options.precision))
        self._blocks = range(1, made_of["blocks"][1] + 1)
        self._layers = linear_layers(self._lm, 1, self._blocks[-1], options.weights)

    def run(self) -> dict[str, Any]:
        """Do what is missing."""
        numbers = self._layout.shard_numbers("examples")
        lengths = [len(row.input_ids) for number in numbers for row in read_tokens(self._layout, number)]
        rows = len(lengths)
        self._progress.say(
            f"Gradient index: {rows:,} rows × {self._options.numbers / 1024:.3g} KiB = "
            f"{rows * self._options.numbers / 2**20:,.0f} MiB, and about "
            f"{self._projection_bytes() / 2**20:,.0f} MiB that do not grow with the rows; about "
            f"{self._minutes(lengths):,.0f} minutes from the start"
        )
        fit = CurvatureFit(
            Fisher(self._options.fisher, self._options.seed),
            self._options.curvature_tokens,
            self._options.weights,
            self._options.precision,
        )
        files = fit_curvature(self._layout, self._whole, fit, self._made_of["data"], self._blocks, self._progress)
        self._curvatures = curvature_of(files, self._layers, "ekfac", self._lm.device)
        self._learn()
        self._rows(numbers, rows)
        fidelity = self._fidelity()
        finished = {
            **self._made_of,
            "done": True,
            "rows": rows,
            "fidelity": fidelity,
            "kept": read_tensors(self._files.sides)["ends"].tolist(),
        }
        self._files.write_description(finished)
        return finished

    def _minutes(self, lengths: Sequence[int]) -> float:
        """What building takes, from the pace of a gradient pass over one row and the counts of each step."""
        row = as_rows(self._sample(1, "pace"))
        if not len(row):
            return 0.0
        batch = row.batch([0], self._lm.device)
        with GradientPass(self._lm, self._layers) as run:
            for _ in range(2):  # the first one also prepares kernels
                started = time.monotonic()
                run.losses(batch, lambda index, a, delta: None)
        pace = (time.monotonic() - started) / batch.ids.shape[1]
        mean, total = float(np.mean(lengths)), sum(lengths)
        sampled = SIDE_ROWS * COST["sides"] + self._options.samples * COST["samples"]
        sampled += SIDE_ROWS * COST["rows"] + FIDELITY_ROWS * COST["exact"]
        fitted = min(self._options.curvature_tokens, total) * COST["curvature"]
        return pace * (fitted + sampled * mean + total * COST["rows"]) / 60

    def _projection_bytes(self) -> int:
        """The projection, with equal shares for all layers, and the curvature factors."""
        share = self._options.numbers / len(self._layers)
        size = 0.0
        for layer in self._layers:
            between = min(layer.d_out, projection.LEFT) * min(layer.d_in, projection.RIGHT)
            size += 2 * between * min(share, self._options.samples)
            size += 4 * (layer.d_out**2 + layer.d_in * layer.d_out)
            size += 4 * layer.d_in**2 * (self._layers[layer.source] is layer)
        return int(size)

    def _sample(self, count: int, salt: str) -> list[TokenizedExample]:
        """Rows drawn by their content: the same in any order of the data."""
        drawn: list[tuple[float, TokenizedExample]] = []
        for number in self._layout.shard_numbers("examples"):
            for row in read_tokens(self._layout, number):
                if has_loss(row):
                    drawn.append((float(uniform(row.content_hash + salt, self._options.seed, 1)[0]), row))
            drawn.sort(key=lambda pair: pair[0])
            del drawn[count:]
        return [row for _, row in drawn]

    def _concepts(self, rows: Rows, salt: int) -> Iterator[tuple[list[int], Any]]:
        """Batches of rows, each with random concepts at one of the layers, or with their loss (one in eight)."""
        generator = torch.Generator().manual_seed(self._options.seed * 1000 + salt)
        kinds: list[int | None] = []
        layers = self._made_of["layers"]
        for i in range(len(rows)):
            kinds.append(None if i % 8 == 7 else layers[(i - i // 8) % len(layers)])
        budget = gradient_tokens_per_batch(self._lm.device)
        for kind in dict.fromkeys(kinds):
            mine = [i for i, k in enumerate(kinds) if k == kind]
            for places in batches_by_length([rows.spans[i] for i in mine], budget):
                chosen = [mine[place] for place in places]
                directions = torch.randn(len(chosen), self._lm.d_model, generator=generator)
                unit = torch.nn.functional.normalize(directions, dim=1).to(self._lm.device)
                yield chosen, None if kind is None else RandomConcepts(kind, unit)

    def _gradients(
        self, rows: Rows, collector: Any, salt: int, name: str, began: Callable[[list[int]], None] = lambda chosen: None
    ) -> None:
        """Show a collector the gradients of random concepts on rows."""
        with self._progress.stage(name, len(rows), "rows") as stage, GradientPass(self._lm, self._layers) as run:
            for chosen, concept in self._concepts(rows, salt):
                batch = rows.batch(chosen, self._lm.device)
                began(chosen)
                if concept is None:
                    run.losses(batch, collector.visitor(batch))
                else:
                    run.values(batch, concept, collector.visitor(batch))
                stage.advance(len(chosen))

    def _learn(self) -> None:
        if not self._files.sides.exists() or not all(self._files.projection(b).exists() for b in self._blocks):
            rows = as_rows(self._sample(SIDE_ROWS, "sides"))
            moments = SecondMoments(self._layers, self._curvatures, self._options.damping, self._lm)
            self._gradients(rows, moments, 1, "Two-sided bases")
            with self._progress.stage("Eigenvectors of the bases", len(self._layers), "layers") as stage:
                sides = []
                for i in range(len(self._layers)):
                    sides.append(moments.sides(i))
                    stage.advance()
            del moments
            self._components(sides)

    def _components(self, sides: Sequence[Sides]) -> None:
        """Principal components of random concepts between the two sides; shares of the layers; the files."""
        options = self._options
        widths = [s.left.shape[1] * s.right.shape[1] for s in sides]
        ends = np.cumsum([0, *widths])
        most = max(32, MANY_SAMPLE_BYTES // (2 * int(ends[-1])))
        rows = self._sample(min(options.samples, most), "samples")
        rows = (rows * -(-options.samples // max(len(rows), 1)))[: min(options.samples, most)]
        curvatures = self._curvatures
        maps = [
            tuple(m.to(self._lm.dtype) for m in projection.sample_maps(curvatures(i), s, options.damping))
            for i, s in enumerate(sides)
        ]
        samples = torch.zeros(len(rows), int(ends[-1]), dtype=torch.bfloat16)
        squares = torch.zeros(int(ends[-1]))
        place: list[int] = []

        def put(index: int, values: torch.Tensor) -> None:
            # Concept gradients are small: scaled by the width, so that bfloat16 and the sums are far from underflow.
            samples[place, ends[index] : ends[index + 1]] = (values.float() * 1e3).cpu().bfloat16()

        def began(chosen: list[int]) -> None:
            place[:] = chosen

        self._gradients(as_rows(rows), TwoSided(maps, put), 2, "Concepts drawn to learn the projection", began)
        own = [tuple(m.to(self._lm.dtype) for m in projection.row_maps(curvatures(i), s)) for i, s in enumerate(sides)]
        counted = 0

        def put_row(index: int, values: torch.Tensor) -> None:
            squares[ends[index] : ends[index + 1]] += values.float().square().sum(0).cpu()

        some = as_rows(rows[:SIDE_ROWS])
        collect = TwoSided(own, put_row)
        budget = gradient_tokens_per_batch(self._lm.device)
        name = "Gradients of rows between the bases"
        with self._progress.stage(name, len(some), "rows") as stage, GradientPass(self._lm, self._layers) as run:
            for chosen in batches_by_length(some.spans, budget):
                batch = some.batch(chosen, self._lm.device)
                run.losses(batch, collect.visitor(batch))
                counted += len(chosen)
                stage.advance(len(chosen))
        lengths = torch.zeros(len(rows))
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            lengths += samples[:, a:b].float().square().sum(1)
        lengths = lengths.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        with self._progress.stage("Principal components", len(self._layers), "layers") as stage:
            importance, spreads = [], []
            for a, b in zip(ends[:-1], ends[1:], strict=True):
                components, moments = projection.principal_components(samples[:, a:b].float() / lengths[:, None])
                # E[x²] of a component, its coordinates taken for uncorrelated: rows are close to white.
                spread = (components.square() * (squares[a:b] / max(counted, 1))[:, None]).sum(0)
                importance.append(moments * spread)
                spreads.append(spread.sqrt())
                stage.advance()
        kept = projection.shares(importance, options.numbers)
        spread = torch.cat([s[:n] for s, n in zip(spreads, kept, strict=True)])
        weight = torch.cat([s[:n] for s, n in zip(importance, kept, strict=True)])
        for block in self._blocks:
            tensors: dict[str, torch.Tensor] = {}
            for i, layer in enumerate(self._layers):
                if layer.block == block:
                    # Found a second time: all of all layers would take as much memory as the samples.
                    mine = samples[:, ends[i] : ends[i + 1]].float() / lengths[:, None]
                    components, _ = projection.principal_components(mine)
                    tensors[f"{i}.components"] = components[:, : kept[i]].to(torch.bfloat16)
                    query = projection.query_maps(curvatures(i), sides[i])
                    for name, map_ in zip(("row_left", "row_right"), own[i], strict=True):
                        tensors[f"{i}.{name}"] = map_
                    for name, map_ in zip(("query_left", "query_right"), query, strict=True):
                        tensors[f"{i}.{name}"] = map_
            write_tensors(self._files.projection(block), tensors)
        # Last: where it is, the projection is complete.
        write_tensors(
            self._files.sides,
            {
                "spread": spread.clamp(min=float(spread.max()) * 1e-6),
                "importance": weight,
                "ends": torch.tensor(kept).cumsum(0),
            },
        )

    def _rows(self, numbers: Sequence[int], total: int) -> None:
        read = _projection_reader(self._files, self._layers, self._lm.device)
        projections: list[LayerProjection] = []
        spread = read_tensors(self._files.sides)["spread"].numpy()
        with self._progress.stage("Gradient of every row", total, "rows") as stage:
            for number in numbers:
                rows = read_tokens(self._layout, number)
                if self._files.shard(number).exists():
                    stage.skip(len(rows))
                    continue
                projections = projections or [self._narrow(read(i)) for i in range(len(self._layers))]
                values = np.zeros((len(rows), len(spread)), np.float32)
                norms = np.zeros(len(rows), np.float32)
                for batch in projection.compress_rows(
                    self._lm, self._layers, projections, as_rows(rows), say=self._progress.say
                ):
                    for row in batch:
                        values[row.index], norms[row.index] = row.numbers, row.norm
                    stage.advance(len(batch))
                codes, scales = projection.encode(values, spread)
                tensors = {"codes": codes, "scales": scales, "norms": norms}
                write_tensors(self._files.shard(number), {k: torch.from_numpy(v) for k, v in tensors.items()})

    def _narrow(self, one: LayerProjection) -> LayerProjection:
        return replace(one, components=one.components.to(self._lm.dtype))

    def _fidelity(self) -> dict[str, Any]:
        """How well the index agrees with exact scores: rows and concepts that the projection was not learned from."""
        rows = self._sample(FIDELITY_ROWS, "fidelity")
        about = {**self._made_of, "done": True}
        opened = _Opened(self._layout, self._files, self._whole, about, self._progress)
        generator = np.random.default_rng(self._options.seed + 77)
        targets, layers = [], self._made_of["layers"]
        for place in range(FIDELITY_CONCEPTS):
            queries = as_rows(self._sample(QUERY_ROWS, f"queries {place}"))
            v = generator.normal(size=self._lm.d_model).astype(np.float32)
            layer = layers[place % len(layers)]
            quantity = Lack(Projection(layer, v / np.linalg.norm(v)))
            targets.append(Target(quantity, queries, [1 / len(queries)] * len(queries), layer))
        exact: list[list[torch.Tensor]] = [[] for _ in self._layers]
        damping = self._options.damping
        with self._progress.stage("Concepts to check the index with", len(targets), "concepts") as stage:
            for target in targets:
                solved = opened.solved(target, damping)
                for i, layer in enumerate(self._layers):
                    whole = solved[i] if i < len(solved) else torch.zeros(layer.d_out, layer.d_in)
                    exact[i].append(whole.to(self._lm.device, self._lm.dtype))
                stage.advance()
        stacked = [torch.stack(same) for same in exact]
        del exact
        with self._progress.stage("Exact scores of a sample", len(rows), "rows") as stage:
            truth = score_rows_for_many(
                self._lm, self._layers, stacked, as_rows(rows), say=self._progress.say, advance=stage.advance
            )
        numbers = index_scores(self._layout, self._whole, about, targets, damping, Progress())
        guess = numbers[[row.example_id for row in rows]]
        there = np.isfinite(truth).all(1) & np.isfinite(guess).all(1)
        return {**agreement(guess[there], truth[there]), "damping": damping}


def agreement(guess: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Rank correlation and overlap of the top rows, over targets.

    Args:
        guess, truth: [rows, targets].

    Returns:
        ``spearman`` and ``overlap`` of the top fifth: median and least over the targets; and counts.
    """
    top = max(1, round(TOP_SHARE * len(truth)))
    correlations, overlaps = [], []
    for g, t in zip(guess.T, truth.T, strict=True):
        correlations.append(float(spearmanr(g, t).statistic) if len(t) > 2 else float("nan"))
        overlaps.append(len({*np.argsort(-g)[:top]} & {*np.argsort(-t)[:top]}) / top)
    return {
        "rows": len(truth),
        "concepts": truth.shape[1],
        "spearman": float(np.median(correlations)),
        "spearman_least": float(np.min(correlations)),
        "top": top,
        "overlap": float(np.median(overlaps)),
        "overlap_least": float(np.min(overlaps)),
    }


def _projection_reader(
    files: IndexFiles, layers: Sequence[LinearLayer], device: torch.device
) -> Callable[[int], LayerProjection]:
    """The projection of each layer by its index, read a block at a time."""

    @lru_cache(maxsize=1)
    def block(number: int) -> Mapping[str, torch.Tensor]:
        return read_tensors(files.projection(number), device)

    def read(index: int) -> LayerProjection:
        tensors = block(layers[index].block)
        names = ("row_left", "row_right", "query_left", "query_right", "components")
        return LayerProjection(*(tensors[f"{index}.{name}"] for name in names))

    return read


def _settled(lm: LanguageModel, options: IndexOptions) -> IndexOptions:
    values = asdict(options)
    values["weights"] = resolve_weights(lm, options.weights)
    if options.precision == "auto":
        own = str(lm.dtype).removeprefix("torch.")
        values["precision"] = "bfloat16" if own == "float32" and native_bfloat16(lm.device) else own
    return IndexOptions(**values)


def _check(options: IndexOptions) -> None:
    wrong = [
        f"--{name.replace('_', '-')} {value}: must be 1 or more"
        for name in ("numbers", "samples", "curvature_tokens")
        if (value := getattr(options, name)) < 1
    ]
    if options.damping < 0:
        wrong.append(f"--damping {options.damping}: must not be negative")
    if wrong:
        raise ConceptError("; ".join(wrong))


@contextmanager
def _reporting(files: IndexFiles, progress: Progress) -> Iterator[Progress]:
    """A progress that also tells other processes."""
    try:
        yield _Reporting(files, progress)
    finally:
        files.progress.unlink(missing_ok=True)


class _Reporting(Progress):
    SECONDS = 1.0

    def __init__(self, files: IndexFiles, inner: Progress):
        self._files, self._inner = files, inner

    def say(self, text: str) -> None:
        self._inner.say(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        with self._inner.stage(name, total, unit) as stage:
            files, told = self._files, [0.0]
            advance = stage.advance

            def advancing(units: int = 1, detail: str | None = None) -> None:
                advance(units, detail)
                if time.monotonic() - told[0] >= self.SECONDS:
                    told[0] = time.monotonic()
                    share = stage.done / stage.total if stage.total else 0.0
                    files.report(name, share, stage.seconds_left)

            files.report(name, 0.0, None)
            stage.advance = advancing  # type: ignore[method-assign]
            yield stage
