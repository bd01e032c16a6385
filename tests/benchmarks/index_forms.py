"""Other forms in which an index could keep a row, tried on the numbers of a large one.

python tests/benchmarks/index_forms.py --audit AUDIT --truth FILE     # after `index.py fidelity --truth FILE`

Of each layer a row has a matrix between the two sides. Its best approximation of a small rank, by its singular values,
takes rank × (left + right) numbers: factors of projected gradients (LoRIF, arXiv 2601.21929). *In the queries' metric*
the matrix is first multiplied with the roots of what queries ask of its rows and columns on average, so that what
is left out is what is asked least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit.pipeline.index.codes import Codes
from concept_audit.pipeline.index.query import OpenIndex, projection_reader
from concept_audit.progress import LineProgress
from concept_audit.store.shard_store import read_tensors
from tests.benchmarks.index import Question, decoded, told

RANKS = (1, 2, 4)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    low_rank(Question.of(options.audit), np.load(options.truth))


if __name__ == "__main__":
    main()
