"""What it costs that threads of a product wait for each other, alone and beside somebody else's work.

python tests/benchmarks/waiting.py [--busy 1] [--times 3]

Blocks of matrix products as of a small model's pass over 512 tokens, in bfloat16 with two threads, each time in a
process of its own: with libgomp as it comes, as this package sets it, and with threads that sleep at once; alone, and
beside processes that compute all the time. `one thread` is what the others must not be slower than.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import numpy as np

import concept_audit  # noqa: F401  says how threads wait, before PyTorch is imported

WAYS = {
    "as libgomp comes": {"GOMP_SPINCOUNT": "300000"},
    "as it is set": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SECONDS = 3.0
BUSY = "while True: sum(range(10**6))"


def products() -> None:
    """Print the milliseconds of a pass."""
    import torch

    x = torch.randn(512, 576).bfloat16()
    weights = [(torch.randn(576, 1536).bfloat16(), torch.randn(1536, 576).bfloat16()) for _ in range(8)]

    def passed() -> None:
        y = x
        for up, down in weights:
            y = torch.nn.functional.silu(y @ up) @ down
            y = y / (y.float().square().mean(-1, keepdim=True).sqrt() + 1e-3).to(y)

    passed()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        passed()
        count += 1
    print(1000 * (time.perf_counter() - began) / count)


def measured(way: dict[str, str]) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--one"]
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "2", **way}, stdout=subprocess.PIPE, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        products()
        return
    for beside in (0, asked.busy):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(beside)]
        try:
            # In turns, so that whatever else happens on the machine meets all.
            found = [{name: measured(way) for name, way in WAYS.items()} for _ in range(asked.times)]
        finally:
            for other in others:
                other.kill()
        for name in WAYS:
            milliseconds = [each[name] for each in found]
            low, high = min(milliseconds), max(milliseconds)
            print(f"{beside} beside, {name}: {np.median(milliseconds):.0f} ms ({low:.0f} to {high:.0f})", flush=True)


if __name__ == "__main__":
    main()
