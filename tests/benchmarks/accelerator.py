"""What the passes and the index cost on an accelerator, for a model of 8B's shape with random weights.

python tests/benchmarks/accelerator.py passes [--rows 512] [--tokens 400] [--blocks 32] [--layer 17]
python tests/benchmarks/accelerator.py index --scratch DIR [--rows 512] [--tokens 400] [--blocks 32] [--layer 17]

`passes` gives the share of the card's own peak, measured by a product of two large matrices in bfloat16, that the
products with the model's weights amount to: what attention, the head's softmax and the query's products take beside
them is not counted as work. `index` builds an audit of such a model and its gradient index by the commands' own ways, and
ranks by a probe of which nothing was known: seconds of every step, and the memory that it takes on the card at most.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit import (
    Audit,
    BuildOptions,
    IndexOptions,
    InfluenceOptions,
    LabelledExample,
    Message,
    ModelOptions,
    build,
)
from concept_audit.influence.projection import LEFT, RIGHT, LayerProjection, compress_rows
from concept_audit.influence.queries import DenseQueries, NegatedConcept, Rows, query_gradient
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import Projection
from concept_audit.model.linear import linear_layers, n_weights
from concept_audit.model.load import LanguageModel, as_language_model
from concept_audit.progress import Progress, Stage
from tests.benchmarks.influence import forward_with_loss, synchronise, unit, vector_filter
from tests.conftest import chat_rows, sentence, small_tokenizer, write_jsonl

GIB = 1 << 30
WIDTH, MLP, VOCABULARY = 4096, 14336, 128_256
KEPT = 7 / 400
"""Of the numbers between the sides: 51,170 of 17 blocks of 8B's shape."""


