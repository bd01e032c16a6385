"""Stage: curvature factors of the blocks that a score needs, fitted once and kept.

Blocks are fitted in groups, as many at a time as fit into memory: a pass over the
rows for the covariances, their eigendecompositions, and a pass for the eigenvalues.
A pass is cut into parts of fixed rows, and the sums of the parts are added in their
order, so the factors do not depend on who computed which. What another ranking needs
of further blocks is added to what is there::

    shards/curvature/<key>/curvature.json         what the factors are of
                          /block-0007.safetensors    eigenvectors and eigenvalues of block 7: finished factors
                          /upper-covariances-1-7/000000.safetensors   sums over the first part of a pass under way
                          /bases-1-7/000000.safetensors         eigenvectors of the first block of a group
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from concept_audit.files import remove_leftovers
from concept_audit.influence.curvature import Eigenbasis, LayerCurvature, kfac_eigenvalues
from concept_audit.influence.fitting import Accumulator, Covariances, Fisher, SquaredGradients, accumulate
from concept_audit.influence.options import CurvatureKind, CurvatureOptions
from concept_audit.influence.queries import Rows
from concept_audit.influence.wide import orthonormal, side_eigenbasis, wide_form
from concept_audit.model.linear import Layers, LinearLayer, linear_layers
from concept_audit.model.load import LanguageModel
from concept_audit.model.memory import room_on
from concept_audit.model.options import ModelSource
from concept_audit.model.pairs import sequences
from concept_audit.pipeline.engine import Worker, missing_of
from concept_audit.pipeline.options import key
from concept_audit.pipeline.place import taking_turns
from concept_audit.pipeline.sampling import rows_with_tokens
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import Progress
from concept_audit.store.examples import read_examples
from concept_audit.store.partition import ListedPartition
from concept_audit.store.shard_store import RowShards, ShardSet, intact, open_tensors, read_tensors
from concept_audit.types import PROMPT, REJECTED

PART_TOKENS = 10_240
"""Of the rows that are summed in one go, at least: what a kill loses, and what one worker does at a time."""
PART_TOKENS_WIDE = 65_536
"""Of models with wide sides, whose sums take longer to write than so many tokens on the accelerator that they need."""
GROUP_BYTES_CPU = 1 << 30
GROUP_BYTES_ACCELERATOR = 8 << 30
DESCRIPTION = "curvature.json"


@dataclass(frozen=True)
class CurvatureFit:
    """What the factors of an audit are fitted on.

    Attributes:
        fisher: ``sampled`` or ``empirical``, with the seed of the draws.
        tokens: as many rows are used as have this many tokens together, chosen by content hash.
        weights: ``linear`` or ``lora``: whose curvature.
        precision: in which the model runs; sums over rows are in float32 or wider.
    """

    fisher: Fisher
    tokens: int
    weights: Layers
    precision: str

    @classmethod
    def of(cls, options: CurvatureOptions, weights: Layers, precision: str) -> CurvatureFit:
        """The fit that options ask for, with weights and precision resolved."""
        return cls(Fisher(options.fisher, options.seed), options.curvature_tokens, weights, precision)


@dataclass(frozen=True)
class CurvatureFiles:
    """The factors of one fit, of each layer alone: whether other weights are left out is asked where scores are.

    Attributes:
        shards: where they lie.
    """

    shards: ShardSet

    def block(self, block: int) -> Path:
        """Finished factors of a block."""
        return self.shards.file(f"block-{block:04}.safetensors")


@dataclass(frozen=True)
class Summing:
    """One pass over the sampled rows, part by part: sums of what the curvature is made of.

    Attributes:
        tokens: the rows as the model reads them.
        sums: to be made, one shard a part.
        parts: the example ids of each part's rows.
        blocks: first and last block of the group.
        bases: files with the eigenvectors that squared gradients are measured in; none for covariances.
    """

    tokens: RowShards
    sums: ShardSet
    parts: tuple[tuple[int, ...], ...]
    model: ModelSource
    fit: CurvatureFit
    blocks: tuple[int, int]
    bases: tuple[Path, ...] = ()

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.sums,)

    def open(self, worker: Worker) -> tuple[LanguageModel, list[LinearLayer], list, Worker]:
        lm = worker.model(self.model).in_dtype(getattr(torch, self.fit.precision))
        layers = linear_layers(lm, *self.blocks, self.fit.weights, partial=True)
        tensors = {name: tensor for path in self.bases for name, tensor in read_tensors(path).items()}
        vectors = []
        for layer in layers if self.bases else ():
            names = f"{layers[layer.source].name}.inputs.vectors", f"{layer.name}.outputs.vectors"
            wide = [_is_wide(name, tensors) for name in names]
            # What a wide side leaves out is found by subtraction, for which bfloat16 is too coarse.
            dtype = lm.wide_dtype if any(wide) else lm.dtype
            sides = (tensors[name].to(lm.device, dtype) for name in names)
            vectors.append(
                tuple(orthonormal(Q, dtype) if is_wide else Q for Q, is_wide in zip(sides, wide, strict=True))
            )
        return lm, layers, vectors, worker

    def run(self, opened: tuple[LanguageModel, list[LinearLayer], list, Worker], number: int) -> None:
        lm, layers, vectors, worker = opened
        rows = read_examples(self.tokens, self.parts[number])
        into: Accumulator = (
            SquaredGradients(layers, vectors) if self.bases else Covariances(layers, lm.wide_dtype, lm.device)
        )
        # Each side of a pair is a text of its own: its labels are drawn by a key of its own.
        parts = sequences([row.input_ids for row in rows], [row.parts != PROMPT for row in rows])
        keys = [
            rows[owner].content_hash + ("" if sign > 0 else REJECTED)
            for owner, sign in zip(parts.owner.tolist(), parts.sign.tolist(), strict=True)
        ]
        done = 0

        def advance(texts: int) -> None:
            nonlocal done  # rows are counted, of which a pair is two texts
            before, done = done, done + texts
            worker.advance(done * len(rows) // len(keys) - before * len(rows) // len(keys))

        accumulate(lm, layers, into, Rows(parts.ids, parts.response), keys, self.fit.fisher, advance, worker.say)
        self.sums.write_tensors(number, into.tensors())


@dataclass(frozen=True)
class Decomposing:
    """The eigenvectors of covariances, one block after the other: what takes longest grows with d³.

    Attributes:
        sums: over the parts of a pass for covariances, all there.
        bases: to be made, one shard a block.
        blocks: first and last block of the group.
    """

    sums: ShardSet
    bases: ShardSet
    model: ModelSource
    fit: CurvatureFit
    blocks: tuple[int, int]

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.bases,)

    def open(self, worker: Worker) -> tuple[list[LinearLayer], torch.device, Worker]:
        lm = worker.model(self.model)
        return linear_layers(lm, *self.blocks, self.fit.weights, partial=True), lm.device, worker

    def run(self, opened: tuple[list[LinearLayer], torch.device, Worker], number: int) -> None:
        layers, device, worker = opened
        block = self.blocks[0] + number
        covariances = Covariances.of(layers, _summed(self.sums, Covariances.names(layers, block)))
        found: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            if layer.block != block:
                continue
            sides = {"outputs": covariances.outputs(index)}
            if layer.source == index:
                sides["inputs"] = covariances.inputs(index)
            for side, covariance in sides.items():
                basis = side_eigenbasis(covariance.to(device))
                found[f"{layer.name}.{side}.vectors"] = basis.vectors
                found[f"{layer.name}.{side}.values"] = basis.values
            worker.advance()
        self.bases.write_tensors(number, found)


def fit_curvature(
    sources: Sources, lm: LanguageModel, fit: CurvatureFit, blocks: Sequence[int], progress: Progress
) -> CurvatureFiles:
    """Fit what is missing of the factors of some blocks.

    Args:
        blocks: block numbers from 1, consecutive.

    Returns:
        the files, in which all these blocks are complete.

    Raises:
        StoreError: the files there are of another model or data set.
    """
    layers = linear_layers(lm, blocks[0], blocks[-1], fit.weights, partial=True)
    made_of = {"model": lm.fingerprint, "data": sources.data, **asdict(fit)}
    if wide := wide_form(layers):
        made_of["wide_sides"] = wide
    shards = ShardSet(sources.layout.shards, "curvature", key(made_of), ListedPartition(()))
    files = CurvatureFiles(shards)
    shards.store.claim(shards.file(DESCRIPTION), made_of, "curvature factors", "to have them fitted again")
    if all(intact(files.block(block)) for block in blocks):
        return files
    lock, doing = f"curvature-{shards.key}", "fits the same curvature; its factors will serve here, too"
    with taking_turns(sources.layout, sources.manifest, lock, doing, progress.say):
        remove_leftovers(shards.file(""))
        missing = [block for block in blocks if not intact(files.block(block))]
        lm = lm.in_dtype(getattr(torch, fit.precision))
        parts = _parts(sources.shards("tokens"), fit.tokens, PART_TOKENS_WIDE if wide else PART_TOKENS)
        for group in _groups(lm, missing, fit.weights):
            _fit_group(files, sources, lm, fit, group, parts, progress)
    return files


def curvature_of(
    files: CurvatureFiles, layers: Sequence[LinearLayer], kind: CurvatureKind, device: torch.device
) -> Callable[[int], LayerCurvature]:
    """The curvature of each tracked layer by its index, read a block at a time.

    Blocks that fit into the room of a group are read once, so that many concepts do not read them again each.
    """
    room = room_on(device, GROUP_BYTES_CPU)
    held: dict[int, dict[str, torch.Tensor]] = {}

    @lru_cache(maxsize=1)
    def block(number: int) -> Mapping[str, torch.Tensor]:
        tensors = held.get(number) or read_tensors(files.block(number), device)
        if number not in held and sum(t.nbytes for one in (*held.values(), tensors) for t in one.values()) <= room:
            held[number] = tensors
        wide = {
            name: tensors[name.removesuffix("vectors") + "values"].dtype for name in tensors if _is_wide(name, tensors)
        }
        return {**tensors, **{name: orthonormal(tensors[name], dtype) for name, dtype in wide.items()}}

    def curvature(index: int) -> LayerCurvature:
        layer = layers[index]
        tensors = block(layer.block)
        inputs = Eigenbasis(*(tensors[f"{layers[layer.source].name}.inputs.{part}"] for part in _PARTS))
        outputs = Eigenbasis(*(tensors[f"{layer.name}.outputs.{part}"] for part in _PARTS))
        eigenvalues = kfac_eigenvalues(inputs, outputs) if kind == "kfac" else tensors[f"{layer.name}.eigenvalues"]
        return LayerCurvature(inputs.vectors, outputs.vectors, eigenvalues, inputs.values, outputs.values)

    return curvature


_PARTS = ("vectors", "values")


def _is_wide(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor holds the leading eigenvectors of a wide side, which are rounded where they are kept."""
    return name.endswith(".vectors") and len(tensors[name]) > tensors[name].shape[1]


