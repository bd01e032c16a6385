"""The gradient index: how faithful it is, what it costs, and how fast it answers.

python tests/benchmarks/index.py fidelity --audit AUDIT [--random] [--truth FILE]     # with an index, an SAE and two probes
python tests/benchmarks/index.py cost --audit AUDIT [--rows 48]
python tests/benchmarks/index.py sweep --out DIR [--rows 100000] [--bytes 16384] [--two-bit-share 0.8] [--device cuda]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit import Audit, InfluenceOptions
from concept_audit.influence.coding import allocate, order_and_packing, quantise, steps_and_centres
from concept_audit.influence.projection import compress_rows
from concept_audit.influence.queries import DenseQueries, Rows
from concept_audit.influence.scoring import score_rows, score_rows_for_many
from concept_audit.model.batches import batches_by_length
from concept_audit.model.budgets import gradient_tokens_per_batch
from concept_audit.model.gradients import GradientPass
from concept_audit.model.linear import LinearLayer, linear_layers
from concept_audit.model.load import LanguageModel
from concept_audit.pipeline.index.codes import Codes, kept_layers
from concept_audit.pipeline.index.query import OpenIndex, Target, index_scores, projection_reader
from concept_audit.pipeline.rank import _target, request
from concept_audit.pipeline.refine import Plan
from concept_audit.pipeline.sampling import as_rows
from concept_audit.pipeline.sources import Sources
from concept_audit.progress import LineProgress, Progress
from concept_audit.store.examples import read_tokens
from concept_audit.store.index import IndexFiles, index_files, sweep
from concept_audit.store.layout import Layout
from concept_audit.store.packing import Packing
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import read_tensors

TOP = 50
EXACT_ROWS, EXACT_SHARE = 100, 0.03
"""The exact stage scores so many of the index's first rows, or this share of all rows, if that is more."""
CONTROLS = 8
"""Controls that are drawn to go through the exact stage with."""
SIDES = (8, 12, 17, 24)
SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""KiB a row of smaller indexes."""


def data_of(sources: Sources) -> Rows:
    tokens = sources.shards("tokens")
    return as_rows([row for number in tokens.numbers() for row in read_tokens(tokens, number)])


def told(name: str, guess: np.ndarray, truth: np.ndarray) -> None:
    """Agreement with exact scores, and what of the true top is found by scoring the index's first rows exactly."""
    pairs = list(zip(guess.T, truth.T, strict=True))
    correlations = [spearmanr(g, t).statistic for g, t in pairs]
    overlaps = [shared(g, t, TOP) for g, t in pairs]
    recalls = [shared(g, t, max(EXACT_ROWS, round(EXACT_SHARE * len(t)))) for g, t in pairs]
    print(
        f"{name:52} Spearman median {np.median(correlations):.3f} least {min(correlations):.3f}   top-{TOP} overlap "
        f"median {np.median(overlaps):.2f} least {min(overlaps):.2f}   recall after an exact stage "
        f"mean {np.mean(recalls):.3f} least {min(recalls):.2f}",
        flush=True,
    )
    stages = np.array([[staged(g, t, seed) for seed in range(CONTROLS)] for g, t in pairs])
    found, rows = stages[..., 0].mean(1), stages[..., 1]
    print(
        f"    gone through as `refine` does it: recall mean {found.mean():.3f} least {found.min():.2f}, "
        f"{rows.mean():.0f} rows, most {rows.max():.0f}",
        flush=True,
    )


def staged(guess: np.ndarray, truth: np.ndarray, seed: int) -> tuple[float, int]:
    """The second stage with exact scores that are there: the share of the true top that it scores, and its rows."""
    rng = np.random.default_rng(seed)
    plan = Plan.of(guess, lambda among, wanted: rng.choice(np.flatnonzero(among), wanted, replace=False))
    exact = np.full(len(truth), np.nan)
    for step in plan.steps():
        done = np.concatenate(plan.pieces[:step])
        exact[done] = truth[done]
        if plan.enough(exact, len(done)):
            break
    known = ~np.isnan(exact)
    return float(known[np.argsort(-truth)[:TOP]].mean()), int(known.sum())


def shared(guess: np.ndarray, truth: np.ndarray, first: int) -> float:
    """The share of the true top rows that are among the first of a guess."""
    return len({*np.argsort(-guess)[:first]} & {*np.argsort(-truth)[:TOP]}) / TOP


