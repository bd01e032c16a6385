"""What exact influence costs: against the forward pass, by method, and in memory.

python tests/benchmarks/influence.py cost --data rows.jsonl [--rows 48] [--layer 15]
python tests/benchmarks/influence.py table1 --data rows.jsonl [--rows 1000]
python tests/benchmarks/influence.py memory --data rows.jsonl
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit.data.read import read_examples
from concept_audit.influence.curvature import LayerCurvature, eigenbasis
from concept_audit.influence.fitting import Covariances, Fisher, SquaredGradients, accumulate
from concept_audit.influence.queries import (
    DenseQueries,
    Loss,
    LowRankQueries,
    NegatedConcept,
    Rows,
    precondition,
    query_gradient,
)
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import Projection
from concept_audit.model.activations import response_activations
from concept_audit.model.batches import batches_by_length
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.generate import answers
from concept_audit.model.linear import linear_layers
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.progress import Progress


def read_rows(lm: LanguageModel, path: str, count: int) -> Rows:
    """Rows drawn at random, the same for a file and a count."""
    renderer = ChatRenderer(lm.tokenizer, 2048)
    rows = [renderer.render(example.messages) for example in read_examples(path)]
    rows = random.Random(0).sample(rows, min(count, len(rows)))
    return Rows([row.input_ids for row in rows], [row.response for row in rows])


def unit(lm: LanguageModel, seed: int = 0) -> np.ndarray:
    direction = np.random.default_rng(seed).normal(size=lm.d_model).astype(np.float32)
    return direction / np.linalg.norm(direction)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(lm: LanguageModel, name: str, n_rows: int, run) -> float:
    """Seconds a row."""
    synchronise(lm.device)
    started = time.perf_counter()
    run()
    synchronise(lm.device)
    seconds = time.perf_counter() - started
    print(f"{name:50} {seconds:8.2f} s  {seconds / n_rows:8.4f} s a row", flush=True)
    return seconds / n_rows


def vector_filter(lm: LanguageModel, rows: Rows, layer: int) -> None:
    for _ in response_activations(lm, rows.ids, rows.response, [layer]):
        pass


def forward_with_loss(lm: LanguageModel, rows: Rows, budget: int = 1024) -> None:
    """The whole model and the head at supervised positions, without a graph."""
    decoder, head = lm.model.get_decoder(), lm.model.get_output_embeddings()
    with torch.inference_mode():
        for chosen in batches_by_length([len(ids) for ids in rows.ids], budget):
            batch = rows.batch(chosen, lm)
            hidden = decoder(input_ids=batch.ids, use_cache=False).last_hidden_state
            mask = batch.response[:, 1:]
            F.cross_entropy(head(hidden[:, :-1][mask]).float(), batch.ids[:, 1:][mask])


def score(lm: LanguageModel, layers, queries, rows: Rows) -> np.ndarray:
    found = np.zeros((len(rows), queries.count))
    for batch in score_rows(lm, layers, queries, rows):
        for row in batch:
            found[row.index] = row.scores
    return found


def fit(lm: LanguageModel, layers, rows: Rows, fisher: Fisher) -> list[LayerCurvature]:
    """EK-FAC on all rows, in memory."""
    keys = list(map(str, range(len(rows))))
    covariances = Covariances(layers, lm.wide_dtype, lm.device)
    accumulate(lm, layers, covariances, rows, keys, fisher)
    shared = {i: eigenbasis(covariances.inputs(i)) for i, layer in enumerate(layers) if layer.source == i}
    outputs = [eigenbasis(covariances.outputs(i)) for i in range(len(layers))]
    sides = [(shared[layer.source], out) for layer, out in zip(layers, outputs, strict=True)]
    bases = [(a.vectors, s.vectors) for a, s in sides]
    squares = SquaredGradients(layers, bases)
    accumulate(lm, layers, squares, rows, keys, fisher)
    return [
        LayerCurvature(a.vectors, s.vectors, squares.eigenvalues(i), a.values, s.values)
        for i, (a, s) in enumerate(sides)
    ]


def cost(lm: LanguageModel, rows: Rows, layer: int, repeats: int) -> None:
    from scipy.stats import spearmanr

    n = len(rows)
    half = lm.in_dtype(torch.bfloat16)
    layers, half_layers = linear_layers(lm, 1, layer), linear_layers(half, 1, layer)
    gradients = [
        query_gradient(
            lm,
            layers,
            NegatedConcept(Projection(layer, unit(lm))),
            Rows(rows.ids[i : i + 1], rows.response[i : i + 1]),
            [1.0],
        )
        for i in range(min(16, n))
    ]
    one, low = DenseQueries(gradients[:1], torch.float32), LowRankQueries(gradients[:1], 64, torch.float32)
    many = LowRankQueries(gradients, 64, torch.float32)
    halved = DenseQueries(gradients[:1], torch.bfloat16)
    print(
        f"{n} rows, {sum(map(len, rows.ids)):,} tokens, layer {layer}; {len(gradients)} queries at rank 64 retain "
        f"{many.retained.min():.4f} of their squared norm at least"
    )
    narrow: list[np.ndarray] = []
    for _ in range(repeats):
        filtered = timed(lm, "vector filter (early exit)", n, lambda: vector_filter(lm, rows, layer))
        forward = timed(lm, "forward pass with loss", n, lambda: forward_with_loss(lm, rows))
        exact = timed(lm, "concept influence, exact, 1 query", n, lambda: score(lm, layers, one, rows))
        lowered = timed(lm, "concept influence, rank 64, 1 query", n, lambda: score(lm, layers, low, rows))
        several = timed(
            lm, f"concept influence, rank 64, {many.count} queries", n, lambda: score(lm, layers, many, rows)
        )
        wide = score(lm, layers, one, rows)[:, 0]
        quick = timed(
            lm,
            "concept influence, exact, 1 query, bfloat16",
            n,
            lambda: narrow.append(score(half, half_layers, halved, rows)[:, 0]),
        )
        print(
            f"exact: {exact / filtered:.2f} x vector filter, {exact / forward:.2f} x forward; rank 64: "
            f"{lowered / filtered:.2f} x and {lowered / forward:.2f} x; {many.count} queries: "
            f"{several / exact:.2f} x one; bfloat16: {exact / quick:.2f} x the speed, Spearman "
            f"{spearmanr(wide, narrow[-1]).statistic:.5f}",
            flush=True,
        )


def table1(lm: LanguageModel, rows: Rows, layer: int) -> None:
    """The four methods of the paper's Table 1; concept influence and influence function with EK-FAC."""
    n = len(rows)
    query = Rows(rows.ids[:16], rows.response[:16])
    weights = [1 / len(query)] * len(query)
    below, every = linear_layers(lm, 1, layer), linear_layers(lm, 1, lm.n_layers)
    few = Rows(rows.ids[:24], rows.response[:24])

    def projection_difference() -> None:
        starts = [int(np.flatnonzero(mask)[0]) for mask in rows.response]
        prompts = [ids[:start] for ids, start in zip(rows.ids, starts, strict=True)]
        made: dict[int, np.ndarray] = {}
        for batch in answers(lm, prompts, 128):
            made |= batch
        own = Rows(
            [np.concatenate([prompt, made[i]]) for i, prompt in enumerate(prompts)],
            [np.arange(len(prompt) + len(made[i])) >= len(prompt) for i, prompt in enumerate(prompts)],
        )
        vector_filter(lm, rows, layer)
        vector_filter(lm, own, layer)

    factors = timed(lm, "EK-FAC factors, blocks below the layer (24 rows)", 24, lambda: fit(lm, below, few, Fisher()))
    curvature = fit(lm, below, few, Fisher())
    solved = precondition(
        query_gradient(lm, below, NegatedConcept(Projection(layer, unit(lm))), query, weights),
        curvature.__getitem__,
        0.1,
    )
    concept = DenseQueries([solved], lm.dtype)
    del curvature
    whole = DenseQueries([query_gradient(lm, every, Loss(), query, weights)], lm.dtype)
    base = timed(lm, "vector filter", n, lambda: vector_filter(lm, rows, layer))
    rest = {
        "projection difference": timed(lm, "projection difference", n, projection_difference),
        "concept influence": timed(lm, "concept influence", n, lambda: score(lm, below, concept, rows)),
        "influence function": timed(lm, "influence function (all blocks)", n, lambda: score(lm, every, whole, rows)),
    }
    print(
        f"{n} rows; relative to vector filter: "
        + ", ".join(f"{k} {v / base:.1f}" for k, v in rest.items())
        + f"; EK-FAC factors {factors / base:.1f} a row that they are fitted on"
    )


