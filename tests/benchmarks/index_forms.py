"""Other forms in which an index could keep a row, tried on the numbers of a large one.

python tests/benchmarks/index_forms.py ranks --audit AUDIT --truth FILE     # after `index.py fidelity --truth FILE`
python tests/benchmarks/index_forms.py across --audit AUDIT --truth FILE

The index is to be one of all layers: ``concept-audit index AUDIT --agreement 1 --bytes 524288``.

``ranks``: of each layer a row has a matrix between the two sides. Its best approximation of a small rank, by its singular values,
takes rank × (left + right) numbers: factors of projected gradients (LoRIF, arXiv 2601.21929). *In the queries' metric*
the matrix is first multiplied with the roots of what queries ask of its rows and columns on average, so that what
is left out is what is asked least.

``across``: forms that are not of one layer alone, learned from queries of single rows that are none of the targets'.
*Joint components* are the principal components of such queries over all layers at once, in the metric in which rows
are white; they are kept in 8 bits, and what they leave of a row is coded as the index codes a row, in the bytes that
are left. *Greedy layers*: one layer after the other is taken, each time the one with which scores of the learned
queries come nearest to those of all layers, and only numbers of these are coded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit import Audit
from concept_audit.influence.coding import allocate, order_and_packing, quantise, steps_and_centres
from concept_audit.influence.queries import NegatedConcept, Rows
from concept_audit.influence.targets import Projection
from concept_audit.pipeline.index.codes import Codes
from concept_audit.pipeline.index.query import OpenIndex, Target, projection_reader
from concept_audit.progress import LineProgress
from concept_audit.store.activations import read_means
from concept_audit.store.shard_store import read_tensors
from tests.benchmarks.index import Question, data_of, decoded, told

RANKS = (1, 2, 4)
COMPONENTS = (64, 256)
GREEDY = (4, 10, 14, 28, 56, 84)
"""Of the layers, so many are taken."""
BYTES = (8, 16, 32, 64, 128)
"""KiB a row."""
LEARNED, ON_ROWS, SEED = 512, 64, 7
"""Queries to learn from, on so many rows."""
METRICS = {"": False, ", in the queries' metric": True}


def low_rank(question: Question, truth: np.ndarray) -> None:
    """Factors of rank 1, 2 and 4 of each layer's matrix, as floating-point numbers."""
    opened, layers = question.opened, question.layers
    sides, codes = read_tensors(opened.files.sides), Codes.read(opened.files)
    rows = _rows(opened, codes)
    columns = [opened.compressed(target, question.damping).whole for target in question.targets]
    asked = np.zeros((len(columns), len(codes.spread)), np.float32)
    for place, column in enumerate(columns):
        asked[place, : len(column)] = column
    # What queries ask of a number on average is its importance less its own size.
    squares = (sides["importance"] / torch.from_numpy(codes.spread).square()).nan_to_num()
    ends = [0, *sides["ends"].tolist()]
    read = projection_reader(opened.files, layers, torch.device("cpu"))
    guesses = {(rank, metric): torch.zeros(truth.shape) for rank in RANKS for metric in METRICS.values()}
    numbers = 0
    with LineProgress(sys.stdout).stage("Layers", len(layers), "layers") as stage:
        for i in range(len(layers)):
            projection, mine = read(i), slice(ends[i], ends[i + 1])
            shape = projection.row_left.shape[1], projection.row_right.shape[1]
            numbers += sum(shape)

            def spread_out(values: torch.Tensor, places=projection.places, shape=shape) -> torch.Tensor:
                whole = torch.zeros(len(values), shape[0] * shape[1])
                whole[:, places] = values
                return whole.unflatten(1, shape)

            X, Q = spread_out(torch.from_numpy(rows[:, mine])), spread_out(torch.from_numpy(asked[:, mine]))
            M = spread_out(squares[None, mine])[0]
            for metric in METRICS.values():
                _add(guesses, metric, X, Q, M)
            stage.advance()
    for name, metric in METRICS.items():
        for rank in RANKS:
            told(f"rank {rank}{name}, {rank * numbers / 1024:.0f} KiB in 8 bits", guesses[rank, metric].numpy(), truth)


