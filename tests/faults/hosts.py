"""Build on two hosts with a network between them, cut the line in the midst of a build, and compare what is there.

    python -m tests.faults.hosts

The hosts are network namespaces of this machine, joined by a pair of virtual interfaces. On the first are a Ray head
that does no work, the command, and an S3 server; on the second a machine with one worker. The second has a directory of
its own for what Ray keeps, and with storage it does not see the first one's audits. It needs Ray, Linux, and the right
to make namespaces (root). Each audit must be, table by table, what one process builds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from concept_audit.store.published import directory_of
from tests.backend.store.objects import BUCKET, serving
from tests.faults import material

ROWS = 1400
"""Six shards."""
ADDRESSES = ("10.203.0.1", "10.203.0.2")
PORT, STORAGE_PORT = 6399, 9099
OBJECTS = 80 << 20
JOINING = 300.0
"""Seconds for a host to join."""
CUT = (5.0, 60.0)
"""Seconds for which the line is cut: of the shorter one Ray hears nothing, with the longer one the host is lost."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_raylet_start_wait_time_s": "240",
    "AWS_ENDPOINT_URL": f"http://{ADDRESSES[0]}:{STORAGE_PORT}",
    "AWS_ALLOW_HTTP": "true",
    "AWS_REGION": "us-east-1",
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
}