def memory(options: argparse.Namespace) -> None:
    """Peak resident memory of scoring, over that of the loaded model, in a process for each size."""
    for precision in ("float32", "bfloat16"):
        for count in (40, 160):
            command = [
                sys.executable,
                __file__,
                "peak",
                "--data",
                options.data,
                "--cache",
                str(options.cache),
                "--rows",
                str(count),
                "--layer",
                str(options.layer),
                "--precision",
                precision,
            ]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), flush=True)


def peak(options: argparse.Namespace, lm: LanguageModel) -> None:
    rows = read_rows(lm, options.data, options.rows)
    loaded = resident()
    layers = linear_layers(lm, 1, options.layer)
    gradient = query_gradient(
        lm,
        layers,
        NegatedConcept(Projection(options.layer, unit(lm))),
        Rows(rows.ids[:4], rows.response[:4]),
        [0.25] * 4,
    )
    scorer = lm.in_dtype(getattr(torch, options.precision))
    queries = DenseQueries([gradient], scorer.dtype)
    del gradient
    score(scorer, linear_layers(scorer, 1, options.layer), queries, rows)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.precision}, {len(rows)} rows: {loaded:,.0f} MiB with the model loaded, peak {highest:,.0f} MiB, "
        f"{highest - loaded:+,.0f} MiB"
    )


def resident() -> float:
    """Resident memory now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "table1", "memory", "peak"])
    parser.add_argument("--data")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    if options.part == "memory":
        return memory(options)
    lm = load_model(ModelOptions(options.model, dtype="float32"), options.cache, Progress())
    if options.part == "peak":
        return peak(options, lm)
    rows = read_rows(lm, options.data, options.rows)
    if options.part == "cost":
        return cost(lm, rows, options.layer, options.repeats)
    return table1(lm, rows, options.layer)


if __name__ == "__main__":
    main()
