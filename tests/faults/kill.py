"""Kill commands at random moments, run them again, and compare what is there with an undisturbed audit.

    python -m tests.faults.kill --kills 50

Each command starts from the state that the commands before it have left, labels and flags among it; it is
killed (SIGKILL), then run again to its end.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import material, people
from tests.faults.warm import Done, Job, Warm

CURVATURE = ("--curvature-tokens", "300")
LATEST = 0.95
"""Moments are drawn from this share of the time that a command takes undisturbed."""


@dataclass(frozen=True)
class Step:
    """A command, with how long it took and what it left undisturbed."""

    name: str
    job: Job
    seconds: float = 0.0
    after: dict[str, list[tuple]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Killing:
    """An audit that is taken from step to step, and back to any of them.

    Args:
        place: an empty directory.
        names: steps to kill.
        small: few rows, and no SAE.
    """

    def __init__(self, warm: Warm, place: Path, names: Sequence[str], small: bool = False):
        self._warm, self._place = warm, place
        self._root, self._out = place / "work" / "audit", place / "work" / "out"
        self._made = material.make(place / "material", 40 if small else 280)
        self.steps = {}
        for name, job in self._jobs(small).items():
            shutil.copytree(self._root, self._before(name)) if self._root.exists() else None
            done = self._run(job)
            assert done.status == 0, f"{name}, undisturbed: {done.said}"
            if name in names:
                after = material.contents(self._root)
                self.steps[name] = Step(name, job, done.seconds, after, self._exported())

    def _jobs(self, small: bool) -> dict[str, Job]:
        root, out, made = str(self._root), str(self._out / "rows.jsonl"), self._made
        sae = ("--sae", "none") if small else ()
        diary = str(self._place / "diary.jsonl")
        commands: dict[str, list[str]] = {
            "build": made.build(self._root, *sae),
            "people": [],
            "build --rebuild": made.build(self._root, *sae, "--rebuild"),
            "index": ["index", root, "--bytes", "64", "--samples", "8", *CURVATURE],
            "probe": ["probe", root, "--examples", str(made.examples), "--name", "risk"],
            "rank": ["rank", root, "--concept", "risk", "--method", "concept_influence", "--exact", *CURVATURE],
            "flag": ["flag", root, "--concept", "risk", "--top", "20", "--note", "why"],
            "validate": "validate {} --concept risk --quick --methods vector_filter --seeds 1 --rows 40".split(),
            "export": ["export", root, "--schema", "own", "--drop", "remove", "--format", "jsonl", "--out", out],
        }
        commands["validate"][1] = root
        if small:
            del commands["build --rebuild"], commands["validate"]
        jobs = {name: Job(arguments) for name, arguments in commands.items()}
        return jobs | {"people": Job([root, diary, 12, 0], call="tests.faults.people:work")}  # type: ignore[list-item]

    def trial(self, name: str, share: float) -> tuple[bool, list[str]]:
        """Kill a step after a share of its time, and run it again.

        Returns:
            whether it was killed before its end, and what was lost or is not as it should be.
        """
        step = self.steps[name]
        shutil.rmtree(self._root.parent)
        self._root.parent.mkdir()
        if self._before(name).exists():
            shutil.copytree(self._before(name), self._root)
        diary = self._place / "diary.jsonl"
        diary.unlink(missing_ok=True)
        first = self._run(Job(step.job.arguments, step.job.call, kill_after=step.seconds * share))
        assert first.status in (-9, 0), first.said
        if name == "people":
            return first.status == -9, people.lost(self._root, material.acknowledged(diary))
        if name == "flag" and first.status == 0 and "20 texts flagged" not in first.said:
            return False, [first.said]
        again = self._run(step.job)
        if again.status:
            return True, [f"run again: {again.said[-800:]}"]
        wrong = [f"{each} differs" for each in material.differing(step.after, material.contents(self._root))]
        if step.files != self._exported():
            wrong.append("the exported file differs")
        left = [path.name for path in self._root.parent.rglob("*") if "partial" in path.name and name != "export"]
        return first.status == -9, wrong + [f"{path} was left" for path in left]

    def _run(self, job: Job) -> Done:
        self._out.mkdir(parents=True, exist_ok=True)
        return self._warm.run(job)[0]

    def _before(self, name: str) -> Path:
        return self._place / "before" / name.replace(" ", "_")

    def _exported(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self._out.glob("*.jsonl")}


STEPS = ("build", "build --rebuild", "people", "index", "probe", "rank", "flag", "validate", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, total = random.Random(options.seed), {"tried": 0, "killed": 0, "lost": 0}
    with tempfile.TemporaryDirectory() as place, Warm(Path(place)) as warm:
        killing = Killing(warm, Path(place), STEPS)
        while total["killed"] < options.kills:
            name = STEPS[total["tried"] % len(STEPS)]
            share = chance.uniform(0, LATEST)
            killed, wrong = killing.trial(name, share)
            total = {
                "tried": total["tried"] + 1,
                "killed": total["killed"] + killed,
                "lost": total["lost"] + bool(wrong),
            }
            print(
                f"{name} at {share:.0%}: {'killed' if killed else 'ended first'}; {wrong or 'nothing lost'}", flush=True
            )
    print(json.dumps(total))


if __name__ == "__main__":
    main()
