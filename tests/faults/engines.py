"""End a worker, a machine or the command itself at random moments of a build on Ray, and compare what is there.

    python -m tests.faults.engines --moments 20

The cluster is one of `ray.cluster_utils`: a head that does no work and two machines, each a raylet of its own
with one worker. A moment is drawn from the time between the first shard of tokens and the end of an undisturbed
build. Where a worker or a machine ends the command must go on; where the command is killed it is run again. What
the audit then holds must be what a build in one process holds, and shards that were complete at the moment must
be the same files still.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import material

ROWS = 1400
"""Six shards."""
ENDED = ("worker", "machine", "command")
OBJECTS = 80 << 20


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

    def _undisturbed(self) -> float:
        process = self._run(self._place / "ray", *self._on_ray())
        self._wait(process, lambda: _shards(self._place / "ray", "tokens"))
        began = time.monotonic()
        assert process.wait() == 0, self._said()
        assert not material.differing(self.expected, material.contents(self._place / "ray"))
        return time.monotonic() - began

    def _on_ray(self) -> list[str]:
        return ["--engine", "ray", "--ray-address", self._cluster.address, "--workers", "2"]

    def _run(self, out: Path, *more: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "concept_audit.cli", *self._made.build(out, *more), "--threads", "1"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, total = random.Random(options.seed), {"tried": 0, "ended": 0, "wrong": 0}
    cluster = Cluster()
    try:
        with tempfile.TemporaryDirectory() as place:
            breaking = Breaking(Path(place), cluster)
            while total["ended"] < options.moments:
                what, share = ENDED[total["tried"] % len(ENDED)], chance.uniform(0, 0.9)
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
