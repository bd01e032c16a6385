"""Peak memory of a build, and of one with four times the rows.

python tests/benchmarks/memory.py --data rows.jsonl [--cache cache]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def build_one(data: Path, out: Path, cache: Path, model: str) -> None:
    """Build an audit in this process and print its peak memory in bytes."""
    from concept_audit import BuildOptions, ModelOptions, build
    from concept_audit.concepts.options import SaeTraining

    build(
        BuildOptions(
            data=str(data),
            out=out,
            model=ModelOptions(model),
            cache=cache,
            layers=(2, 4, 6),
            sae_training=SaeTraining(epochs=2),
        )
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def enlarged(rows: list[str], times: int) -> list[str]:
    """Each row several times, told apart by a number in its first turn."""
    made = []
    for copy in range(times):
        for line in rows:
            row = json.loads(line)
            row["messages"][0]["content"] += f" ({copy})" if copy else ""
            made.append(json.dumps(row, ensure_ascii=False) + "\n")
    return made


def peak(rows: list[str], name: str, scratch: Path, options: argparse.Namespace) -> int:
    """Peak memory in bytes of a build of these rows, in a process of its own."""
    data = scratch / f"{name}.jsonl"
    data.write_text("".join(rows), "utf-8")
    command = [sys.executable, __file__, "--one", str(data), "--out", str(scratch / name)]
    command += ["--cache", str(options.cache), "--model", options.model, "--data", str(data)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        build_one(options.one, options.out, options.cache, options.model)
        return
    rows = options.data.read_text("utf-8").splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as scratch:
        small = peak(rows, "small", Path(scratch), options)
        large = peak(enlarged(rows, 4), "large", Path(scratch), options)
    print(f"{len(rows)} rows: {small / 2**20:,.0f} MiB; {4 * len(rows)} rows: {large / 2**20:,.0f} MiB")
    print(f"ratio {large / small:.3f}")


if __name__ == "__main__":
    main()
