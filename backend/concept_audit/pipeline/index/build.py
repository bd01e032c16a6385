"""Stage: the gradient index, from which the influence of a new concept follows in seconds.

The curvature is fitted, the projection is learned on a sample of the rows, one pass
over the data projects the gradient of every row: from then on the index answers. Last,
rows that were held out of the learning are scored exactly to see how faithful it is.
Each step's files are complete or absent, and a second run does only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from concept_audit.errors import ConceptError, FinishedIndexError, StoreError
from concept_audit.files import remove_leftovers
from concept_audit.influence import projection
from concept_audit.influence.learning import KeptNumbers, Learner
from concept_audit.influence.options import IndexOptions, usual_agreement, usual_row_bytes
from concept_audit.influence.pairs import compress_with_pairs
from concept_audit.influence.projection import LayerProjection, Sides
from concept_audit.influence.wide import wide_form
from concept_audit.model.coverage import check_outside
from concept_audit.model.gradients import GradientPass
from concept_audit.model.linear import LinearLayer, linear_layers, resolve_weights
from concept_audit.model.load import LanguageModel
from concept_audit.model.options import ModelSource
from concept_audit.model.precision import resolve_precision
from concept_audit.pipeline.curvature import CurvatureFit, curvature_of, fit_curvature
from concept_audit.pipeline.engine import Worker
from concept_audit.pipeline.index.codes import CODING, Codes, kept_layers, tensors_of
from concept_audit.pipeline.index.drawing import asked_directions
from concept_audit.pipeline.index.fidelity import SCORED_ROWS, HeldOut, checked_features, hold_out, measure_fidelity
from concept_audit.pipeline.index.finished import NORMS
from concept_audit.pipeline.index.query import projection_reader
from concept_audit.pipeline.options import key
from concept_audit.pipeline.place import making
from concept_audit.pipeline.reporting import reporting
from concept_audit.pipeline.sampling import as_rows, as_sequences, drawn_rows, drawn_sides
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.examples import read_tokens
from concept_audit.store.index import INDEX, IndexFiles, index_files, present_indexes
from concept_audit.store.shard_store import RowShards, intact, read_tensors

SIDE_ROWS, OWN_ROWS = (48, 96), 96
"""Rows that the sides are learned from: an eighth of the samples, but no fewer and no more than these."""
COST = {"curvature": 3.5, "sides": 2.5, "samples": 0.7, "rows": 1.0, "exact": 5.0}
"""What a token of each step takes, in gradient passes over a token: measured with SmolLM2 on a CPU.

Exact scores are of float32, where the other steps are of bfloat16.
"""
LEARNING = "asked concepts, held out rows apart"
"""What the projection learns from; an index of a version that learned from all rows, or from directions drawn at random
alone, is another one."""


def build_index(
    sources: Sources,
    options: IndexOptions,
    progress: Progress,
    replace: bool = False,
    answering: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Build what is missing of the index.

    Args:
        replace: a finished index that was made with other options goes.
        answering: called as soon as the index answers, before its agreement with exact scores is measured; not
            where it was finished before.

    Returns:
        the finished description.

    Raises:
        ConceptError: an option makes no sense.
        ModelError: the model has no weights to track.
        StoreError: another process is building it.
        FinishedIndexError: there is a finished one with other options, and it is not to be replaced.
    """
    _check(options)
    lm, layers = sources.model(), sorted(options.layers or sources.layers)
    lm.check_layers(tuple(layers))
    weights = resolve_weights(lm, options.weights)
    tracked = linear_layers(lm, 1, layers[-1], weights, options.partial)
    if weights == "lora" and not options.partial:
        check_outside(lm, loss=False)
    row_bytes = options.row_bytes or usual_row_bytes(sources.shards("tokens").partition.rows)
    made_of = {
        **sources.identity,
        "layers": layers,
        "blocks": [1, layers[-1]],
        "row_bytes": row_bytes,
        "norms": NORMS,
        "coding": CODING,
        "agreement": usual_agreement(row_bytes) if options.agreement is None else options.agreement,
        "samples": options.samples,
        "learning": LEARNING,
        **{name: value for name, value in asdict(options.curvature).items() if name != "curvature"},
        "weights": weights,
        "precision": resolve_precision(options.precision, lm.dtype, lm.device),
        **({"partial": True} if options.partial else {}),
        **({"wide_sides": wide} if (wide := wide_form(tracked)) else {}),
    }
    files = index_files(sources.layout, key(made_of), sources.shards("tokens").partition)
    with making(sources.layout, sources.manifest, INDEX, INDEX):
        found = _described(files)
        same = found is not None and {k: found.get(k) for k in made_of} == made_of
        whole = same and bool(found and found.get("done")) and files.complete(range(1, layers[-1] + 1))
        if whole and found is not None and "fidelity" in found:
            return found
        if not replace:
            _refuse_to_replace(sources, files, made_of)
        files.rows.store.remove_others(INDEX, files.rows.key)
        remove_leftovers(files.root)
        if not whole:
            files.write_description({**made_of, "done": False})
        with reporting(files.rows.store, files.progress, progress) as reported:
            return _Building(sources, files, options, made_of, reported).run(answering)


