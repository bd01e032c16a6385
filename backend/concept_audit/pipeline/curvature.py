"""Stage: curvature factors of the blocks that a score needs, fitted once and kept.

Blocks are fitted in groups, as many at a time as fit into memory: a pass over the
rows for the covariances, their eigendecompositions, and a pass for the eigenvalues.
What another ranking needs of further blocks is added to what is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from concept_audit.errors import StoreError
from concept_audit.influence.curvature import Eigenbasis, LayerCurvature, eigenbasis, kfac_eigenvalues
from concept_audit.influence.fitting import Accumulator, Covariances, Fisher, SquaredGradients, accumulate
from concept_audit.influence.queries import Rows
from concept_audit.model.chat import PROMPT
from concept_audit.model.linear import LinearLayer, linear_layers
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.options import key
from concept_audit.progress import Progress
from concept_audit.store.influence import CurvatureFiles, curvature_files, read_about, read_tensors, write_tensors
from concept_audit.store.layout import Layout
from concept_audit.store.shards import TokenizedExample, read_tokens

CurvatureKind = Literal["ekfac", "kfac", "identity"]
CURVATURES = ("ekfac", "kfac", "identity")
CHECKPOINT_SECONDS = 60.0
GROUP_BYTES_CPU = 1 << 30
GROUP_BYTES_ACCELERATOR = 8 << 30


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
    weights: Literal["linear", "lora"]
    precision: str


@dataclass(frozen=True)
class _Sample:
    rows: Rows
    keys: list[str]


def fit_curvature(
    layout: Layout, lm: LanguageModel, fit: CurvatureFit, data: str, blocks: Sequence[int], progress: Progress
) -> CurvatureFiles:
    """Fit what is missing of the factors of some blocks.

    Args:
        data: fingerprint of the rows as tokens.
        blocks: block numbers from 1, consecutive.

    Returns:
        the files, in which all these blocks are complete.

    Raises:
        StoreError: the files there are of another model or data set.
    """
    made_of = {
        "model": lm.fingerprint,
        "data": data,
        "fisher": fit.fisher.kind,
        "seed": fit.fisher.seed,
        "tokens": fit.tokens,
        "weights": fit.weights,
        "precision": fit.precision,
    }
    name = key(fit.fisher.kind, fit.fisher.seed, fit.tokens, fit.weights, fit.precision)
    lm = lm.in_dtype(getattr(torch, fit.precision))
    files = curvature_files(layout, name, made_of)
    missing = [block for block in blocks if not files.block(block).exists()]
    if missing:
        sample = _sample(layout, fit.tokens)
        for group in _groups(lm, missing, fit.weights):
            _fit_group(files, lm, fit, group, sample, progress)
    return files


def curvature_of(
    files: CurvatureFiles, layers: Sequence[LinearLayer], kind: CurvatureKind, device: torch.device
) -> Callable[[int], LayerCurvature]:
    """The curvature of each tracked layer by its index, read a block at a time."""

    @lru_cache(maxsize=1)
    def block(number: int) -> Mapping[str, torch.Tensor]:
        return read_tensors(files.block(number), device)

    def curvature(index: int) -> LayerCurvature:
        layer = layers[index]
        tensors = block(layer.block)
        inputs = Eigenbasis(*(tensors[f"{layers[layer.source].name}.inputs.{part}"] for part in _PARTS))
        outputs = Eigenbasis(*(tensors[f"{layer.name}.outputs.{part}"] for part in _PARTS))
        eigenvalues = kfac_eigenvalues(inputs, outputs) if kind == "kfac" else tensors[f"{layer.name}.eigenvalues"]
        return LayerCurvature(inputs.vectors, outputs.vectors, eigenvalues, inputs.values, outputs.values)

    return curvature


_PARTS = ("vectors", "values")


def _fit_group(
    files: CurvatureFiles,
    lm: LanguageModel,
    fit: CurvatureFit,
    group: Sequence[int],
    sample: _Sample,
    progress: Progress,
) -> None:
    layers = linear_layers(lm, group[0], group[-1], fit.weights)
    dtype = lm.wide_dtype
    named = f"blocks {group[0]} to {group[-1]}" if len(group) > 1 else f"block {group[0]}"
    if not all(files.basis(block).exists() for block in group):
        covariances = Covariances(layers, dtype, lm.device)
        _pass(files, lm, layers, covariances, fit, sample, f"Covariances of {named}", progress)
        with progress.stage(f"Eigenvectors of {named}", len(layers), "layers") as stage:
            for block in group:
                _write_basis(files, layers, block, covariances, stage)
        del covariances  # its room is needed for what follows
    bases = {name: tensor for block in group for name, tensor in read_tensors(files.basis(block)).items()}
    vectors = [
        (
            bases[f"{layers[layer.source].name}.inputs.vectors"].to(lm.device, lm.dtype),
            bases[f"{layer.name}.outputs.vectors"].to(lm.device, lm.dtype),
        )
        for layer in layers
    ]
    squares = SquaredGradients(layers, vectors)
    _pass(files, lm, layers, squares, fit, sample, f"Eigenvalues of {named}", progress)
    for block in group:
        finished = read_tensors(files.basis(block))
        for index, layer in enumerate(layers):
            if layer.block == block:
                finished[f"{layer.name}.eigenvalues"] = squares.eigenvalues(index)
        write_tensors(files.block(block), finished)
    for block in group:
        files.basis(block).unlink()
    files.under_way.unlink(missing_ok=True)


def _write_basis(files, layers, block, covariances: Covariances, stage) -> None:
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        if layer.block != block:
            continue
        sides = {"outputs": covariances.outputs(index)}
        if layer.source == index:
            sides["inputs"] = covariances.inputs(index)
        for side, covariance in sides.items():
            basis = eigenbasis(covariance)
            found[f"{layer.name}.{side}.vectors"] = basis.vectors
            found[f"{layer.name}.{side}.values"] = basis.values
        stage.advance()
    write_tensors(files.basis(block), found)


def _pass(
    files: CurvatureFiles,
    lm: LanguageModel,
    layers: Sequence[LinearLayer],
    into: Accumulator,
    fit: CurvatureFit,
    sample: _Sample,
    name: str,
    progress: Progress,
) -> None:
    """One pass over the rows, from where an earlier run put its sums away."""
    done, rows_done = _resumed(files, into, name)
    rows_total = sum(1 for span in sample.rows.spans if span)
    with progress.stage(name, rows_total, "rows") as stage:
        stage.skip(rows_done)
        saved = time.monotonic()

        def after(batches: int, rows: int) -> None:
            nonlocal saved
            stage.advance(rows)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                _put_away(files, into, name, batches, stage.done)
                saved = time.monotonic()

        accumulate(lm, layers, into, sample.rows, sample.keys, fit.fisher, done, after, progress.say)
        _put_away(files, into, name, 1 << 62, stage.done)


def _put_away(files: CurvatureFiles, into: Accumulator, name: str, batches: int, rows: int) -> None:
    write_tensors(files.under_way, into.tensors(), {"pass": name, "batches": batches, "rows": rows})


def _resumed(files: CurvatureFiles, into: Accumulator, name: str) -> tuple[int, int]:
    """Batches and rows that an earlier run had finished, whose sums are now in `into`."""
    if not files.under_way.exists():
        return 0, 0
    try:
        about = read_about(files.under_way)
        if about.get("pass") != name:
            return 0, 0
        kept = read_tensors(files.under_way)
    except Exception as error:  # safetensors raises a type of its own
        raise StoreError(f"{files.under_way}: damaged ({error}); delete it") from error
    for tensor_name, tensor in into.tensors().items():
        tensor.copy_(kept[tensor_name])
    return about["batches"], about["rows"]


def _sample(layout: Layout, tokens: int) -> _Sample:
    """Rows with `tokens` tokens together, those of the smallest content hashes: the same in any order."""
    rows: list[TokenizedExample] = []
    for number in layout.shard_numbers("examples"):
        rows += [row for row in read_tokens(layout, number) if (row.parts != PROMPT).any()]
        rows.sort(key=lambda row: row.content_hash)
        total = 0
        for place, row in enumerate(rows):
            total += len(row.input_ids)
            if total >= tokens:
                del rows[place + 1 :]
                break
    # Copies of a row would draw the same labels.
    distinct = {row.content_hash: row for row in rows}
    ids, response = zip(*((row.input_ids, row.parts != PROMPT) for row in distinct.values()), strict=True)
    return _Sample(Rows(ids, response), list(distinct))


def _groups(lm: LanguageModel, blocks: Sequence[int], weights) -> list[list[int]]:
    """Runs of consecutive blocks whose statistics fit into memory together."""
    room = GROUP_BYTES_CPU if lm.device.type == "cpu" else GROUP_BYTES_ACCELERATOR
    size = lm.wide_dtype.itemsize
    groups: list[list[int]] = []
    used = 0
    for block in blocks:
        layers = linear_layers(lm, block, block, weights)
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