def _add(
    guesses: dict[tuple[int, bool], torch.Tensor], metric: bool, X: torch.Tensor, Q: torch.Tensor, M: torch.Tensor
) -> None:
    """Add a layer's scores: X [rows, left, right], Q [targets, left, right], M [left, right] mean squares of Q."""
    left, right = torch.ones(M.shape[0]), torch.ones(M.shape[1])
    if metric:
        left, right = (side.clamp(min=1e-6 * float(side.max())).sqrt() for side in (M.mean(1), M.mean(0)))
    U, S, Vh = torch.linalg.svd(X * left[:, None] * right, full_matrices=False)
    for rank in RANKS:
        u, v = U[:, :, :rank] * S[:, None, :rank] / left[:, None], Vh[:, :rank] / right
        guesses[rank, metric] += torch.einsum("nlr,qlm,nrm->nq", u, Q, v)


def _rows(opened: OpenIndex, codes: Codes) -> np.ndarray:
    """What the codes of all rows stand for, in the order of the numbers: float32 [rows, numbers of all layers]."""
    spread = codes.spread[codes.order]
    found: Sequence[np.ndarray] = [decoded(path, codes, spread) for path in opened.files.paths()]
    rows = np.zeros((sum(map(len, found)), len(codes.spread)), np.float32)
    rows[:, codes.order] = np.concatenate(found)
    return rows