def _described(files: IndexFiles) -> dict[str, Any] | None:
    """The description of an index; None if there is none that can be read."""
    try:
        return files.describe()
    except StoreError:
        return None


def _refuse_to_replace(sources: Sources, files: IndexFiles, made_of: Mapping[str, Any]) -> None:
    """Raise StoreError if there is a finished index with other options that answers for this audit."""
    for other in present_indexes(sources.layout, files.rows.partition):
        found = _described(other) if other != files else None
        if not found or not found.get("done") or any(found.get(n) != made_of[n] for n in sources.identity):
            continue
        changes = [f"{n} {found.get(n)}, asked for {made_of[n]}" for n in made_of if found.get(n) != made_of[n]]
        raise FinishedIndexError(
            f"{sources.layout.root}: has a finished gradient index with other options ({'; '.join(changes)}); pass "
            "--replace to delete it and build this one, or leave these options as they were"
        )


@dataclass(frozen=True)
class CompressingRows:
    """The gradient of every row, projected and coded in few bits a number.

    Attributes:
        tokens: the rows as the model reads them.
        index: whose rows are to be made; its projection is there.
        about: its description, with ``beta`` where rows are preference pairs.
    """

    tokens: RowShards
    index: IndexFiles
    model: ModelSource
    about: Mapping[str, Any]

    @property
    def outputs(self) -> tuple[RowShards, ...]:
        return (self.index.rows,)

    def open(
        self, worker: Worker
    ) -> tuple[LanguageModel, list[LinearLayer], Mapping[int, LayerProjection], Codes, Worker]:
        lm = worker.model(self.model).in_dtype(getattr(torch, self.about["precision"]))
        first, last = self.about["blocks"]
        layers = linear_layers(lm, first, last, self.about["weights"], partial=True)
        read = projection_reader(self.index, layers, lm.device)
        projections = {place: read(place) for place in kept_layers(self.index, len(layers))}
        return lm, layers, projections, Codes.read(self.index), worker

    def run(
        self, opened: tuple[LanguageModel, list[LinearLayer], Mapping[int, LayerProjection], Codes, Worker], number: int
    ) -> None:
        lm, layers, projections, codes, worker = opened
        rows = read_tokens(self.tokens, number)
        packed = np.zeros((len(rows), codes.packing.row_bytes), np.int8)
        scales = np.zeros(len(rows), np.float32)
        squares = np.zeros((len(rows), self.about["blocks"][1]), np.float32)
        compress = partial(projection.compress_rows, lm, layers, projections, say=worker.say)
        for unit in self.tokens.partition.units(number):
            for batch in compress_with_pairs(compress, as_rows(rows[unit]), self.about.get("beta", 0.0)):
                if not batch:  # first sides of pairs alone
                    continue
                places = [unit.start + row.index for row in batch]
                packed[places], scales[places] = codes.encode(np.stack([row.numbers for row in batch]))
                squares[places] = np.stack([row.squares for row in batch])
                worker.advance(len(batch))
        tensors = {"codes": packed, "scales": scales, "squares": squares}
        self.index.rows.write_tensors(number, {name: torch.from_numpy(array) for name, array in tensors.items()})


