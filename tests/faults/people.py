"""Somebody at work: flags, labels, notes, views and names, one after another, each written down once it is done.

What is written down was acknowledged. `lost` says what of it an audit does not hold.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import duckdb

from concept_audit import Audit, AuditError, LabelledExample, Message


class Diary:
    """What was acknowledged, one JSON line each."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **done: object) -> None:
        """One line, in one call: it is there, or it is not."""
        os.write(self._file, (json.dumps(done) + "\n").encode())


def example(word: str, label: int) -> LabelledExample:
    """A labelled example whose text is a word."""
    return LabelledExample((Message("user", "q"), Message("assistant", word)), label)


def work(root: str, diary: str, count: int, seed: int) -> int:
    """Do so many things at random; refusals in words are passed by, whatever else is raised ends it."""
    chance, kept = random.Random(seed), Diary(Path(diary))
    try:
        audit = Audit(root)
        hashes = sorted(set(audit.rows.list()["content_hash"]))
    except AuditError as error:
        print(f"refused: {error}", flush=True)
        return 0

    def flag(number: int) -> None:
        some, name = chance.sample(hashes, 3), chance.choice(["remove", "review"])
        change = audit.flags.set(some, name, f"note {seed} {number}", "somebody")
        kept.write(what="flag", event=change.event_id, texts=some, flag=name, note=f"note {seed} {number}")

    def clear(number: int) -> None:
        some = chance.sample(hashes, 2)
        change = audit.flags.clear(some, "somebody")
        kept.write(what="flag", event=change.event_id, texts=some, flag=None, note="")

    def undo(number: int) -> None:
        last = audit.flags.undoable("somebody")
        if len(last):
            undone = int(last["event_id"].iloc[0])
            change = audit.flags.undo(undone, "somebody")
            kept.write(what="undo", event=change.event_id, undoes=undone)

    def label(number: int) -> None:
        made = example(f"word {chance.randrange(12)}", chance.randrange(2))
        audit.labels.add("begun", [made])
        kept.write(what="label", text=made.content_hash, label=made.label)

    def view(number: int) -> None:
        audit.views.save(f"view {seed} {number}", "audit", f"size={number}", "somebody")
        kept.write(what="view", name=f"view {seed} {number}")

    deeds: list[Callable[[int], None]] = [flag, flag, clear, undo, label, label, view]
    for number in range(count):
        try:
            chance.choice(deeds)(number)
        except AuditError as error:
            print(f"refused: {error}", flush=True)
    return 0


def lost(root: Path, done: list[dict]) -> list[str]:
    """What was acknowledged and is not there, or is not what it was.

    One process wrote, so what it did last counts; one change more than it wrote down may be there.
    """
    if not (root / "workspace.duckdb").exists():
        return [f"{one['what']}: the workspace is gone" for one in done]
    con = duckdb.connect(str(root / "workspace.duckdb"))  # settles the log that a kill has left
    if not con.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'flags'").fetchone():
        con.close()
        return [f"{one['what']}: the tables are gone" for one in done]
    flags = dict(con.execute("SELECT content_hash, flag FROM base.flags").fetchall())
    events = {event for (event,) in con.execute("SELECT event_id FROM base.flag_log").fetchall()}
    changed = con.execute("SELECT event_id, content_hash, after.flag FROM base.flag_changes").fetchall()
    labels = dict(con.execute("SELECT content_hash, label FROM base.probe_examples WHERE probe = 'begun'").fetchall())
    views = {name for (name,) in con.execute("SELECT name FROM base.saved_views").fetchall()}
    con.close()
    missing = []
    last: dict[str, int] = {}
    for one in done:
        if one["what"] == "label":
            last[one["text"]] = one["label"]
        elif one["what"] == "view" and one["name"] not in views:
            missing.append(f"view {one['name']}")
        elif one.get("event") is not None and one["event"] not in events:
            missing.append(f"change {one['event']}")
    missing += [f"label {text}" for text in last if text not in labels]
    present: dict[str, str | None] = {}
    for _, text, after in sorted(changed, key=lambda change: change[0]):
        present[text] = after
    if {text: flag for text, flag in present.items() if flag is not None} != flags:
        missing.append("flags are not what their log says")
    wrong = [text for text, value in last.items() if labels.get(text, value) != value]
    # A label that was made and not written down any more may stand in the place of one.
    if len(wrong) > 1:
        missing += [f"label {text} is another" for text in wrong]
    with suppress(ValueError):
        newest = max(one["event"] for one in done if one.get("event") is not None)
        if max(events, default=0) > newest + 1:
            missing.append("changes that nobody made")
    return missing
