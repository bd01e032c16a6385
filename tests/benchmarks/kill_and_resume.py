"""Kill a build three times at random moments, let it go on, and compare the store with an undisturbed one.

python tests/benchmarks/kill_and_resume.py --data rows.jsonl [--seed 0] [--layers 8,12,16]
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb

KILLS = 3


def command(options: argparse.Namespace, out: Path) -> list[str]:
    """The build, as a user would type it."""
    made = [sys.executable, "-m", "concept_audit.cli", "build", "--data", str(options.data), "--out", str(out)]
    return [*made, "--model", options.model, "--cache", str(options.cache), "--layers", options.layers]


def run_to_the_end(options: argparse.Namespace, out: Path) -> float:
    """Seconds that the build took."""
    start = time.perf_counter()
    subprocess.run(command(options, out), check=True, capture_output=True)
    return time.perf_counter() - start


def kill_after(options: argparse.Namespace, out: Path, seconds: float) -> str:
    """Start the build, kill it, and say what it was doing."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command(options, out), stderr=log)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.seek(0)
        return log.read().strip().splitlines()[-1]


def differing_tables(first: Path, second: Path) -> list[str]:
    """Tables of the two stores that differ in any row or value."""
    con = duckdb.connect()
    for name, root in (("a", first), ("b", second)):
        con.execute(f"ATTACH '{root / 'audit.duckdb'}' AS {name} (READ_ONLY)")
    tables = con.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = 'a' AND schema_name = 'base' ORDER BY 1"
    ).fetchall()
    return [
        table
        for (table,) in tables
        if con.execute(
            f"""SELECT count(*) FROM (
                    (FROM a.base.{table} EXCEPT ALL FROM b.base.{table})
                    UNION ALL (FROM b.base.{table} EXCEPT ALL FROM a.base.{table}))"""
        ).fetchone()[0]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--layers", default="8,12,16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        whole = run_to_the_end(options, undisturbed)
        print(f"undisturbed: {whole:.0f} s")
        for moment in sorted(chance.uniform(0.1, 0.9) for _ in range(KILLS)):
            # Each start goes on from the last, so it is killed after a share of the whole by itself.
            seconds = max(whole * moment / 2, 4.0)
            print(f"killed after {seconds:.0f} s at: {kill_after(options, killed, seconds)}")
        print(f"the rest: {run_to_the_end(options, killed):.0f} s")
        differing = differing_tables(undisturbed, killed)
    print("the stores are equal" if not differing else f"DIFFERENT: {', '.join(differing)}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