class _Building:
    """One run through the steps."""

    def __init__(
        self, sources: Sources, files: IndexFiles, options: IndexOptions, made_of: Mapping[str, Any], progress: Progress
    ):
        self._sources, self._files, self._options, self._made_of = sources, files, options, made_of
        self._tokens, self._progress = sources.shards("tokens"), progress
        self._lm = sources.model().in_dtype(getattr(torch, made_of["precision"]))
        self._blocks = range(1, made_of["blocks"][1] + 1)
        self._layers = linear_layers(self._lm, 1, self._blocks[-1], made_of["weights"], partial=True)

    def run(self, answering: Callable[[], None]) -> dict[str, Any]:
        """Do what is missing."""
        numbers, rows = self._tokens.numbers(), self._tokens.partition.rows
        read = (as_sequences(read_tokens(self._tokens, number)).ids for number in numbers)
        lengths = [len(ids) for part in read for ids in part]
        self._progress.say(
            f"Gradient index: {rows:,} rows × {self._made_of['row_bytes'] / 1024:.3g} KiB = "
            f"{rows * self._made_of['row_bytes'] / 2**20:,.0f} MiB, and about "
            f"{self._projection_bytes() / 2**20:,.0f} MiB that do not grow with the rows; about "
            f"{self._minutes(lengths):,.0f} minutes from the start"
        )
        made = self._made_of
        fit = CurvatureFit.of(self._options.curvature, made["weights"], made["precision"])
        curvature = fit_curvature(self._sources, self._sources.model(), fit, self._blocks, self._progress)
        self._curvatures = curvature_of(curvature, self._layers, "ekfac", self._lm.device)
        held = hold_out(self._tokens, made["seed"])
        self._learn(held)
        work = CompressingRows(self._tokens, self._files, self._sources.model_source, made)
        self._sources.driver(self._progress).finish(work, "Gradient of every row", self._tokens.partition.sizes())
        about = {**made, "done": True, "rows": rows, **self._kept(), "model_bytes": self._model_bytes()}
        # It answers from here on, also where the check is cut short: then the same command measures what is missing.
        self._files.write_description(about)
        answering()
        finished = {**about, "fidelity": measure_fidelity(self._sources, about, held, self._progress)}
        self._files.write_description(finished)
        return finished

    def _kept(self) -> dict[str, Any]:
        """Of which layers numbers are kept: where each one's end, and its block by its name."""
        chosen = [self._layers[place] for place in kept_layers(self._files, len(self._layers))]
        ends = read_tensors(self._files.sides)["ends"].tolist()
        return {"kept": ends, "chosen": {layer.name: layer.block for layer in chosen}, "tracked": len(self._layers)}

    def _model_bytes(self) -> int:
        """What the model takes where a concept is asked for, with its copy in the index's precision."""
        models = {self._sources.model().model, self._lm.model}
        return sum(parameter.nbytes for model in models for parameter in model.parameters())

    def _minutes(self, lengths: Sequence[int]) -> float:
        """What building takes, from the pace of a gradient pass over one row and the counts of each step.

        Args:
            lengths: tokens of each sequence; a preference pair has two.
        """
        row = as_sequences(drawn_rows(self._tokens, 1, "pace", self._made_of["seed"]))
        if not len(row):
            return 0.0
        batch = row.batch([0], self._lm)
        with GradientPass(self._lm, self._layers) as run:
            for _ in range(2):  # the first one also prepares kernels
                started = time.monotonic()
                run.losses(batch, lambda index, a, delta: None)
        pace = (time.monotonic() - started) / batch.ids.shape[1]
        mean, total = float(np.mean(lengths)), sum(lengths)
        sampled = _side_rows(self._options.samples) * COST["sides"] + self._options.samples * COST["samples"]
        # Concepts are drawn on single sequences; all else is of whole rows.
        a_row = len(lengths) / self._tokens.partition.rows
        sampled += (OWN_ROWS * COST["rows"] + SCORED_ROWS * COST["exact"]) * a_row
        fitted = min(self._made_of["curvature_tokens"], total) * COST["curvature"]
        return pace * (fitted + sampled * mean + total * COST["rows"]) / 60

    def _projection_bytes(self) -> int:
        """The projection and the curvature factors."""
        size = 0.0
        for layer in self._layers:
            sides = layer.d_out * min(layer.d_out, projection.LEFT) + layer.d_in * min(layer.d_in, projection.RIGHT)
            size += (4 + self._lm.dtype.itemsize) * sides
            size += 4 * (layer.d_out**2 + layer.d_in * layer.d_out)
            size += 4 * layer.d_in**2 * (self._layers[layer.source] is layer)
        return int(size)

    def _learn(self, held: HeldOut) -> None:
        """Learn the projection from a sample of the rows that are not held out, and keep it."""
        if all(intact(path) for path in (self._files.sides, *map(self._files.projection, self._blocks))):
            return
        # Rows that an earlier projection has coded are not read with this one.
        self._files.rows.store.delete([self._files.sides])
        self._files.remove_rows()
        seed, wanted = self._made_of["seed"], self._options.samples
        learner = Learner(
            self._lm,
            self._layers,
            self._curvatures,
            self._made_of["layers"],
            self._made_of["damping"],
            seed,
            self._progress,
            self._made_of.get("beta", 0.0),
        )
        apart = held.content_hashes
        besides = [feature for feature, _ in checked_features(self._sources, self._made_of, held)]
        draw = partial(asked_directions, self._sources, layers=self._made_of["layers"], seed=seed, besides=besides)
        rows = drawn_rows(self._tokens, _side_rows(wanted), "sides", seed, apart)
        # Concepts are asked for on single conversations, also of an audit of preference pairs.
        sides = learner.sides(drawn_sides(rows, seed), draw(rows))
        rows = drawn_rows(self._tokens, wanted, "samples", seed, apart)
        own = as_rows(rows[:OWN_ROWS])
        origins = [place if place < OWN_ROWS else -1 for place in range(len(rows))]
        rows, origins = (_repeated(each, wanted) for each in (rows, origins))
        asked = drawn_sides(rows, seed)
        row_bytes, agreement = self._made_of["row_bytes"], self._made_of["agreement"]
        self._keep(sides, learner.numbers(sides, asked, own, row_bytes, draw(rows), agreement, origins))

    def _keep(self, sides: Sequence[Sides], kept: KeptNumbers) -> None:
        write = self._files.rows.store.write_tensors
        for block in self._blocks:
            tensors: dict[str, torch.Tensor] = {}
            for numbers, place in zip(kept.places, kept.choice.places, strict=True):
                if self._layers[place].block == block:
                    tensors[f"{place}.places"] = numbers
                    row = projection.row_maps(self._curvatures(place), sides[place])
                    query = projection.query_maps(self._curvatures(place), sides[place])
                    for name, map_ in zip(("row_left", "row_right"), row, strict=True):
                        tensors[f"{place}.{name}"] = map_.to(self._lm.dtype)
                    for name, map_ in zip(("query_left", "query_right"), query, strict=True):
                        tensors[f"{place}.{name}"] = map_
            write(self._files.projection(block), tensors)
        # Last: where it is, the projection is complete.
        write(self._files.sides, tensors_of(kept))


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    """Values again and again, until there are so many."""
    return [*islice(cycle(values), count)]


def _side_rows(samples: int) -> int:
    least, most = SIDE_ROWS
    return min(most, max(least, samples // 8))


def _check(options: IndexOptions) -> None:
    wrong = [
        f"--{name} {value}: must be 1 or more"
        for name, value in (
            ("bytes", options.row_bytes),
            ("samples", options.samples),
            ("curvature-tokens", options.curvature.curvature_tokens),
        )
        if value is not None and value < 1
    ]
    if options.agreement is not None and not 0 < options.agreement <= 1:
        wrong.append(f"--agreement {options.agreement}: must be above 0, and at most 1")
    if options.curvature.damping < 0:
        wrong.append(f"--damping {options.curvature.damping}: must not be negative")
    if options.curvature.curvature != "ekfac":
        wrong.append(f"--curvature {options.curvature.curvature}: an index is whitened by EK-FAC; leave it out")
    if wrong:
        raise ConceptError("; ".join(wrong))
