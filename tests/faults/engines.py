"""End a worker, a machine, the command or the storage at random moments of a build on Ray, and compare what is there.

    python -m tests.faults.engines --moments 20
    python -m tests.faults.engines --moments 6 --what storage

The cluster is one of `ray.cluster_utils`: a head that does no work and two machines, each a raylet of its own
with one worker. A moment is drawn from the time between the first shard of tokens and the end of an undisturbed
build. Where a worker or a machine ends the command must go on; where the command is killed it is run again. The
storage is a local S3 server, that from that moment on, for a while, answers some requests with 503, lets others wait,
and ends the connection of others in half of their body; where the command gives up, it is run again. What the audit
then holds must be what a build in one process holds, and shards that were complete at the moment must be the same
files still (in storage: must not be put anew).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from concept_audit.store.published import directory_of
from tests.backend.store.objects import BUCKET, serving
from tests.faults import material

ROWS = 1400
"""Six shards."""
ENDED = ("worker", "machine", "command", "storage")
FAILING = 4.0
"""Seconds for which the storage fails."""
FAILURES = ("busy", "slow", "cut", None)
MOST_RUNS = 4
OBJECTS = 80 << 20
STORAGE_PORT = 9098


class Cluster:
    """A Ray cluster on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {"num_cpus": 0, "object_store_memory": OBJECTS, "include_dashboard": False}
        self._cluster = RayCluster(initialize_head=True, head_node_args=head)
        self._machines = [self._machine() for _ in range(2)]
        self.address = self._cluster.address

    def _machine(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=OBJECTS)

    def end_worker(self) -> bool:
        """Kill a worker; whether there was one."""
        for machine in self._machines:
            for raylet in machine.all_processes["raylet"]:
                for pid in _children(raylet.process.pid):
                    if b"_Actor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        return True
        return False

    def end_machine(self) -> bool:
        """Take a machine away, with all that it does."""
        self._cluster.remove_node(self._machines.pop(0), allow_graceful=False)
        return True

    def mend(self) -> None:
        """Put back what was taken away."""
        while len(self._machines) < 2:
            self._machines.append(self._machine())

    def close(self) -> None:
        self._cluster.shutdown()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


