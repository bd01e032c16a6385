"""How the memory of the gradient index grows with a model's width and depth.

python tests/benchmarks/index_memory.py [--points 2048x4 4096x4 4096x16 8192x4] [--scale 8] [--scratch DIR]

Each point is a random Llama of a width and so many blocks (MLP 3.5 times the width, a quarter as many key heads as
query heads, a vocabulary of 400) whose index is built on a few short rows, in a process of its own: what it takes at
most beside the loaded weights, step by step, and what its curvature factors take on disk.

Wide models are measured in miniature: all widths are divided by the scale, with the widths at which the index changes
its form (`WIDE`, `KEPT`, `LEFT`, `RIGHT`), and its bounds in bytes by the scale's square. What is held are products of
two widths, so the figures are those of the small model times the square.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

ROWS, TOKENS, SAMPLES, CONCEPTS = 64, 400, 32, 2
SHAPES = {"8B, 32 blocks": (4096, 32), "70B, 80 blocks": (8192, 80)}
HEAD = 16
GIB = 1 << 30


def shrink(scale: int) -> None:
    """Make the index of a model whose widths are so many times less in the image of the large one's."""
    from concept_audit.influence import curvature, learning, projection, reduced_query, scoring, wide
    from concept_audit.model import budgets
    from concept_audit.pipeline import curvature as factors
    from concept_audit.pipeline.index import fidelity, query

    bytes_of = {
        factors: ("GROUP_BYTES_CPU",),
        learning: ("SIDE_BYTES",),
        reduced_query: ("GROUP_BYTES",),
        query: ("GROUP_BYTES",),
        scoring: ("ROW_GRADIENT_BYTES",),
        fidelity: ("QUERY_BYTES",),
        budgets: ("LARGE_GRAPH_BYTES_CPU",),
    }
    widths = {curvature: ("WIDE", "KEPT"), projection: ("LEFT", "RIGHT"), wide: ("SPARE",)}
    widths[budgets] = ("TOKENS_PER_BATCH_CPU",)
    for parts, by in ((bytes_of, scale**2), (widths, scale)):
        for module, names in parts.items():
            for name in names:
                setattr(module, name, getattr(module, name) // by)


def build_audit(width: int, blocks: int, home: Path) -> None:
    """A model of this shape with an audit of it."""
    import torch
    import transformers

    from concept_audit import BuildOptions, ModelOptions, build
    from tests.conftest import SMALL, chat_rows, small_tokenizer, write_jsonl

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": blocks},
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // (4 * HEAD),
        head_dim=HEAD,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(home / "model")
    small_tokenizer().save_pretrained(home / "model")
    rows = write_jsonl(home / "rows.jsonl", chat_rows(ROWS))
    model_options = ModelOptions(str(home / "model"), device="cpu")
    build(BuildOptions(data=str(rows), out=home / "audit", model=model_options, layers=(blocks,), sae="none"))


def resident(name: str) -> int:
    """A figure of this process's memory, in bytes: ``VmRSS`` now, ``VmHWM`` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def build_index(home: Path, scale: int) -> None:
    """Build the index and print what each step takes at most beside what the loaded model does."""
    from concept_audit import Audit, CurvatureOptions, IndexOptions
    from concept_audit.pipeline.index import fidelity
    from concept_audit.progress import Progress, Stage

    shrink(scale)
    fidelity.ALL_CONCEPTS = CONCEPTS
    audit = Audit(home / "audit", device="cpu")
    lm = audit.model()
    for parameter in lm.model.parameters():
        parameter.data = parameter.data.clone()  # in memory of its own, not a file's
    loaded, peaks = resident("VmRSS"), {}
    current = "before"

    def note(name: str) -> None:
        nonlocal current
        peaks[current] = max(peaks.get(current, 0), resident("VmHWM") - loaded)
        current = name.split(" of block")[0].split(",")[0]
        forget_peak()

    class Noting(Progress):
        @contextmanager
        def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Stage]:
            note(name)
            print(name, file=sys.stderr, flush=True)
            with super().stage(name, total, unit) as stage:
                yield stage

    forget_peak()
    options = IndexOptions(
        row_bytes=1024, samples=SAMPLES, curvature=CurvatureOptions(curvature_tokens=TOKENS), precision="float32"
    )
    audit.build_index(options, progress=Noting())
    note("end")
    factors = sum(path.stat().st_size for path in (home / "audit/shards/curvature").glob("*/block-*"))
    projections = sum(path.stat().st_size for path in (home / "audit/shards/index").glob("*/projection-*"))
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    print(json.dumps({"peaks": peaks, "factors": factors, "projections": projections, "weights": weights}))


def measured(width: int, blocks: int, scale: int, scratch: Path) -> dict:
    """A point, in the bytes of the model that it stands for."""
    home = scratch / f"{width}x{blocks}"
    home.mkdir(parents=True)
    for part in ("audit", "index"):
        command = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--points",
            f"{width // scale}x{blocks}",
            "--scratch",
            str(home),
        ]
        command += ["--scale", str(scale)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    shutil.rmtree(home)
    found = json.loads(done.stdout.splitlines()[-1])
    peaks = {name: size * scale**2 for name, size in found.pop("peaks").items()}
    return {"peaks": peaks, **{name: size * scale**2 for name, size in found.items()}}


def law(points: dict[tuple[int, int], dict], value: str, least: int) -> tuple[np.ndarray, dict[str, float]]:
    """Least squares of not negative coefficients: 1, width² (of one block) and width × blocks.

    Args:
        least: width of the narrowest model that is counted; narrow ones have another form.
    """
    from scipy.optimize import nnls

    def terms(width: int, blocks: int) -> list[float]:
        return [1.0, width**2, width * blocks]

    of = {p: max(f["peaks"].values()) if value == "peak" else f[value] for p, f in points.items() if p[0] >= least}
    coefficients, _ = nnls(np.array([terms(*p) for p in of]), np.array(list(of.values()), float))
    return coefficients, {name: float(coefficients @ terms(*shape)) for name, shape in SHAPES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", default=["2048x4", "4096x4", "4096x16", "8192x4"])
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--law-from", type=int, default=4096, help="width of the narrowest model in the law")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--part", choices=["audit", "index"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [(int(width), int(blocks)) for width, blocks in (point.split("x") for point in options.points)]
    if options.part == "audit":
        build_audit(*shapes[0], options.scratch)
        return
    if options.part == "index":
        build_index(options.scratch, options.scale)
        return
    found = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for width, blocks in shapes:
            point = found[width, blocks] = measured(width, blocks, options.scale, Path(scratch))
            steps = "; ".join(f"{name} {size / GIB:.2f}" for name, size in point["peaks"].items())
            print(
                f"width {width}, {blocks} blocks: peak {max(point['peaks'].values()) / GIB:.2f} GiB beside "
                f"{4 * point['weights'] / GIB:.2f} of weights; factors {point['factors'] / GIB:.3f} GiB, projections "
                f"{point['projections'] / GIB:.3f} GiB on disk\n    {steps}",
                flush=True,
            )
    for value in ("peak", "factors", "projections"):
        coefficients, told = law(found, value, options.law_from)
        constant, square, line = coefficients
        print(f"{value}: {constant / GIB:.2f} GiB + {square:.1f} B × width² + {line:.0f} B × width × blocks; {told}")


if __name__ == "__main__":
    main()