@dataclass(frozen=True)
class Question:
    """Two probes and ten SAE features drawn at random, none of them used to choose a setting, and what they are put to."""

    names: Sequence[str]
    sources: Sources
    about: Mapping[str, Any]
    lm: LanguageModel
    layers: Sequence[LinearLayer]
    opened: OpenIndex
    targets: Sequence[Target]
    damping: float

    @classmethod
    def of(cls, root: Path) -> Question:
        audit = Audit(root)
        about, lm, sources = audit.index.describe(), audit.model(), audit.opened.sources()
        live = audit.concepts.features()["feature_id"].to_numpy()
        names = [p.name for p in audit.probes.list()][:2]
        names += [f"sae:{f}" for f in sorted(np.random.default_rng(2026).choice(live, 10, replace=False))]
        # Exact scores here are those of all queries together, so the index's are to be the same.
        options = InfluenceOptions.of(engine="index", leave_out_own=False)
        wanted = [request(sources, audit.concept(n), "concept_influence", options) for n in names]
        targets = [_target(sources, each, lm, Progress()) for each in wanted]
        layers = linear_layers(lm, *about["blocks"], about["weights"])
        damping = wanted[0].options.curvature.damping
        return cls(names, sources, about, lm, layers, OpenIndex(sources, about, Progress()), targets, damping)

    def solved(self) -> list[torch.Tensor]:
        """(H + λI)⁻¹ of the targets' gradients: of each layer [targets, out, in], zero where one does not reach."""
        found: list[list[torch.Tensor]] = [[] for _ in self.layers]
        for target in self.targets:
            solved = self.opened.solved(target, self.damping)
            for i, layer in enumerate(self.layers):
                found[i].append(solved[i] if i < len(solved) else torch.zeros(layer.d_out, layer.d_in))
        return [torch.stack(same) for same in found]


def fidelity(root: Path, random: bool, kept: Path | None) -> None:
    """An index against exact scores.

    Args:
        random: compare with random projections too.
        kept: where exact scores are kept, to be met by other indexes of the same rows and factors.
    """
    question = Question.of(root)
    sources, about, lm = question.sources, question.about, question.lm
    rows, queries = data_of(sources), None
    if kept is not None and kept.exists():
        truth = np.load(kept)
    else:
        queries = question.solved()
        with LineProgress(sys.stdout).stage("Exact scores, float32", len(rows)) as bar:
            truth = score_rows_for_many(lm, question.layers, queries, rows, advance=bar.advance)
        if kept is not None:
            np.save(kept, truth)
    guess = index_scores(sources, about, question.targets, question.damping, Progress())
    told(f"the index: {about['row_bytes'] / 1024:.3g} KiB a row", guess, truth)
    for name, target, g, t in zip(question.names, question.targets, guess.T, truth.T, strict=True):
        print(f"    {name:20} layer {target.reach:3}  {spearmanr(g, t).statistic:.3f}")
    recoded(question, truth)
    if random:
        narrow = lm.in_dtype(getattr(torch, about["precision"]))
        random_projection(narrow, question.layers, queries or question.solved(), rows, truth)


def recoded(question: Question, truth: np.ndarray) -> None:
    """Smaller indexes: the numbers of this one shared out and coded anew for fewer bytes a row, as a build does it.

    They differ from indexes that were built so by what this one's own coding has lost.
    """
    opened, targets = question.opened, question.targets
    codes = Codes.read(opened.files)
    importance = read_tensors(opened.files.sides)["importance"][codes.order]
    spread = codes.spread[codes.order]
    asked = np.zeros((len(codes.spread), len(targets)), np.float32)
    for place, target in enumerate(targets):
        column = opened.compressed(target, question.damping).whole
        asked[: len(column), place] = column
    asked = asked[codes.order]
    sizes = [kib for kib in SIZES if kib * 1024 < codes.packing.row_bytes]
    packings = [order_and_packing(allocate(importance, 8 * 1024 * kib)) for kib in sizes]
    guesses: list[list[np.ndarray]] = [[] for _ in sizes]
    for path in opened.files.paths():
        rows = decoded(path, codes, spread)
        for found, (order, packing) in zip(guesses, packings, strict=True):
            steps, centres = steps_and_centres(packing)
            values, scales = quantise(rows[:, order], spread[order], packing)
            found.append(((values - centres) * (steps * spread[order])) @ asked[order] * scales[:, None])
    for kib, found in zip(sizes, guesses, strict=True):
        told(f"coded anew for {kib} KiB", np.concatenate(found), truth)


def decoded(path: Path, codes: Codes, spread: np.ndarray) -> np.ndarray:
    """What a shard's codes stand for: float32 [rows, packed numbers]."""
    tensors = read_tensors(path)
    steps, centres = steps_and_centres(codes.packing)
    rows = codes.packing.unpack(tensors["codes"], torch.empty(len(tensors["codes"]), codes.packing.numbers)).numpy()
    rows -= centres
    rows *= steps * spread
    rows *= tensors["scales"].numpy()[:, None]
    return rows


