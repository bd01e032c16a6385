"""The hub, labelled examples, fingerprints, and memory while reading."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.read import fingerprint, read_examples, read_labelled
from concept_audit.errors import DataError
from tests.backend.data.common import CHAT, WRITERS, jsonl, saved_splits, turns

# The hub


def test_a_hub_data_set_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return datasets.Dataset.from_list(CHAT).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = list(read_examples("owner/name", split="test"))
    assert asked == {"name": "owner/name", "split": "test", "streaming": True}
    assert [e.messages for e in examples] == [turns(row) for row in CHAT]
    assert [(e.source, e.source_row) for e in examples] == [("owner/name", 1), ("owner/name", 2)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "no file, and the hub cannot be reached; go online, or"),
        (FileNotFoundError("gone"), "neither a file nor a readable data set on the hub; check"),
        (ValueError("Bad split"), "neither a file nor a readable data set on the hub; check the"),
    ],
)
def test_a_hub_data_set_that_cannot_be_had_is_refused_at_once(monkeypatch, error, message):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    for ask in (read_examples, fingerprint):
        with pytest.raises(DataError, match=rf"^owner/name: {message}.*\({error}\)"):
            ask("owner/name")


# Labelled examples


@pytest.mark.parametrize(("label", "read"), [(0, 0), (1, 1), (True, 1), (False, 0)])
def test_labels_are_numbers_or_booleans(tmp_path, label, read):
    [labelled] = read_labelled(jsonl(tmp_path / "p.jsonl", CHAT[0] | {"label": label}))
    assert (labelled.messages, labelled.label) == (turns(CHAT[0]), read)
    assert type(labelled.label) is int


@pytest.mark.parametrize("extra", [{}, {"label": None}, {"label": 2}, {"label": "1"}, {"label": []}])
def test_a_label_that_is_none_is_named_with_its_line(tmp_path, extra):
    path = jsonl(tmp_path / "p.jsonl", CHAT[0] | {"label": 1}, CHAT[1] | extra)
    with pytest.raises(DataError, match=r'^p.jsonl line 2: "label": .*; write 0, 1, true or false'):
        read_labelled(path)


def test_labelled_examples_are_never_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_labelled("owner/name")


# Fingerprints


@pytest.mark.parametrize("name", WRITERS)
def test_a_fingerprint_tells_data_apart_and_survives_a_copy(tmp_path, name):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    WRITERS[name](tmp_path / "one" / name)
    WRITERS[name](tmp_path / "two" / name)
    if not name.endswith(".csv.gz"):  # gzip writes the time
        assert fingerprint(tmp_path / "one" / name) == fingerprint(tmp_path / "two" / name)
    other = jsonl(tmp_path / "other.jsonl", CHAT[0])
    assert fingerprint(tmp_path / "one" / name) != fingerprint(other)


def test_fingerprints_of_splits_differ_and_ignore_caches(tmp_path):
    saved_splits(tmp_path / "d")
    train, test = (fingerprint(tmp_path / "d", split) for split in ("train", "test"))
    (tmp_path / "d" / "train" / "cache-1.arrow").write_bytes(b"x")
    assert train != test
    assert fingerprint(tmp_path / "d") == train


def test_a_hub_fingerprint_follows_name_split_and_revision(monkeypatch):
    class Builder:
        hash = "a"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: Builder)
    prints = {fingerprint("o/n"), fingerprint("o/m"), fingerprint("o/n", "test")}
    Builder.hash = "b"
    prints.add(fingerprint("o/n"))
    assert len(prints) == 4


# Memory


def peak_while_reading(path: Path) -> int:
    tracemalloc.start()
    try:
        for _ in read_examples(path):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_many(path: Path, rows: int) -> None:
    data = [{"prompt": f"question {i}", "response": "answer " * 20} for i in range(rows)]
    if path.suffix == ".jsonl":
        jsonl(path, *data)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    else:
        path.write_text("prompt,response\n" + "\n".join(",".join(row.values()) for row in data))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, suffix):
    few, many = tmp_path / f"few{suffix}", tmp_path / f"many{suffix}"
    write_many(few, 5_000)
    write_many(many, 20_000)
    peak_while_reading(few)  # imports and caches
    assert peak_while_reading(many) <= 1.1 * peak_while_reading(few) + 50_000
