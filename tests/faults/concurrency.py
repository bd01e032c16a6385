"""Several processes at work on one audit, and whether it holds in the end what each was told.

    python -m tests.faults.concurrency --processes 4 --deeds 500

Each process flags, clears, takes back, labels, ranks and exports at random, mostly the same rows as the others, half
of them by the command line, and writes down what it was told. At the end a model that knows nothing of DuckDB
replays what was written down, in the order of the log, and must come to the flags that the audit holds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np

from concept_audit import Audit, RowFilter
from concept_audit.cli.main import main as command_line
from tests.faults import material
from tests.faults.people import Diary, example
from tests.faults.warm import Job, Warm

CONCEPTS = ("risk", "second", "third")
SHARED_ROWS = 30
"""Rows that everybody works on: few, so that they meet."""
State = tuple[str, str, str, int]
"""Flag, note, by whom, and the change that made it, which stands for its time."""


def work(root: str, place: str, number: int, count: int, seed: int, by_command: bool) -> int:
    """Do so many things at random, and write down what was told and how long each took."""
    chance, me = random.Random(f"{seed} {number}"), f"worker {number}"
    audit, kept = Audit(root), Diary(Path(place) / f"diary-{number}.jsonl")
    hashes = sorted(set(audit.rows.list()["content_hash"]))[:SHARED_ROWS]

    def flag(turn: int) -> dict:
        some, flag = chance.sample(hashes, chance.randint(1, 4)), chance.choice(["remove", "review"])
        note = chance.choice(["", f"note {turn}"])
        change = audit.flags.set(some, flag, note, me)
        return dict(event=change.event_id, n=change.n_texts, texts=some, flag=flag, note=note)

    def clear(turn: int) -> dict:
        some = chance.sample(hashes, chance.randint(1, 4))
        change = audit.flags.clear(some, me)
        return dict(event=change.event_id, n=change.n_texts, texts=some, flag=None, note="")

    def undo(turn: int) -> dict:
        undone = chance.randint(max(1, audit.flags.latest()[0] - 6), max(1, audit.flags.latest()[0]))
        change = audit.flags.undo(undone, me)
        return dict(event=change.event_id, n=change.n_texts, undoes=undone)

    def flag_by_command(turn: int) -> dict:
        row, note = chance.randrange(SHARED_ROWS), f"command {turn}"
        told = json.loads(_command("flag", root, "--where", f"number={row}", "--note", note, "--json"))
        text = audit.rows.list(RowFilter(metadata={"number": (str(row),)}))["content_hash"].tolist()
        return dict(event=told["event"], n=told["rows"], texts=text, flag="remove", note=note, what="flag")

    def label(turn: int) -> dict:
        mine = chance.random() < 0.5
        made = example(f"{me if mine else 'everybody'} {chance.randrange(8)}", chance.randrange(2))
        audit.labels.add("begun", [made])
        return dict(text=made.content_hash, label=made.label)

    def rank(turn: int) -> dict:
        name = chance.choice(CONCEPTS)
        scores = audit.rank(name)[["example_id", "score"]].sort_values("example_id").to_numpy()
        return dict(concept=name, digest=hashlib.sha256(np.ascontiguousarray(scores).tobytes()).hexdigest())

    def export(turn: int) -> dict:
        out = Path(place) / f"export-{number}.jsonl"
        if by_command:
            _command("export", root, "--all", "--format", "jsonl", "--out", str(out))
        else:
            audit.exports.write(out, "jsonl")
        about = json.loads(out.with_name(out.name + ".manifest.json").read_text("utf-8"))
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        flags = Counter(row["flag"] for row in rows if row["flag"])
        told: Counter[str] = Counter()
        for one in about["flags"]:
            told[one["flag"]] += one["rows"]
        whole = hashlib.sha256(out.read_bytes()).hexdigest() == about["sha256"] and len(rows) == about["rows"]
        return dict(of_one_state=whole and flags == told)

    deeds: list[tuple[Callable[[int], dict], int]] = [
        (flag, 8),
        (clear, 3),
        (undo, 3),
        (label, 4),
        (rank, 1),
        (export, 2),
    ]
    if by_command:
        deeds.append((flag_by_command, 8))
    for turn in range(count):
        deed = chance.choices([one for one, _ in deeds], [weight for _, weight in deeds])[0]
        begun = time.perf_counter()
        done = {"what": deed.__name__, **deed(turn)}
        kept.write(seconds=time.perf_counter() - begun, by=me, deed=deed.__name__, **done)
    return 0


def _command(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as said:
        status = command_line(list(words))
    assert status == 0, said.getvalue()
    return out.getvalue()


def lost(root: Path, told: list[dict]) -> list[str]:
    """What somebody was told and the audit does not hold."""
    con = duckdb.connect(str(root / "workspace.duckdb"), read_only=True)
    log = con.execute("SELECT event_id, n_texts FROM base.flag_log ORDER BY event_id").fetchall()
    flags = {h: rest for h, *rest in con.execute("SELECT content_hash, flag, note FROM base.flags").fetchall()}
    labels = dict(con.execute("SELECT content_hash, label FROM base.probe_examples WHERE probe = 'begun'").fetchall())
    con.close()
    wrong = []
    changes = [one for one in told if one.get("event") is not None]
    by_number = {one["event"]: one for one in changes}
    if len(by_number) < len(changes):
        wrong.append("two were told the same number")
    if [(one["event"], one["n"]) for one in sorted(changes, key=lambda one: one["event"])] != log:
        wrong.append("the log is not what people were told")
    if (replayed := _replayed([by_number[number] for number in sorted(by_number)], wrong)) != flags:
        wrong.append(f"flags are not what the log comes to: {len(replayed)} and {len(flags)}")
    last: dict[str, dict[str, int]] = {}
    for one in told:
        if one["what"] == "label":
            last.setdefault(one["text"], {})[one["by"]] = one["label"]
    wrong += [f"label {text}" for text, by in last.items() if labels.get(text) not in by.values()]
    digests = {(one["concept"], one["digest"]) for one in told if one["what"] == "rank"}
    if len(digests) > len({concept for concept, _ in digests}):
        wrong.append("a ranking has two results")
    wrong += ["an export is of two states" for one in told if one["what"] == "export" and not one["of_one_state"]]
    return wrong


def _replayed(changes: list[dict], wrong: list[str]) -> dict[str, list[str]]:
    """Text → flag and note, after all changes in order; what a change was told to have done is checked."""
    state: dict[str, State] = {}
    made: dict[int, dict[str, tuple[State | None, State | None]]] = {}
    for one in changes:
        number = one["event"]
        if "undoes" in one:
            undone = made[one["undoes"]]
            change = {text: (after, before) for text, (before, after) in undone.items() if state.get(text) == after}
        else:
            new = None if one["flag"] is None else (one["flag"], one["note"], one["by"], number)
            change = {
                text: (state.get(text), new)
                for text in one["texts"]
                if (state.get(text, (None, None))[:2] != (one["flag"], one["note"] if new else None))
            }
        if len(change) != one["n"]:
            wrong.append(f"change {number} was told to be of {one['n']} texts, and is of {len(change)}")
        made[number] = change
        for text, (_, after) in change.items():
            if after is None:
                state.pop(text, None)
            else:
                state[text] = after
    return {text: [flag, note] for text, (flag, note, *_) in state.items()}


def waits(told: list[dict]) -> dict[str, str]:
    """Deed → median, 95th percentile and longest, in seconds."""
    found: dict[str, list[float]] = {}
    for one in told:
        found.setdefault(one["deed"], []).append(one["seconds"])
    return {
        deed: " / ".join(f"{value:.3f}" for value in (*np.quantile(seconds, [0.5, 0.95]), max(seconds)))
        for deed, seconds in sorted(found.items())
    }


def prepare(warm: Warm, place: Path) -> Path:
    """An audit with three probes."""
    made, root = material.make(place / "material", 60), place / "audit"
    commands = [made.build(root, "--sae", "none")]
    for layer, name in enumerate(CONCEPTS):
        fit = ["--layer", str(1 + layer % 2), "--fit", "difference_of_means" if layer < 2 else "logistic_regression"]
        commands.append(["probe", str(root), "--examples", str(made.examples), "--name", name, *fit])
    for command in commands:
        done = warm.command(*command)
        assert done.status == 0, done.said
    return root


def run(warm: Warm, place: Path, processes: int, deeds: int, seed: int = 0) -> tuple[list[dict], list[str]]:
    """Have processes work on an audit together.

    Returns:
        what all of them were told, and what was lost of it.
    """
    root = prepare(warm, place)
    jobs = [
        Job([str(root), str(place), number, deeds, seed, number % 2 == 1], call="tests.faults.concurrency:work")  # type: ignore[list-item]
        for number in range(processes)
    ]
    done = warm.run(*jobs)
    told = [one for number in range(processes) for one in material.acknowledged(place / f"diary-{number}.jsonl")]
    failed = [f"a process ended with {one.status}: {one.said[-1500:]}" for one in done if one.status]
    return told, failed + lost(root, told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--deeds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, Warm(Path(place)) as warm:
        told, wrong = run(warm, Path(place), options.processes, options.deeds, options.seed)
    for each in wrong:
        print(each)
    print("seconds, median / 95th percentile / longest:", json.dumps(waits(told), indent=2))
    print(json.dumps({"tried": len(told), "lost": len(wrong)}))


if __name__ == "__main__":
    main()