def random_projection(lm, layers, queries, rows, truth) -> None:
    """Two-sided Gaussian projections of gradients as they are, the inverse curvature in the query alone."""
    generator = torch.Generator().manual_seed(0)
    most = max(SIDES)
    left = [torch.randn(layer.d_out, most, generator=generator) for layer in layers]
    right = [torch.randn(layer.d_in, most, generator=generator) for layer in layers]
    asked = [L.T @ q @ R for L, q, R in zip(left, queries, right, strict=True)]
    narrow = [(L.to(lm.dtype), R.to(lm.dtype)) for L, R in zip(left, right, strict=True)]
    guesses = {k: np.zeros(truth.shape) for k in SIDES}
    with GradientPass(linear_model := lm, linear_layers(lm, 1, layers[-1].block)) as run:
        for chosen in batches_by_length(rows.spans, gradient_tokens_per_batch(lm)):
            batch = rows.batch(chosen, linear_model)

            def visit(i: int, a: torch.Tensor, delta: torch.Tensor, chosen=chosen) -> None:
                L, R = narrow[i]
                between = ((delta @ L).mT @ (a @ R)).float()
                for k in SIDES:
                    scores = torch.einsum("nij,qij->nq", between[:, :k, :k], asked[i][:, :k, :k]) / k**2
                    guesses[k][chosen] += scores.numpy()

            run.losses(batch, visit)
    for k in SIDES:
        size = k * k * len(layers) * 2 / 1024
        told(f"random projection, {k} × {k} a layer, {size:.0f} KiB (float16)", guesses[k], truth)


def cost(root: Path, count: int) -> None:
    """Projecting a row's gradient against scoring a row exactly, in turns."""
    audit = Audit(root)
    sources, about = audit.opened.sources(), audit.index.describe()
    lm = audit.model().in_dtype(getattr(torch, about["precision"]))
    layers = linear_layers(lm, *about["blocks"], about["weights"])
    rows = data_of(sources)
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    rows = Rows([rows.ids[i] for i in chosen], [rows.response[i] for i in chosen])
    files = OpenIndex(sources, about, Progress()).files
    read = projection_reader(files, layers, lm.device)
    projections = {place: read(place) for place in kept_layers(files, len(layers))}
    query = DenseQueries([[torch.randn(layer.d_out, layer.d_in) for layer in layers]], lm.dtype)
    ratios = []
    for _ in range(3):
        seconds = []
        for run in (lambda: score_rows(lm, layers, query, rows), lambda: compress_rows(lm, layers, projections, rows)):
            started = time.perf_counter()
            for _batch in run():
                pass
            seconds.append((time.perf_counter() - started) / len(rows))
        ratios.append(seconds[1] / seconds[0])
        print(f"exact {seconds[0]:.3f} s a row, index {seconds[1]:.3f} s a row, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {np.median(ratios):.2f} (limit 1.5)")


def synthetic(out: Path, rows: int, packing: Packing) -> IndexFiles:
    files = index_files(Layout(out), "-".join(map(str, ("synthetic", *packing.counts))), RowPartition(rows))
    generator = torch.Generator().manual_seed(0)
    for number in files.rows.missing():
        size = files.rows.partition.size(number)
        codes = torch.randint(-127, 128, (size, packing.row_bytes), dtype=torch.int8, generator=generator)
        files.rows.write_tensors(number, {"codes": codes, "scales": torch.ones(size)})
    return files


def timed_sweep(files: IndexFiles, packing: Packing, queries: int, device: str) -> float:
    asked = np.random.default_rng(0).normal(size=(packing.numbers, queries)).astype(np.float32)
    started = time.perf_counter()
    total = sum(len(block) for block in sweep(files.paths(), asked, packing, device=torch.device(device)))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{total:,} rows × {packing.row_bytes:,} bytes ({packing.numbers:,} numbers), {queries} targets, {device}: "
        f"{seconds:.2f} s, peak {peak:,.0f} MiB",
        flush=True,
    )
    return seconds


def sweeps(out: Path, rows: int, row_bytes: int, two_bit_share: float, device: str) -> None:
    """As shared out by importance: most bytes are of numbers of two bits, most of the others of four."""
    two = int(two_bit_share * row_bytes)
    four = int(0.8 * (row_bytes - two))
    packing = Packing((row_bytes - two - four, 2 * four, 4 * two))
    files = synthetic(out, rows, packing)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        timed_sweep(files, packing, 1, device)
        print("   (from cold disk)")
    except OSError:
        print("cold disk: not allowed to drop the page cache here")
    one = [timed_sweep(files, packing, 1, device) for _ in range(3)]
    many = [timed_sweep(files, packing, 20, device) for _ in range(3)]
    print(f"twenty targets take {np.median(many) / np.median(one):.2f} × the time of one (limit 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["fidelity", "cost", "sweep"])
    parser.add_argument("--audit", type=Path)
    parser.add_argument("--random", action="store_true", help="compare with random projections too")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="where exact scores are kept (.npy)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--bytes", type=int, default=16_384)
    parser.add_argument("--two-bit-share", type=float, default=0.8)
    parser.add_argument("--device", default="cpu", help="of the sweep")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "fidelity":
        fidelity(options.audit, options.random, options.truth)
    elif options.part == "cost":
        cost(options.audit, options.rows or 48)
    else:
        sweeps(options.out, options.rows or 100_000, options.bytes, options.two_bit_share, options.device)


if __name__ == "__main__":
    main()