def _fit_group(
    files: CurvatureFiles,
    sources: Sources,
    lm: LanguageModel,
    fit: CurvatureFit,
    group: Sequence[int],
    parts: tuple[tuple[int, ...], ...],
    progress: Progress,
) -> None:
    first, last = group[0], group[-1]
    layers = linear_layers(lm, first, last, fit.weights, partial=True)
    named = f"blocks {first} to {last}" if len(group) > 1 else f"block {first}"
    partition = ListedPartition(tuple(map(len, parts)))
    sums = replace(files.shards, key=f"{files.shards.key}/upper-covariances-{first}-{last}", partition=partition)
    work = Summing(sources.shards("tokens"), sums, parts, sources.model_source, fit, (first, last))
    bases = replace(
        files.shards,
        key=f"{files.shards.key}/bases-{first}-{last}",
        partition=ListedPartition(tuple(sum(layer.block == block for layer in layers) for block in group)),
    )
    vectors = Decomposing(sums, bases, sources.model_source, fit, (first, last))
    driver = sources.driver(progress)
    if missing_of(vectors):
        driver.finish(work, f"Covariances of {named}", _sizes(sums))
        driver.finish(vectors, f"Eigenvectors of {named}", _sizes(bases), "layers")
    sums.store.remove(sums.kind, sums.key)
    sums = replace(sums, key=f"{files.shards.key}/squares-{first}-{last}")
    work = replace(work, sums=sums, bases=tuple(map(bases.complete, bases.numbers())))
    driver.finish(work, f"Eigenvalues of {named}", _sizes(sums))
    squares = SquaredGradients.of(layers, _summed(sums))
    for block, basis in zip(group, work.bases, strict=True):
        finished = read_tensors(basis)
        for index, layer in enumerate(layers):
            if layer.block == block:
                finished[f"{layer.name}.eigenvalues"] = squares.eigenvalues(index)
        files.shards.store.write_tensors(files.block(block), finished)
    for of in (bases, sums):
        of.store.remove(of.kind, of.key)


