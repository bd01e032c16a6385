"""How near the activation pass comes to the bare model.

The peer is the truncated model by itself, which no pass can beat: its first blocks
run on the same number of tokens in ideal batches, all rows of one length, nothing
padded and nothing kept. Both run in turns in one process, in the same dtype.

    python tests/benchmarks/activation_pass.py --data rows.jsonl [--layers 8,12,16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from concept_audit.data.read import read_examples
from concept_audit.model.activations import response_activations, tokens_per_batch
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.progress import Progress


def bare_seconds(lm: LanguageModel, n_tokens: int, length: int, deepest: int) -> tuple[float, int]:
    """Seconds of the first `deepest` blocks on rows of equal length, and the tokens that it ran."""
    rows = max(1, tokens_per_batch(lm.device) // length)
    batches = max(1, round(n_tokens / (rows * length)))
    generator = torch.Generator().manual_seed(0)
    vocabulary = lm.model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator).to(lm.device)
    decoder = lm.model.get_decoder()
    blocks = decoder.layers
    decoder.layers = nn.ModuleList(blocks[:deepest])
    try:
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(batches):
                decoder(input_ids=ids, use_cache=False)
            _wait(lm)
            return time.perf_counter() - start, batches * rows * length
    finally:
        decoder.layers = blocks


def pass_seconds(lm: LanguageModel, ids: Sequence[np.ndarray], response, layers: Sequence[int]) -> float:
    """Seconds of the activation pass over all rows."""
    start = time.perf_counter()
    for _ in response_activations(lm, ids, response, layers):
        pass
    _wait(lm)
    return time.perf_counter() - start


def _wait(lm: LanguageModel) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--layers", default="8,12,16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    layers = [int(layer) for layer in options.layers.split(",")]
    lm = load_model(ModelOptions(options.model), options.cache, Progress())
    renderer = ChatRenderer(lm.tokenizer, min(lm.context, 2048))
    rows = [renderer.render(example.messages) for example in read_examples(options.data)]
    ids, response = [row.input_ids for row in rows], [row.response for row in rows]
    n_tokens = sum(map(len, ids))
    length = round(n_tokens / len(ids))
    pass_seconds(lm, ids[:16], response[:16], layers)
    ratios = []
    for _ in range(options.repeats):
        bare, bare_tokens = bare_seconds(lm, n_tokens, length, max(layers))
        ours = pass_seconds(lm, ids, response, layers)
        ratios.append((n_tokens / ours) / (bare_tokens / bare))
        print(f"pass {n_tokens / ours:,.0f} tokens/s, bare {bare_tokens / bare:,.0f} tokens/s, ratio {ratios[-1]:.3f}")
    print(f"{len(ids)} rows, {n_tokens:,} tokens: median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
