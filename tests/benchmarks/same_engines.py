"""Whether an audit of real data is the same, whoever does the work and wherever its shards lie.

python tests/benchmarks/same_engines.py --data FILE --layer 8 --workers 1 2 4 [--storage] [--cache cache]

One process builds the audit; then so do workers of a Ray cluster on this machine, each on a machine of its own as Ray
sees it (`ray.cluster_utils`), and once two workers that put their shards into a local S3 server. Every process has one
thread, since the order of sums depends on their number. Told is whether each table and each shard is that of the one
process, bit for bit, and how long each build took.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from concept_audit.store.published import directory_of
from tests.backend.store.objects import BUCKET, serving
from tests.faults.material import contents, differing

OBJECTS = 80 << 20
STORED_BY = 2
"""Workers of the build into storage."""


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """A head that does no work, and so many machines of one processor; yields the address."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "object_store_memory": OBJECTS, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(workers):
            found.add_node(num_cpus=1, object_store_memory=OBJECTS)
        yield found.address
    finally:
        found.shutdown()


@dataclass(frozen=True)
class Builds:
    """Builds of one audit; each is in a directory of its own."""

    asked: argparse.Namespace
    place: Path

    def build(self, out: str, *more: str) -> float:
        """Build; returns seconds."""
        asked = self.asked
        words = [sys.executable, "-m", "concept_audit.cli", "build", "--data", str(asked.data), "--model", asked.model]
        words += ["--cache", str(asked.cache), "--out", out, "--layers", str(asked.layer), "--device", "cpu"]
        words += ["--sae-layer", str(asked.layer), "--sae-features", "1", "--sae-epochs", "1", "--threads", "1"]
        began = time.monotonic()
        done = subprocess.run([*words, *more], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return time.monotonic() - began

    def on_ray(self, workers: int) -> tuple[Path, float]:
        out = self.place / f"ray-{workers}"
        with cluster(workers) as address:
            return out, self.build(str(out), *_by(address, workers))

    def stored(self) -> tuple[Path, float]:
        """In storage, which a worker reaches by network alone; what this process keeps lies beside it."""
        out = f"s3://{BUCKET}/audit"
        with serving() as (_, url):
            # Before the cluster begins: workers have the environment of their machine.
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
            os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
            with cluster(STORED_BY) as address:
                seconds = self.build(out, *_by(address, STORED_BY))
        return directory_of(out, self.asked.cache), seconds


def _by(address: str, workers: int) -> tuple[str, ...]:
    return ("--engine", "ray", "--ray-address", address, "--workers", str(workers))


def shards(root: Path) -> dict[str, str]:
    """Numbered shards → a hash of their bytes."""
    paths = [path for path in (root / "shards").rglob("*") if path.stem.isdigit()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def compared(root: Path, expected: Path) -> str:
    """What two audits have in common, in words; of one in storage, those of its shards that lie here."""
    made, wanted = shards(root), shards(expected)
    if root.parent != expected.parent:
        wanted = {name: told for name, told in wanted.items() if name in made}
    wrong = differing(contents(expected), contents(root))
    wrong += sorted(name for name in {*made, *wanted} if made.get(name) != wanted.get(name))
    tables = contents(expected)
    rows = sum(map(len, tables.values()))
    return f"NOT EQUAL: {wrong}" if wrong else f"equal: {len(tables)} tables of {rows:,} rows, {len(wanted)} shards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--storage", action="store_true")
    parser.add_argument("--scratch", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() if asked.scratch is None else nullcontext(asked.scratch) as place:
        builds = Builds(asked, Path(place))
        local = builds.place / "local"
        print(f"this process: {builds.build(str(local)):.0f} s", flush=True)
        for workers in asked.workers:
            root, seconds = builds.on_ray(workers)
            print(f"Ray, {workers} workers: {seconds:.0f} s, {compared(root, local)}", flush=True)
        if asked.storage:
            root, seconds = builds.stored()
            print(f"Ray, {STORED_BY} workers, S3: {seconds:.0f} s, {compared(root, local)}", flush=True)


if __name__ == "__main__":
    main()
