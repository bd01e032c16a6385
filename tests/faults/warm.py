"""A process that has imported everything once, and forks for each job: a command ends in a second, not in ten.

`Warm` starts it. A job is a function by name, or a command line; it runs in a child of its own with its output
in a file, and may be killed after so many seconds. Jobs that are handed over together run at the same time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "concept_audit.cli.main",
    "concept_audit.audit.demo",
    "concept_audit.audit.audit",
    "concept_audit.evidence.report",
    "concept_audit.pipeline.validate",
    "safetensors.torch",
    "sklearn.linear_model",
    "transformers.models.llama.modeling_llama",
)
LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Job:
    """What a child does.

    Attributes:
        arguments: of ``concept-audit``, or of the function.
        call: ``module:function`` to run instead of the command line; what it returns is the exit status.
        kill_after: seconds after which it is killed; None to let it end.
        fail: as `tests.faults.failing_writes.arm`: which write fails, and how. None for none.
    """

    arguments: Sequence[str]
    call: str | None = None
    kill_after: float | None = None
    fail: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Done:
    """What came of it: exit status (−9 if it was killed), what it said, seconds, and how many writes it made."""

    status: int
    said: str
    seconds: float
    writes: int = field(default=0)


class Warm:
    """The process, as a context.

    Args:
        place: a directory for what the children say.
        preload: a library that is loaded before all others.
    """

    def __init__(self, place: Path, preload: Path | None = None):
        self._place = place
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, _path()))}
        if preload is not None:
            environment["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *rest: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, *jobs: Job) -> list[Done]:
        """Run jobs at the same time, to the end of the last."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = [asdict(job) | {"out": str(self._place / f"said-{n}.txt")} for n, job in enumerate(jobs)]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [Done(**one) for one in json.loads(self._process.stdout.readline())]

    def command(self, *arguments: object, **how: object) -> Done:
        """Run one command line."""
        return self.run(Job([str(each) for each in arguments], **how))[0]  # type: ignore[arg-type]


def _path() -> list[str]:
    return [str(ROOT / "backend"), str(ROOT / "app"), str(ROOT), os.environ.get("PYTHONPATH", "")]


def _child(job: dict) -> None:
    """Be the child: never returns."""
    status = 1
    try:
        out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if job["fail"] is not None:
            from tests.faults import failing_writes

            failing_writes.arm(**job["fail"])
        if job["call"] is None:
            from concept_audit.cli.main import main

            status = main(job["arguments"])
        else:
            module, _, name = job["call"].partition(":")
            status = getattr(importlib.import_module(module), name)(*job["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            # As at the end of any process: DuckDB settles its logs.
            from concept_audit.store import database

            database._close_all()
        if job["fail"] is not None:
            with suppress(Exception):
                Path(job["out"] + ".writes").write_text(str(failing_writes.count()))
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status or 0)


def _run(jobs: list[dict]) -> list[dict]:
    running: dict[int, int] = {}
    begun, ended = time.monotonic(), {}
    for number, job in enumerate(jobs):
        Path(job["out"] + ".writes").unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            _child(job)
        running[pid] = number
    killed: set[int] = set()
    while running:
        for pid, number in list(running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            now, fuse = time.monotonic() - begun, jobs[number]["kill_after"]
            if found:
                del running[pid]
                ended[number] = os.waitstatus_to_exitcode(status), now
            elif fuse is not None and now >= fuse and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(LOOK_SECONDS)
    told = []
    for number, job in enumerate(jobs):
        status, seconds = ended[number]
        writes = Path(job["out"] + ".writes")
        said = Path(job["out"]).read_text("utf-8", "replace")
        told.append(
            {
                "status": status,
                "said": said,
                "seconds": seconds,
                "writes": int(writes.read_text()) if writes.exists() else 0,
            }
        )
    return told


def serve() -> None:
    """Take jobs from standard input until it ends."""
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        os.write(out, (json.dumps(_run(json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    serve()