def _sizes(shards: ShardSet) -> dict[int, int]:
    return {number: shards.partition.size(number) for number in range(len(shards.partition))}


def _summed(sums: ShardSet, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """The sums over all parts, which are added in their order: of some tensors, or all."""
    total: dict[str, torch.Tensor] = {}
    for number in sums.numbers():
        with open_tensors(sums.path(number), "pt") as file:
            for name in file.keys() if names is None else names:
                part = file.get_tensor(name)
                total[name] = total[name].add_(part) if name in total else part
    return total


def _parts(tokens: RowShards, total: int, size: int) -> tuple[tuple[int, ...], ...]:
    """The sampled rows, cut where so many tokens are reached: example ids of each part."""
    parts: list[list[int]] = []
    used = size
    for row in rows_with_tokens(tokens, total):
        if used >= size:
            parts.append([])
            used = 0
        parts[-1].append(row.example_id)
        used += len(row.input_ids)
    return tuple(map(tuple, parts))


def _groups(lm: LanguageModel, blocks: Sequence[int], weights: Layers) -> list[list[int]]:
    """Runs of consecutive blocks whose statistics fit into memory together."""
    room = GROUP_BYTES_CPU if lm.device.type == "cpu" else GROUP_BYTES_ACCELERATOR
    size = lm.wide_dtype.itemsize
    groups: list[list[int]] = []
    used = 0
    for block in blocks:
        layers = linear_layers(lm, block, block, weights, partial=True)
        need = size * sum(
            (layer.d_in**2 if layer.source == i else 0) + layer.d_out**2 + layer.d_in * layer.d_out
            for i, layer in enumerate(layers)
        )
        if not groups or used + need > room or groups[-1][-1] != block - 1:
            groups.append([])
            used = 0
        groups[-1].append(block)
        used += need
    return groups
