"""What an engine costs, and what several workers bring: one stage by each in turns.

The stage is the pass over the model (mean activations of every row), the heaviest of a build without an SAE. Every
process is warm: the model is loaded and a first round is thrown away. Each round does all shards anew by this process,
by one worker of Ray and by two (`--workers 1,2`); all with one thread. Ratios are of the same round.

    python -m tests.benchmarks.engines --rounds 7
    python -m tests.benchmarks.engines --simulate 2.5,2.6,2.4 --overhead 0.01

`--simulate` shares out the shards of 100,000 and of 1,000,000 rows among up to 64 workers as the engine does (who is
free takes the largest that is left), with the given seconds for a shard of 256 rows, drawn anew for each, and a share of
stragglers that take several times as long. It knows nothing of a network or of a disk that many machines share.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from concept_audit import BuildOptions, ModelOptions, build
from concept_audit.model.load import LanguageModel, load_model
from concept_audit.model.options import ModelSource
from concept_audit.pipeline.activations import RunningModel
from concept_audit.pipeline.engine import Driver, Engine, LocalEngine, Worker
from concept_audit.pipeline.engines.on_ray import RayEngine
from concept_audit.progress import Progress
from concept_audit.store.layout import Layout
from concept_audit.store.manifest import read_manifest
from concept_audit.store.partition import ListedPartition, RowPartition
from concept_audit.store.shard_store import ShardSet
from tests.conftest import chat_rows, small_tokenizer, write_jsonl

LAYERS = (2, 4)
EMPTY = 200
STRAGGLERS, SLOWER = 0.05, 3.0
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def stage(place: Path, rows: int, width: int) -> tuple[RunningModel, LanguageModel]:
    """A pass over rows that are tokens already, with a random model of 4 blocks."""
    configuration = LlamaConfig(
        vocab_size=400,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configuration).save_pretrained(place / "model")
    small_tokenizer().save_pretrained(place / "model")
    data = write_jsonl(place / "rows.jsonl", chat_rows(rows))
    model = ModelOptions(str(place / "model"), "cpu", "float32")
    root = build(BuildOptions(str(data), place / "audit", model, layers=LAYERS, sae="none"))
    manifest, layout = read_manifest(Layout(root).manifest), Layout(root)
    lm = load_model(model, place, Progress())
    source = ModelSource(model, place, lm.fingerprint)
    work = RunningModel(manifest.shards(layout, "tokens"), manifest.shards(layout, "activations"), source, LAYERS)
    return work, lm


@dataclass(frozen=True)
class Nothing:
    """Shards that take no time to make: what is left is handing them out, and writing a small file."""

    made: ShardSet

    @property
    def outputs(self) -> tuple[ShardSet, ...]:
        return (self.made,)

    def open(self, worker: Worker) -> None:
        return None

    def run(self, opened: None, number: int) -> None:
        self.made.write_tensors(number, {"nothing": torch.zeros(1)})


def handing_out(engine: Engine, work: RunningModel, key: str) -> float:
    """Seconds a shard."""
    made = ShardSet(work.means.store, "nothing", key, ListedPartition((1,) * EMPTY))
    started = time.perf_counter()
    Driver(engine).finish(Nothing(made), key, dict.fromkeys(range(EMPTY), 1))
    return (time.perf_counter() - started) / EMPTY


def seconds(engine: Engine, work: RunningModel, key: str) -> float:
    """Of doing every shard, under a key of its own."""
    work = replace(work, means=replace(work.means, key=key))
    started = time.perf_counter()
    Driver(engine).finish(work, key, work.tokens.partition.sizes())
    spent = time.perf_counter() - started
    work.means.store.remove(work.means.kind, key)
    return spent


def measured(rounds: int, rows: int, width: int, workers: Sequence[int]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        # Room for the workers of both engines; those that are not asked for anything take no time.
        ray.init(num_cpus=sum(workers), include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
        work, lm = stage(Path(place), rows, width)
        shards = len(work.tokens.partition)
        with ExitStack() as stack:
            engines: dict[str, Engine] = {"local": LocalEngine(lambda _: lm)}
            engines |= {f"{count} on Ray": stack.enter_context(RayEngine(workers=count)) for count in workers}
            for name, engine in engines.items():
                seconds(engine, work, f"warm-{name}")
            found: dict[str, list[float]] = {name: [] for name in engines}
            empty: dict[str, list[float]] = {name: [] for name in engines}
            for number in range(rounds):
                # Not in the same order every time: what runs second may find the machine otherwise.
                for name in random.Random(number).sample(list(engines), len(engines)):
                    found[name].append(seconds(engines[name], work, f"{name}-{number}"))
                for name, engine in engines.items():
                    empty[name].append(handing_out(engine, work, f"{name}-{number}"))
                print({name: round(times[-1], 2) for name, times in found.items()}, flush=True)
    print(f"{rows:,} rows, {shards} shards; seconds, median: ", {n: statistics.median(t) for n, t in found.items()})
    for name in list(found)[1:]:
        shown(f"{name} / local", found[name], found["local"])
    for name, times in empty.items():
        print(f"a shard of nothing, {name}: median {1e3 * statistics.median(times):.1f} ms")


def shown(name: str, above: Sequence[float], below: Sequence[float]) -> None:
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    print(f"{name}: median {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def simulate(shard_seconds: Sequence[float], overhead: float, rows: int) -> None:
    partition = RowPartition(rows)
    chance = random.Random(0)
    costs = []
    for size in sorted(partition.sizes().values(), reverse=True):
        slow = SLOWER if chance.random() < STRAGGLERS else 1.0
        costs.append(chance.choice(shard_seconds) * size / 256 * slow)
    print(f"{rows:,} rows in {len(costs)} shards of {min(costs):.1f} to {max(costs):.1f} s")
    for workers in WORKERS:
        free = [0.0] * workers
        for cost in costs:
            heapq.heappush(free, heapq.heappop(free) + overhead + cost)
        speed = sum(costs) / max(free)
        print(f"  {workers} workers: {speed:.1f} times one ({speed / workers:.0%} of what they could)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--workers", default="1,2", help="numbers of workers on Ray")
    parser.add_argument("--simulate", help="seconds of shards of 256 rows, as measured")
    parser.add_argument("--overhead", type=float, default=0.01, help="seconds that handing out a shard takes")
    options = parser.parse_args()
    if options.simulate:
        for rows in (100_000, 1_000_000):
            simulate([float(text) for text in options.simulate.split(",")], options.overhead, rows)
    else:
        measured(options.rounds, options.rows, options.width, [int(text) for text in options.workers.split(",")])


if __name__ == "__main__":
    main()