def learned_queries(question: Question, root: Path, skipped: Sequence[str]) -> np.ndarray:
    """Queries of a kind with those that are asked, on single rows: float32 [queries, numbers of all layers].

    Half are decoder directions of SAE features, half differences of the means of eight rows drawn at random, at the
    layers of the targets in turns; each has unit length.
    """
    audit, opened, draws = Audit(root), question.opened, np.random.default_rng(SEED)
    rows = data_of(question.sources)
    chosen = draws.choice(rows.scorable, min(ON_ROWS, len(rows.scorable)), replace=False)
    live = [f for f in audit.concepts.features()["feature_id"] if f"sae:{f}" not in skipped]
    depths = sorted({target.reach for target in question.targets})
    means = {depth: read_all(read_means(question.sources.shards("activations"), depth)) for depth in depths}
    targets = []
    for number in range(LEARNED):
        if number % 2:
            depth = depths[number // 2 % len(depths)]
            one, other = np.split(draws.choice(len(rows), 16, replace=False), 2)
            direction = np.nanmean(means[depth][one], 0) - np.nanmean(means[depth][other], 0)
        else:
            concept = audit.concept(f"sae:{draws.choice(live)}")
            depth, direction = concept.layer, concept.direction
        row = chosen[number % len(chosen)]
        unit = (direction / np.linalg.norm(direction)).astype(np.float32)
        query = Rows([rows.ids[row]], [rows.response[row]])
        targets.append(Target(NegatedConcept(Projection(depth, unit)), query, [1.0], depth))
    with LineProgress(sys.stdout).stage("Queries to learn from", len(targets), "queries") as stage:
        found = padded(
            [column.whole for column in opened.compressed_together(targets, question.damping, stage.advance)]
        )
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def padded(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Queries of the same length, those that reach less far with zeros: float32 [queries, numbers of all layers]."""
    found = np.zeros((len(columns), max(map(len, columns))), np.float32)
    for place, column in enumerate(columns):
        found[place, : len(column)] = column
    return found


def read_all(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))


def across_layers(question: Question, truth: np.ndarray, root: Path) -> None:
    """Joint components with what they leave, and layers chosen greedily."""
    codes = Codes.read(question.opened.files)
    sides = read_tensors(question.opened.files.sides)
    ends = [0, *sides["ends"].tolist()]
    importance = sides["importance"]
    rows = _rows(question.opened, codes) / codes.spread
    asked = padded([question.opened.compressed(target, question.damping).whole for target in question.targets])
    asked = np.pad(asked, ((0, 0), (0, len(codes.spread) - asked.shape[1]))) * codes.spread
    learned = learned_queries(question, root, question.names)
    learned = np.pad(learned, ((0, 0), (0, len(codes.spread) - learned.shape[1]))) * codes.spread
    told("all numbers", rows @ asked.T, truth)
    for kib in BYTES:
        told(f"numbers by importance, {kib} KiB", coded(rows, asked, importance, kib * 1024), truth)
    greedy(rows, asked, learned, importance, ends, truth)
    values, vectors = np.linalg.eigh((learned @ learned.T).astype(np.float64))
    for count in COMPONENTS:
        basis = learned.T @ (vectors[:, -count:] / np.sqrt(values[-count:])).astype(np.float32)
        kept, wanted = rows @ basis, asked @ basis
        step = np.abs(kept).max(1, keepdims=True) / 127
        kept = np.rint(kept / step) * step
        told(f"{count} joint components alone, {count / 1024:.2g} KiB", kept @ wanted.T, truth)
        left, left_asked = rows - kept @ basis.T, asked - wanted @ basis.T
        for kib in BYTES:
            rest = coded(left, left_asked, importance, kib * 1024 - count)
            told(f"{count} joint components and what they leave, {kib} KiB", kept @ wanted.T + rest, truth)


def greedy(
    rows: np.ndarray,
    asked: np.ndarray,
    learned: np.ndarray,
    importance: torch.Tensor,
    ends: Sequence[int],
    truth: np.ndarray,
) -> None:
    """Numbers of the layers alone that are chosen one after the other."""
    spans = list(pairwise(ends))
    of_layer = np.stack([rows[:, a:b] @ learned[:, a:b].T for a, b in spans])
    whole = of_layer.sum(0)
    total, chosen = np.zeros_like(whole), []
    for count in range(1, max(GREEDY) + 1):
        rest = [i for i in range(len(spans)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: alike(total + of_layer[i], whole)))
        total += of_layer[chosen[-1]]
        if count in GREEDY:
            mine = torch.zeros(len(importance), dtype=torch.bool)
            for i in chosen:
                mine[slice(*spans[i])] = True
            told(f"the {count} best of {len(spans)} layers, all numbers", rows[:, mine] @ asked[:, mine].T, truth)
            for kib in BYTES:
                guess = coded(rows, asked, torch.where(mine, importance, 0), kib * 1024)
                told(f"the {count} best of {len(spans)} layers, {kib} KiB", guess, truth)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Mean Pearson correlation of columns."""
    a, b = one - one.mean(0), other - other.mean(0)
    return float(((a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))).mean())


def coded(rows: np.ndarray, asked: np.ndarray, importance: torch.Tensor, row_bytes: int) -> np.ndarray:
    """Scores from numbers that are shared out and coded for so many bytes a row, as a build does it.

    Args:
        rows: in units of each number's spread.
        asked: in its inverse.
    """
    order, packing = order_and_packing(allocate(importance, 8 * row_bytes))
    spread = np.sqrt(np.square(rows[:, order]).mean(0)) + np.finfo(np.float32).tiny
    values, scales = quantise(rows[:, order], spread, packing)
    steps, centres = steps_and_centres(packing)
    return ((values - centres) * (steps * spread)) @ asked[:, order].T * scales[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ranks", "across"])
    parser.add_argument("--audit", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    question, truth = Question.of(options.audit), np.load(options.truth)
    if options.part == "ranks":
        low_rank(question, truth)
    else:
        across_layers(question, truth, options.audit)


if __name__ == "__main__":
    main()
