"""Let every write fail in turn, as on a full or a broken disk, and see what is lost.

    python -m tests.faults.disk [--every 1] [--steps build,people,flag]

A full disk (ENOSPC) stays full from the k-th write on; a broken one (EIO) fails once, at the k-th. Then the disk
is well again, and the same command has to end as if nothing had been.
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults import material, people
from tests.faults.failing_writes import compiled
from tests.faults.warm import Done, Job, Warm

FAULTS = {"full": (errno.ENOSPC, False), "broken": (errno.EIO, True)}
STEPS = ("build", "people", "flag", "rank")


class FailingDisk:
    """An audit on a disk whose writes fail when they are told to.

    Args:
        place: an empty directory.
    """

    def __init__(self, warm: Warm, place: Path):
        self._warm, self._place = warm, place
        self._root, self._diary = place / "work" / "audit", place / "diary.jsonl"
        made = material.make(place / "material", 40)
        root, who = str(self._root), "tests.faults.people:work"
        self._jobs = {
            "build": Job(made.build(self._root, "--sae", "none")),
            "people": Job([root, str(self._diary), 12, 0], call=who),  # type: ignore[list-item]
            "probe": Job(["probe", root, "--examples", str(made.examples), "--name", "risk", "--layer", "2"]),
            "rank": Job(["rank", root, "--concept", "risk", "--top", "5"]),
            "flag": Job(["flag", root, "--concept", "risk", "--top", "20", "--note", "why"]),
        }
        self.writes: dict[str, int] = {}
        self._after: dict[str, dict[str, list[tuple]]] = {}
        for name, job in self._jobs.items():
            if self._root.exists():
                shutil.copytree(self._root, place / "before" / name)
            done = self._run(job, 0, errno.EIO, True)
            assert done.status == 0, f"{name}, undisturbed: {done.said}"
            self.writes[name], self._after[name] = done.writes, material.contents(self._root)

    def trial(self, name: str, number: int, fault: str) -> tuple[str, list[str]]:
        """Have the write of a number fail in a step, then run the step again on a disk that is well.

        Returns:
            how it ended (``ended`` or ``error in words``), and what was lost or is not as it should be.
        """
        shutil.rmtree(self._root.parent)
        before = self._place / "before" / name
        if before.exists():
            shutil.copytree(before, self._root)
        self._root.parent.mkdir(exist_ok=True)
        self._diary.unlink(missing_ok=True)
        done, wrong = self._run(self._jobs[name], number, *FAULTS[fault]), []
        if done.status not in (0, 1) or "Traceback" in done.said:
            wrong.append(f"no error in words ({done.status}): {done.said[-1500:]}")
        elif done.status == 1 and "concept-audit: error: " not in done.said:
            wrong.append(f"no word of an error: {done.said[-500:]}")
        if name == "people":
            wrong += people.lost(self._root, material.acknowledged(self._diary))
            refused = "refused: " in done.said
            again = self._warm.run(self._jobs[name])[0]
            if again.status or "refused" in again.said:
                wrong.append(f"afterwards: {again.said[-800:]}")
            wrong += people.lost(self._root, material.acknowledged(self._diary))
            return "error in words" if refused else "ended", wrong
        if name == "flag" and done.status == 0:
            wrong += material.differing(self._after[name], material.contents(self._root))
        again = self._warm.run(self._jobs[name])[0]
        if again.status:
            wrong.append(f"run again: {again.said[-800:]}")
        else:
            now = material.contents(self._root)
            wrong += [f"{each} differs" for each in material.differing(self._after[name], now)]
        return "error in words" if done.status else "ended", wrong

    def _run(self, job: Job, number: int, error: int, once: bool) -> Done:
        fail = {"below": str(self._root.parent), "number": number, "error": error, "once": once}
        self._root.parent.mkdir(parents=True, exist_ok=True)
        return self._warm.run(Job(job.arguments, job.call, fail=fail))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try each n-th write only")
    parser.add_argument("--first", type=int, default=1, help="begin with this write")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--faults", default=",".join(FAULTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        library = compiled(Path(place))
        assert library is not None, "needs a C compiler"
        with Warm(Path(place), library) as warm:
            disk = FailingDisk(warm, Path(place))
            print(f"writes: {disk.writes}", flush=True)
            for name in options.steps.split(","):
                for fault in options.faults.split(","):
                    found: Counter[str] = Counter()
                    for number in range(options.first, disk.writes[name] + 1, options.every):
                        ended, wrong = disk.trial(name, number, fault)
                        found.update(["tried", ended, *(["lost"] if wrong else [])])
                        for each in wrong:
                            print(f"{name}, {fault} at {number}: {each}", flush=True)
                    print(json.dumps({"step": name, "fault": fault, "lost": 0, **found}), flush=True)


if __name__ == "__main__":
    main()