class Breaking:
    """Builds of one audit that are disturbed."""

    def __init__(self, place: Path, cluster: Cluster):
        self._place, self._cluster = place, cluster
        self._made = material.make(place / "material", ROWS)
        assert self._run(place / "local").wait() == 0, self._said()
        self.expected = material.contents(place / "local")
        self.seconds = self._undisturbed()

    def trial(self, what: str, share: float) -> tuple[bool, list[str]]:
        """Build, and end something after a share of the time.

        Returns:
            whether it ended before the build did, and what is not as it should be.
        """
        out = self._place / "trial"
        subprocess.run(["rm", "-rf", str(out)], check=True)
        process = self._run(out, *self._on_ray())
        self._wait(process, lambda: _shards(out, "tokens"))
        self._wait(process, _clock(self.seconds * share))
        there, ended = _shards(out), process.poll() is None
        if ended and what == "command":
            process.kill()
        elif ended:
            ended = self._cluster.end_worker() if what == "worker" else self._cluster.end_machine()
        status = process.wait()
        wrong = []
        if what == "command" and ended:
            time.sleep(1.0)  # its actors end with it
            there = _shards(out)
            status = self._run(out, *self._on_ray()).wait()
        if status:
            wrong.append(f"exit status {status}: {self._said()}")
        else:
            wrong += [f"{x} differs" for x in material.differing(self.expected, material.contents(out))]
        after = _shards(out)
        wrong += [f"{path} was made twice" for path in there if path in after and after[path] != there[path]]
        self._cluster.mend()
        return ended, wrong

    def storage_trial(self, share: float, chance: random.Random) -> tuple[bool, list[str]]:
        """As `trial`, into storage that fails for a while."""
        cache, out = self._place / "cache", f"s3://{BUCKET}/trial"
        subprocess.run(["rm", "-rf", str(cache)], check=True)
        cache.mkdir()
        root = directory_of(out, cache)
        with serving(port=STORAGE_PORT) as (storage, _):
            process = self._run(out, *self._on_ray(), "--cache", str(cache))
            # Workers put shards themselves; the command's own directory has them once it reads them.
            self._wait(process, lambda: any("/tokens/" in path for path in _put(storage.asked)))
            self._wait(process, _clock(self.seconds * share))
            ended, before, refused = process.poll() is None, len(storage.asked), []

            def answer(method: str, path: str, number: int) -> str | None:
                found = chance.choice(FAILURES)
                refused.append(found)
                return found

            storage.answer = answer
            time.sleep(FAILING)
            storage.answer = lambda method, path, number: None
            runs, status = 1, process.wait()
            while status and runs < MOST_RUNS:
                runs, status = runs + 1, self._run(out, *self._on_ray(), "--cache", str(cache)).wait()
            wrong = [f"exit status {status}: {self._said()}"] if status else []
            wrong += [f"{x} differs" for x in material.differing(self.expected, material.contents(root))]
            twice = sorted(set(_put(storage.asked[:before])) & set(_put(storage.asked[before:])))
            wrong += [f"{path} was put anew" for path in twice]
        told = sum(found is not None for found in refused)
        print(f"    {told} of {len(refused)} requests failed, {runs} runs", flush=True)
        return ended and told > 0, wrong

    def _undisturbed(self) -> float:
        process = self._run(self._place / "ray", *self._on_ray())
        self._wait(process, lambda: _shards(self._place / "ray", "tokens"))
        began = time.monotonic()
        assert process.wait() == 0, self._said()
        assert not material.differing(self.expected, material.contents(self._place / "ray"))
        return time.monotonic() - began

    def _on_ray(self) -> list[str]:
        return ["--engine", "ray", "--ray-address", self._cluster.address, "--workers", "2"]

    def _run(self, out: Path | str, *more: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "concept_audit.cli", *self._made.build(Path(out), *more), "--threads", "1"]
        words[words.index("--out") + 1] = str(out)  # a path would lose a slash of an address
        with (self._place / "said.txt").open("wb") as said:
            return subprocess.Popen(words, stdout=said, stderr=said, stdin=subprocess.DEVNULL)

    def _said(self) -> str:
        return (self._place / "said.txt").read_text("utf-8")[-1500:]

    def _wait(self, process: subprocess.Popen[bytes], until: Callable[[], Any]) -> None:
        while process.poll() is None and not until():
            time.sleep(0.01)


def _clock(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _shards(root: Path, kind: str = "*") -> dict[str, int]:
    """Complete shards → when they were made."""
    paths = [path for path in (root / "shards").glob(f"{kind}/*/*") if path.stem.isdigit()]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in paths}


def _put(asked: Sequence[tuple[str, str]]) -> list[str]:
    """The numbered shards among what was put."""
    return [path for method, path in asked if method == "PUT" and "/shards/" in path and Path(path).stem.isdigit()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", nargs="+", choices=ENDED, default=ENDED)
    options = parser.parse_args()
    chance, total = random.Random(options.seed), {"tried": 0, "ended": 0, "wrong": 0}
    # Before the cluster begins: workers have the environment of their machine.
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{STORAGE_PORT}", "AWS_ALLOW_HTTP": "true"}
    os.environ |= {
        "AWS_REGION": "us-east-1",
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
    }
    cluster = Cluster()
    try:
        with tempfile.TemporaryDirectory() as place:
            breaking = Breaking(Path(place), cluster)
            while total["ended"] < options.moments:
                what, share = options.what[total["tried"] % len(options.what)], chance.uniform(0, 0.9)
                if what == "storage":
                    ended, wrong = breaking.storage_trial(share, chance)
                else:
                    ended, wrong = breaking.trial(what, share)
                total["tried"] += 1
                total["ended"] += ended
                total["wrong"] += bool(wrong)
                print(
                    f"{what} at {share:.0%}: {'ended' if ended else 'came too late'}; {wrong or 'all there'}",
                    flush=True,
                )
    finally:
        cluster.close()
    print(json.dumps(total))


if __name__ == "__main__":
    main()
