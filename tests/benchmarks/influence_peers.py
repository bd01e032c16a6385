"""Agreement with, and speed against, kronfluence and the published procedure.

All sides score the same rows with the same weights and the same query, in turns, in
one process. The published procedure is one row at a time, padded to 1,536 tokens,
with a dense gradient of every tracked weight.

    pip install --no-deps kronfluence einconv opt-einsum einops
    python tests/benchmarks/influence_peers.py --data rows.jsonl --rows 48 --layer 15 --parts agreement,speed
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit.influence.fitting import Fisher
from concept_audit.influence.queries import (
    DenseQueries,
    LowRankQueries,
    NegatedConcept,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.progress import Progress
from tests.benchmarks.influence import fit, read_rows, score
from tests.peers import kronfluence_scores

DAMPING = 0.1


def scores(lm: LanguageModel, layers, queries, rows: Rows) -> np.ndarray:
    return score(lm, layers, queries, rows)[:, 0]


def published(lm: LanguageModel, layers, query, rows: Rows, length: int | None) -> np.ndarray:
    """One row at a time, a dense gradient of every tracked weight, then the inner product."""
    weights = [layer.module.weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    found = []
    try:
        for ids, response in zip(rows.ids, rows.response, strict=True):
            padded = max(length or 0, len(ids))
            tokens = torch.zeros(1, padded, dtype=torch.long)
            mask = torch.zeros(1, padded, dtype=torch.long)
            labels = torch.full((1, padded), -100)
            tokens[0, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask[0, : len(ids)] = 1
            labels[0, : len(ids)][torch.from_numpy(response)] = tokens[0, : len(ids)][torch.from_numpy(response)]
            logits = lm.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), labels[0, 1:], ignore_index=-100)
            gradients = torch.autograd.grad(loss, weights)
            found.append(sum(float((g * q).sum()) for g, q in zip(gradients, query, strict=True)))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return np.array(found)


def timed(name: str, n_rows: int, run):
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    print(f"{name:45} {seconds:8.2f} s  {seconds / n_rows:7.3f} s a row", flush=True)
    return result, seconds / n_rows


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--parts", default="agreement,factors,speed")
    options = parser.parse_args()
    lm = load_model(ModelOptions(options.model, dtype="float32"), options.cache, Progress())
    rows = read_rows(lm, options.data, options.rows)
    layers = linear_layers(lm, 1, options.layer)
    names = [layer.name for layer in layers]
    direction = np.random.default_rng(0).normal(size=lm.d_model).astype(np.float32)
    direction /= np.linalg.norm(direction)
    query = Rows(rows.ids[:4], rows.response[:4])
    target = NegatedConcept(Projection(options.layer, direction))
    gradient = query_gradient(lm, layers, target, query, [0.25] * 4)
    peer = dict(lm=lm, names=names, layer=options.layer, direction=direction, query=query, rows=rows, damping=DAMPING)
    n = len(rows)
    if "agreement" in options.parts:
        theirs = kronfluence_scores(strategy="identity", **peer)
        ours = scores(lm, layers, DenseQueries([gradient], torch.float32), rows)
        print(
            f"identity: Spearman {spearman(ours, theirs.scores):.5f}, "
            f"largest relative difference {np.max(np.abs(ours / theirs.scores - 1)):.2e}",
            flush=True,
        )
        theirs = kronfluence_scores(strategy="ekfac", **peer)
        curvature, seconds = timed("EK-FAC factors, ours", n, lambda: fit(lm, layers, rows, Fisher("empirical")))
        print(
            f"{'EK-FAC factors, kronfluence':45} {theirs.factor_seconds:8.2f} s; theirs / ours "
            f"{theirs.factor_seconds / (seconds * n):.2f}",
            flush=True,
        )
        solved = precondition(gradient, curvature.__getitem__, DAMPING)
        exact = scores(lm, layers, DenseQueries([solved], torch.float32), rows)
        print(f"EK-FAC (empirical Fisher): Spearman {spearman(exact, theirs.scores):.5f}", flush=True)
        half = lm.in_dtype(torch.bfloat16)
        found = scores(half, linear_layers(half, 1, options.layer), DenseQueries([solved], torch.bfloat16), rows)
        print(f"EK-FAC, scored in bfloat16 against float32: Spearman {spearman(found, exact):.5f}", flush=True)
        for rank in (16, 64, 128):
            low = LowRankQueries([solved], rank, torch.float32)
            found = scores(lm, layers, low, rows)
            print(
                f"EK-FAC, rank {rank} (retains {low.retained[0]:.4f}): Spearman {spearman(found, exact):.5f}",
                flush=True,
            )
    if "factors" in options.parts:
        _, seconds = timed("EK-FAC factors, ours", n, lambda: fit(lm, layers, rows, Fisher("empirical")))
        theirs = kronfluence_scores(strategy="ekfac", **peer).factor_seconds / n
        print(f"EK-FAC factors, kronfluence: {theirs:.3f} s a row, {theirs / seconds:.2f} x ours", flush=True)
    if "speed" in options.parts:
        dense = DenseQueries([gradient], torch.float32)
        low = LowRankQueries([gradient], 64, torch.float32)
        half = lm.in_dtype(torch.bfloat16)
        halves, half_layers = DenseQueries([gradient], torch.bfloat16), linear_layers(half, 1, options.layer)
        few = Rows(rows.ids[:8], rows.response[:8])
        for _ in range(options.repeats):
            _, ours = timed("ours, float32", n, lambda: scores(lm, layers, dense, rows))
            _, ours_low = timed("ours, float32, rank 64", n, lambda: scores(lm, layers, low, rows))
            _, ours_default = timed("ours, default (bfloat16)", n, lambda: scores(half, half_layers, halves, rows))
            theirs = kronfluence_scores(strategy="identity", **peer).score_seconds / n
            theirs_low = kronfluence_scores(strategy="identity", rank=64, **peer).score_seconds / n
            padded, padded_each = timed(
                "published, padded to 1,536 (8 rows)", 8, lambda: published(lm, layers, gradient, few, 1536)
            )
            bare, bare_each = timed(
                "published, no padding (8 rows)", 8, lambda: published(lm, layers, gradient, few, None)
            )
            _, ours_few = timed("ours, float32 (the same 8 rows)", 8, lambda: scores(lm, layers, dense, few))
            _, ours_few_default = timed(
                "ours, default (the same 8 rows)", 8, lambda: scores(half, half_layers, halves, few)
            )
            reference = scores(lm, layers, dense, few)
            print(f"published against ours: largest relative difference {np.max(np.abs(padded / reference - 1)):.2e}")
            print(
                f"kronfluence {theirs:.3f} s a row: {theirs / ours:.2f} x ours; at rank 64 {theirs_low:.3f}: "
                f"{theirs_low / ours_low:.2f} x; against the default {theirs / ours_default:.2f} x and "
                f"{theirs_low / ours_default:.2f} x"
            )
            print(
                f"published, padded: {padded_each / ours_few:.1f} x ours in float32, "
                f"{padded_each / ours_few_default:.1f} x the default; without padding "
                f"{bare_each / ours_few:.2f} x and {bare_each / ours_few_default:.2f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