class Network:
    """Two hosts, and the line between them."""

    def __init__(self) -> None:
        self.names = (f"audit{os.getpid()}a", f"audit{os.getpid()}b")
        self._ends = (f"v{os.getpid()}a", f"v{os.getpid()}b")

    def __enter__(self) -> Network:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
        for name, end, address in zip(self.names, self._ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
        return self

    def __exit__(self, *_exception: object) -> None:
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)

    def line(self, state: str) -> None:
        """Cut the line (``down``), or join it again (``up``)."""
        _ip("-n", self.names[1], "link", "set", self._ends[1], state)

    def sent(self) -> int:
        """Bytes that have left the second host so far."""
        counter = f"/sys/class/net/{self._ends[1]}/statistics/tx_bytes"
        return int(subprocess.check_output(self.on(1, "cat", counter)))

    def on(self, host: int, *words: str) -> list[str]:
        """A command, as it is run on one of the hosts."""
        return ["ip", "netns", "exec", self.names[host], *words]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Cluster:
    """A Ray head on the first host, and a machine with one worker on the second.

    Args:
        hidden: a directory that the second host does not see.
    """

    def __init__(self, network: Network, place: Path, hidden: Path | None = None):
        self._network, self._place, self._hidden = network, place, hidden
        self.address = f"{ADDRESSES[0]}:{PORT}"
        self.joined = 0
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        # The path of a socket may have a hundred letters.
        self._ray = Path(tempfile.mkdtemp(prefix="ray"))
        self._start("head", 0, "--head", f"--port={PORT}", f"--temp-dir={self._ray}", "--include-dashboard=false")
        self.join()
        return self

    def __exit__(self, *_exception: object) -> None:
        for process in reversed(self._running.values()):
            _end(process, signal.SIGTERM)
        subprocess.run(["rm", "-rf", str(self._ray)], check=True)

    def join(self) -> None:
        """Have the second host join, as a service is started again that has ended."""
        found = self._running.get("machine")
        if found is None or found.poll() is not None:
            self._start("machine", 1, f"--address={self.address}")
            self.joined += 1

    def _start(self, name: str, host: int, *how: str) -> None:
        own = [f"--node-ip-address={ADDRESSES[host]}", f"--num-cpus={host}", "--block"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *how, *own, f"--object-store-memory={OBJECTS}"]
        hidden = [str(path) for path in (self._ray, self._hidden) if host and path is not None]
        shell = 'while [ "$1" != -- ]; do mount -t tmpfs tmpfs "$1"; shift; done; shift; exec "$@"'
        said = self._place / f"{name}.txt"
        with said.open("wb") as out:
            self._running[name] = subprocess.Popen(
                self._network.on(host, "unshare", "--mount", "sh", "-ec", shell, "sh", *hidden, "--", *ray),
                stdout=out,
                stderr=out,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        deadline = time.monotonic() + JOINING
        while b"Ray runtime started" not in said.read_bytes():
            assert self._running[name].poll() is None and time.monotonic() < deadline, said.read_text()[-1500:]
            time.sleep(0.2)


def _begun(root: Path) -> bool:
    """Whether the first host has a shard."""
    return any((root / "shards").glob("tokens/*/*"))


def _end(process: subprocess.Popen[bytes], how: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def storage(network: Network, place: Path) -> Iterator[str]:
    """An S3 server with an empty bucket on the first host; yields its address."""
    command = network.on(0, sys.executable, "-m", "tests.faults.hosts", "--serve", ADDRESSES[0])
    said = place / "storage.txt"
    with said.open("wb") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, start_new_session=True)
    try:
        assert process.stdout is not None and process.stdout.readline(), said.read_text()[-1500:]
        yield f"http://{ADDRESSES[0]}:{STORAGE_PORT}"
    finally:
        _end(process, signal.SIGTERM)


class Building:
    """Builds of one audit: by a process, and on the hosts."""

    def __init__(self, network: Network, place: Path):
        self._network, self._place = network, place
        self._made = material.make(place / "material", ROWS)
        self.seconds = 0.0
        """That the last build took after its first shard."""
        assert self._run(str(place / "local"), []).wait() == 0, self._said()
        self.expected = material.contents(place / "local")

    def shared(self) -> dict[str, object]:
        """In a directory that both hosts see."""
        out = self._place / "shared"
        with Cluster(self._network, self._place) as cluster:
            return self._built(str(out), out, cluster)

    def stored(self, name: str, share: float = 0.0, cut: float = 0.0) -> dict[str, object]:
        """In storage; the second host does not see the directory of the command.

        Args:
            share: of the seconds that the last build took: so long after the first shard the line is cut.
            cut: seconds for which it is cut; 0 for not at all.
        """
        cache, out = self._place / "cache", f"s3://{BUCKET}/{name}"
        cache.mkdir(exist_ok=True)
        root = directory_of(out, cache)
        with storage(self._network, self._place), Cluster(self._network, self._place, cache) as cluster:
            if cut:
                breaking = threading.Thread(target=self._break, args=(cluster, root, share * self.seconds, cut))
                breaking.start()
            found = self._built(out, root, cluster, "--cache", str(cache))
            if cut:
                breaking.join()
            return {**found, "joined": cluster.joined}

    def _break(self, cluster: Cluster, root: Path, after: float, seconds: float) -> None:
        while not _begun(root):
            time.sleep(0.05)
        time.sleep(after)
        self._network.line("down")
        time.sleep(seconds)
        self._network.line("up")
        # A machine that was given up meanwhile ends when it hears of it.
        for _ in range(60):
            time.sleep(1)
            cluster.join()

    def _built(self, out: str, root: Path, cluster: Cluster, *more: str) -> dict[str, object]:
        before = self._network.sent()
        on_ray = ["--engine", "ray", "--ray-address", cluster.address, "--workers", "1"]
        process = self._run(out, self._network.on(0), *on_ray, *more)
        while process.poll() is None and not _begun(root):
            time.sleep(0.05)
        began = time.monotonic()
        status = process.wait()
        self.seconds = time.monotonic() - began
        wrong = [f"exit status {status}: {self._said()}"] if status else []
        if not status:
            wrong = [f"{what} differs" for what in material.differing(self.expected, material.contents(root))]
        sent = self._network.sent() - before
        return {
            "seconds after the first shard": round(self.seconds, 1),
            "bytes from the second host": sent,
            "wrong": wrong,
        }

    def _run(self, out: str, on: list[str], *more: str) -> subprocess.Popen[bytes]:
        words = [*on, sys.executable, "-m", "concept_audit.cli", *self._made.build(Path(out), *more), "--threads", "1"]
        words[words.index("--out") + 1] = out  # a path would lose a slash of an address
        with (self._place / "said.txt").open("wb") as said:
            return subprocess.Popen(
                words, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env={**os.environ, **ENVIRONMENT}
            )

    def _said(self) -> str:
        return (self._place / "said.txt").read_text("utf-8")[-1500:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", metavar="HOST", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        with serving(options.serve, STORAGE_PORT):
            print("serving", flush=True)
            signal.pause()
    chance = random.Random(options.seed)
    with Network() as network, tempfile.TemporaryDirectory() as place:
        building = Building(network, Path(place))
        tell("in a directory of both", building.shared())
        tell("in storage", building.stored("whole"))
        whole = building.seconds
        for seconds in CUT:
            building.seconds, share = whole, chance.uniform(0, 0.7)
            found = building.stored(f"cut-{seconds:g}", share, seconds)
            tell(f"in storage, the line cut for {seconds:g} s at {share:.0%}", found)


def tell(what: str, found: dict[str, object]) -> None:
    """A line about a build."""
    print(f"{what}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
