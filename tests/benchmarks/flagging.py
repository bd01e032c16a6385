"""How long a flag takes when several processes flag, label and read one audit at once, and whether any is lost.

    python tests/benchmarks/flagging.py cache/demo --processes 3 --flags 30

The audit is written to: give it a copy. Each process flags texts of its own, one lease each, and reads the number of
flags in between, as a page of the dashboard does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from concept_audit.store import flags
from concept_audit.store.database import database
from concept_audit.store.layout import Layout


def work(root: Path, name: str, count: int) -> dict[str, list]:
    """Flag so many texts; the seconds that each flag and each look took."""
    opened = database(Layout(root))
    told: dict[str, list] = {"acknowledged": [], "flag": [], "read": [], "failed": []}
    sys.stdin.readline()
    for number in range(count):
        try:
            begun = time.perf_counter()
            with opened.writing() as cursor:
                flags.set_flags(cursor, [f"{name}-{number}"], "remove", "", name)
            told["flag"].append(time.perf_counter() - begun)
            told["acknowledged"].append(f"{name}-{number}")
            begun = time.perf_counter()
            with opened.reading() as cursor:
                cursor.execute("SELECT count(*) FROM base.flags").fetchall()
            told["read"].append(time.perf_counter() - begun)
        except Exception as error:
            told["failed"].append(repr(error))
    return told


def measure(root: Path, processes: int, count: int) -> dict[str, object]:
    """Run the processes, all from one moment on."""
    command = [sys.executable, __file__, str(root), "--flags", str(count), "--name"]
    running = [
        subprocess.Popen([*command, f"p{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    told = _together(running)
    acknowledged = {text for each in told for text in each["acknowledged"]}
    with database(Layout(root)).reading() as cursor:
        kept = {text for (text,) in cursor.execute("SELECT content_hash FROM base.flags").fetchall()}
        events = cursor.execute("SELECT count(*), count(DISTINCT event_id) FROM base.flag_log").fetchone()
    failed = [failure for each in told for failure in each["failed"]]
    return {
        "processes": processes,
        "acknowledged": len(acknowledged),
        "kept": len(acknowledged & kept),
        "events": events,
        "failed": len(failed),
        "failures": failed[:3],
        "flag": _spread([second for each in told for second in each["flag"]]),
        "read": _spread([second for each in told for second in each["read"]]),
    }


def _together(running: list[subprocess.Popen]) -> list[dict[str, list]]:
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0]) for process in running]


def _spread(seconds: list[float]) -> dict[str, float]:
    shares = {"median": 50, "p90": 90, "p99": 99, "longest": 100}
    return {name: round(float(np.percentile(seconds, share)), 4) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--flags", type=int, default=30, help="of each process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.name:
        print(json.dumps(work(asked.audit, asked.name, asked.flags)))
        return
    found = measure(asked.audit, asked.processes, asked.flags)
    print(json.dumps(found) if asked.json else "\n".join(f"{name:14}{value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