def random_model(blocks: int, device: torch.device, width: int, vocabulary: int) -> torch.nn.Module:
    """Llama 3 8B's shape, so many blocks of it, or the same at another width."""
    import transformers as hf

    torch.manual_seed(0)
    with torch.device(device):
        config = hf.LlamaConfig(
            hidden_size=width,
            intermediate_size=width * MLP // WIDTH,
            num_hidden_layers=blocks,
            num_attention_heads=width // 128,
            num_key_value_heads=max(1, width // 512),
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        return hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def peak_rate(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a product of two large matrices in bfloat16."""
    if device.type == "cpu":
        size = 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    best = 0.0
    for _ in range(3):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        synchronise(device)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def highest(device: torch.device) -> float:
    """Taken on the card at most since `forget_peak`, in GiB."""
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")


def data(rows: int, tokens: int, vocabulary: int) -> Rows:
    """Rows of one length, two thirds of each the response."""
    ids = [np.random.default_rng(i).integers(3, vocabulary, tokens) for i in range(rows)]
    return Rows(ids, [np.arange(tokens) >= tokens // 3] * rows)


def projections(lm: LanguageModel, layers) -> list[LayerProjection]:
    """Random ones in the form of an index's."""
    made = []
    for layer in layers:
        left, right = min(LEFT, layer.d_out), min(RIGHT, layer.d_in)
        sides = [
            torch.randn(size, kept, device=lm.device, dtype=lm.dtype)
            for size, kept in ((layer.d_out, left), (layer.d_in, right))
        ]
        numbers = left * right
        places = torch.randperm(numbers, device=lm.device)[: int(KEPT * numbers)].sort().values
        made.append(LayerProjection(*sides, *sides, places))
    return made


def passes(lm: LanguageModel, rows: Rows, layer: int) -> None:
    peak = peak_rate(lm.device)
    tokens = sum(map(len, rows.ids))
    layers = linear_layers(lm, 1, layer)
    block = sum(layer.d_in * layer.d_out for layer in linear_layers(lm, 1, 1))
    head = lm.model.get_output_embeddings().weight.numel() * sum(map(sum, rows.response)) / tokens
    tracked, every = n_weights(layers), lm.n_layers * block
    print(
        f"{len(rows)} rows, {tokens:,} tokens; {lm.n_layers} blocks, layer {layer}; matrix products at "
        f"{peak / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    few = Rows(rows.ids[:8], rows.response[:8])
    query = query_gradient(lm, layers, NegatedConcept(Projection(layer, unit(lm))), few, [1 / 8] * 8)
    queries = DenseQueries([query], lm.dtype)
    del query
    made = projections(lm, layers)
    numbers = sum(len(p.places) for p in made)
    # Weights that a token meets: once forward; once more where gradients flow; the query's or the sides' beside them.
    sides = sum(left.numel() + right.numel() for left, right in ((p.row_left, p.row_right) for p in made))
    measured: dict[str, tuple[float, Callable[[Rows], None]]] = {
        "activation pass": (tracked, lambda part: vector_filter(lm, part, layer)),
        "forward with loss": (every + head, lambda part: forward_with_loss(lm, part, 16384)),
        "exact scores, one query": (
            2 * every + 2 * head + tracked,
            lambda part: run_all(score_rows(lm, layers, queries, part)),
        ),
        "the same, norms too": (
            2 * every + 2 * head + tracked,
            lambda part: run_all(score_rows(lm, layers, queries, part, unit_normalised=True)),
        ),
        f"index rows, {numbers:,} numbers": (
            2 * every + 2 * head + sides,
            lambda part: run_all(compress_rows(lm, layers, dict(enumerate(made)), part)),
        ),
    }
    warm = Rows(rows.ids[: max(1, len(rows) // 8)], rows.response[: max(1, len(rows) // 8)])
    for name, (weights, run) in measured.items():
        run(warm)
        synchronise(lm.device)
        forget_peak(lm.device)
        started = time.perf_counter()
        run(rows)
        synchronise(lm.device)
        seconds = time.perf_counter() - started
        print(
            f"{name:32} {seconds:7.2f} s {tokens / seconds:10,.0f} tokens/s {2 * weights * tokens / seconds / peak:6.1%} "
            f"of the peak, {highest(lm.device):.1f} GiB at most",
            flush=True,
        )


def run_all(batches: Iterator[object]) -> None:
    for _ in batches:
        pass


class Steps(Progress):
    """Seconds of every step, and what it takes on the card at most."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"    ({text})", flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
        synchronise(self._device)
        forget_peak(self._device)
        started = time.perf_counter()
        between, stage = started - self._last, Stage(name, total, unit)
        yield stage
        synchronise(self._device)
        self._last = time.perf_counter()
        print(
            f"{name:48} {self._last - started:7.2f} s (and {between:.2f} before), {stage.done:,} {unit}, "
            f"{highest(self._device):.1f} GiB at most",
            flush=True,
        )


def index(home: Path, rows: int, tokens: int, blocks: int, layer: int, width: int, vocabulary: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model = random_model(blocks, device, width, vocabulary)
    model.save_pretrained(home / "model", max_shard_size="2GB")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    del model
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(home / "model")
    print(f"model of {weights / GIB:.1f} GiB written in {time.perf_counter() - started:.0f} s", flush=True)
    made = [with_answer(row, number, tokens) for number, row in enumerate(chat_rows(rows))]
    progress = Steps(device)
    build(
        BuildOptions(
            data=str(write_jsonl(home / "rows.jsonl", made)),
            out=home / "audit",
            model=ModelOptions(str(home / "model"), dtype="bfloat16"),
            layers=(layer,),
            sae="none",
        ),
        progress,
    )
    audit = Audit(home / "audit", progress)
    audit.probes.train("drawn", examples(24), progress=progress)
    begun = time.perf_counter()
    about = audit.build_index(IndexOptions(), progress=progress)
    print(f"index in {time.perf_counter() - begun:.0f} s; {about['fidelity']}", flush=True)
    for kind in ("curvature", "index"):
        files = [path for path in (home / "audit/shards" / kind).rglob("*") if path.is_file()]
        print(f"{kind}: {sum(path.stat().st_size for path in files) / GIB:.2f} GiB on disk", flush=True)
    audit.probes.train("later", examples(24, seed=5), progress=progress)
    for name in ("drawn", "later"):
        begun = time.perf_counter()
        audit.rankings.ensure(name, "concept_influence", progress=progress)
        print(f"influence of {name} by the index: {time.perf_counter() - begun:.2f} s", flush=True)
    begun = time.perf_counter()
    audit.rankings.ensure("later", "concept_influence", InfluenceOptions.of(engine="exact"), progress=progress)
    print(f"the same, exactly: {time.perf_counter() - begun:.2f} s", flush=True)


def with_answer(row: dict, number: int, tokens: int) -> dict:
    """A row with an answer of about so many tokens, four of five words being one token with its space."""
    answer = sentence(random.Random(number), tokens * 3 // 5)
    return {**row, "messages": [row["messages"][0], {"role": "assistant", "content": answer}]}


def examples(count: int, seed: int = 1) -> list[LabelledExample]:
    rows = chat_rows(count, seed)
    messages = (tuple(Message(m["role"], m["content"]) for m in row["messages"]) for row in rows)
    return [LabelledExample(mine, number % 2) for number, mine in enumerate(messages)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["passes", "index"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--layer", type=int, default=17)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--scratch", type=Path, help="where the model and the audit are written")
    options = parser.parse_args()
    if options.part == "index":
        return index(
            options.scratch,
            options.rows,
            options.tokens,
            options.blocks,
            options.layer,
            options.width,
            options.vocabulary,
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__)
    model = random_model(options.blocks, device, options.width, options.vocabulary)
    lm = as_language_model("llama-random", model, small_tokenizer())
    passes(lm, data(options.rows, options.tokens, options.vocabulary), options.layer)


if __name__ == "__main__":
    main()
