"""What is remembered of an audit is true of its files as they are."""

from __future__ import annotations

import pandas as pd
import pytest

from concept_audit.audit.memory import MOST_REMEMBERED, Memory


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    return path


def test_a_result_is_computed_once_until_a_file_changes(file):
    memory = Memory(lambda: [file, file.with_name("absent")])
    assert [memory.get("length", lambda: len(file.read_text())) for _ in range(2)] == [3, 3]
    assert memory.get("length", lambda: pytest.fail("computed again")) == 3
    file.write_text("three")
    assert memory.get("length", lambda: len(file.read_text())) == 5
    file.with_name("absent").write_text("there now")
    assert memory.get("length", lambda: 9) == 9
    memory.forget()
    assert memory.get("length", lambda: 7) == 7


def test_a_result_of_the_state_before_is_not_remembered_for_the_state_after(file):
    memory = Memory(lambda: [file])

    def slowly() -> str:
        found = file.read_text()
        file.write_text("changed meanwhile")
        memory.get("other", lambda: "of the new state")
        return found

    assert memory.get("text", slowly) == "one"
    assert memory.get("text", file.read_text) == "changed meanwhile"
    assert memory.get("other", lambda: pytest.fail("computed again")) == "of the new state"


def test_chosen_results_outlive_a_change_that_cannot_touch_them(file):
    memory = Memory(lambda: [file])
    for key in ("kept", ("kept", 1), "touched"):
        memory.get(key, lambda: "before")
    kept = memory.valid(frozenset({"kept"}))
    assert set(kept) == {"kept", ("kept", 1)}
    file.write_text("changed")
    assert memory.valid(frozenset({"kept"})) == {}
    memory.restart(kept)
    assert memory.get(("kept", 1), lambda: "after") == "before"
    assert memory.get("touched", lambda: "after") == "after"


def test_a_frame_that_its_reader_changes_stays_as_it_was(file):
    memory = Memory(lambda: [file])
    found = memory.get("frame", lambda: pd.DataFrame({"a": [1]}))
    found["b"] = 2
    assert list(memory.get("frame", pd.DataFrame).columns) == ["a"]


def test_memory_is_bounded(file):
    memory = Memory(lambda: [file])
    for number in range(3 * MOST_REMEMBERED):
        memory.get(number, lambda: "found")
    assert len(memory._results.by_key) <= MOST_REMEMBERED
