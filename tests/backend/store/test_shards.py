"""Which rows go into which shard, and shards on disk: complete or absent, noticed when damaged, never mixed up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from concept_audit import StoreError
from concept_audit.files import atomic_write, remove_leftovers
from concept_audit.store.partition import (
    LARGEST_UNITS,
    SHARDS_OF_A_SIZE,
    UNIT_ROWS,
    ListedPartition,
    RowPartition,
    by_shard,
    first_row,
    shard_of,
)
from concept_audit.store.shard_store import (
    TABLE,
    RowShards,
    ShardSet,
    ShardStore,
    read_about,
    read_columns,
    read_tensors,
)

SIZES = (1, 255, 256, 257, 300, 16_384, 16_385, 49_152, 49_153, 245_760, 245_761, 1_000_000)
SCHEMA = pa.schema([("value", pa.int64())])


@pytest.mark.parametrize("rows", SIZES)
def test_every_row_is_in_exactly_one_shard(rows):
    partition = RowPartition(rows)
    spans = [partition.span(number) for number in range(len(partition))]
    assert spans[0].start == 0 and spans[-1].stop == rows
    assert all(one.stop == next_.start for one, next_ in zip(spans, spans[1:], strict=False))
    assert all(len(span) for span in spans)
    assert partition.sizes() == {number: len(span) for number, span in enumerate(spans)}


@pytest.mark.parametrize("rows", SIZES)
def test_the_shard_of_a_row_is_the_one_that_spans_it(rows):
    partition = RowPartition(rows)
    for number in range(len(partition)):
        span = partition.span(number)
        assert first_row(number) == span.start
        assert {shard_of(span[0]), shard_of(span[len(span) // 2]), shard_of(span[-1])} == {number}
    ids = list(range(0, rows, max(1, rows // 500)))
    found = by_shard(ids)
    assert list(found) == sorted(found)
    assert sorted(i for each in found.values() for i in each) == ids
    assert all(i in partition.span(number) for number, each in found.items() for i in each)


@pytest.mark.parametrize("rows", SIZES)
def test_units_cover_a_shard_and_begin_where_they_would_in_any_data_set(rows):
    partition = RowPartition(rows)
    for number in range(len(partition)):
        units = list(partition.units(number))
        assert units[0].start == 0 and units[-1].stop == partition.size(number)
        assert all(one.stop == next_.start for one, next_ in zip(units, units[1:], strict=False))
        assert all(unit.stop - unit.start <= UNIT_ROWS for unit in units)
        assert first_row(number) % UNIT_ROWS == 0 and all(unit.start % UNIT_ROWS == 0 for unit in units)


def test_small_data_have_one_unit_in_a_shard():
    partition = RowPartition(SHARDS_OF_A_SIZE * UNIT_ROWS)
    assert len(partition) == SHARDS_OF_A_SIZE
    assert all(list(partition.units(number)) == [slice(0, UNIT_ROWS)] for number in range(len(partition)))


def test_shards_grow_with_their_number_up_to_the_largest():
    sizes = [size // UNIT_ROWS for size in RowPartition(3_000_000).sizes().values()][:-1]
    assert sizes == sorted(sizes)
    assert {size: sizes.count(size) for size in sizes if size < LARGEST_UNITS} == {
        1: SHARDS_OF_A_SIZE,
        2: SHARDS_OF_A_SIZE,
        4: SHARDS_OF_A_SIZE,
        8: SHARDS_OF_A_SIZE,
    }
    assert max(sizes) == LARGEST_UNITS


def test_a_shard_spans_the_same_rows_when_data_are_added_behind():
    few, many = RowPartition(20_000), RowPartition(700_000)
    assert all(few.span(number) == many.span(number) for number in range(len(few) - 1))


def test_no_rows_make_no_shards():
    assert len(RowPartition(0)) == 0 and RowPartition(0).sizes() == {}


@pytest.fixture
def store(tmp_path) -> ShardStore:
    return ShardStore(tmp_path / "shards")


@pytest.fixture
def tensors(store) -> RowShards:
    """Three shards of one tensor: 256, 256 and 88 rows; each value is its row's id."""
    return filled(RowShards(store, "activations", "now", RowPartition(600)))


@pytest.fixture
def tables(store) -> RowShards:
    """The same as tables."""
    return filled(RowShards(store, "rows", "now", RowPartition(600), TABLE))


def filled(shards: RowShards) -> RowShards:
    for number in range(len(shards.partition)):
        write(shards, number)
    return shards


def write(shards: RowShards, number: int) -> None:
    span = shards.partition.span(number)
    if shards.suffix == TABLE:
        shards.write_table(number, [pa.table({"value": list(span)}, SCHEMA)], SCHEMA)
    else:
        shards.write_tensors(number, {"value": torch.arange(span.start, span.stop)})


def values(shards: RowShards) -> list[int]:
    found: list[int] = []
    for number in shards.numbers():
        path = shards.path(number)
        column = read_columns(path, ["value"])["value"] if shards.suffix == TABLE else read_tensors(path)["value"]
        found += column.to_pylist() if shards.suffix == TABLE else column.tolist()
    return found


BOTH = pytest.mark.parametrize("kind", ["tensors", "tables"])


@BOTH
def test_shards_read_back_as_they_were_written_and_say_their_rows(kind, request):
    shards = request.getfixturevalue(kind)
    assert values(shards) == list(range(600))
    assert shards.store.list(shards.kind, shards.key) == {0: 256, 1: 256, 2: 88}
    assert [read_about(shards.path(number))["rows"] for number in shards.numbers()] == [256, 256, 88]
    assert shards.missing() == []


def refuses(shards: RowShards, number: int) -> None:
    """One shard is missing, whoever asks; making it again is enough."""
    assert shards.missing() == [number]
    with pytest.raises(StoreError, match=f"{number:06}.*absent or damaged"):
        shards.complete(number)
    with pytest.raises(StoreError, match=f"{number:06}.*absent or damaged.*run the command that made the audit again"):
        shards.numbers()
    write(shards, number)
    assert shards.complete(number) == shards.path(number)
    assert shards.missing() == [] and values(shards) == list(range(600))


@BOTH
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_hole_is_noticed(kind, number, request):
    shards = request.getfixturevalue(kind)
    shards.path(number).unlink()
    refuses(shards, number)


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_shard_that_is_cut_off_is_noticed(kind, share, request):
    shards = request.getfixturevalue(kind)
    whole = shards.path(1).read_bytes()
    shards.path(1).write_bytes(whole[: int(len(whole) * share)])
    refuses(shards, 1)


@BOTH
def test_a_shard_whose_header_is_damaged_is_noticed(kind, request):
    shards = request.getfixturevalue(kind)
    whole = bytearray(shards.path(1).read_bytes())
    # Tables end with what tensors begin with: the description of what they hold.
    place = slice(-24, None) if kind == "tables" else slice(0, 24)
    whole[place] = b"\xff" * 24
    shards.path(1).write_bytes(bytes(whole))
    refuses(shards, 1)


@BOTH
def test_a_shard_of_fewer_rows_is_noticed(kind, request):
    shards = request.getfixturevalue(kind)
    shorter = replace(shards, partition=RowPartition(400))
    write(shorter, 1)
    assert shards.store.list(shards.kind, shards.key)[1] == 144
    refuses(shards, 1)


@BOTH
def test_a_shard_of_more_rows_is_noticed(kind, request):
    shards = request.getfixturevalue(kind)
    write(replace(shards, partition=RowPartition(700)), 2)
    refuses(shards, 2)


def test_shards_beyond_the_last_are_not_counted(tensors):
    write(replace(tensors, partition=RowPartition(900)), 3)
    assert tensors.numbers() == range(3) and values(tensors) == list(range(600))


@BOTH
def test_a_straggler_under_an_older_key_is_never_seen(kind, request):
    shards = request.getfixturevalue(kind)
    shards.path(1).unlink()
    straggler = replace(shards, key="before")
    filled(straggler)
    assert shards.missing() == [1]
    with pytest.raises(StoreError, match="000001"):
        values(shards)
    shards.store.remove_others(shards.kind, shards.key)
    write(straggler, 0)  # it is still at work
    assert shards.missing() == [1] and straggler.missing() == [1, 2]
    write(shards, 1)
    assert values(shards) == list(range(600))


def test_kinds_do_not_share_files(tensors):
    other = replace(tensors, kind="answers")
    assert other.missing() == [0, 1, 2]
    other.store.remove("answers")
    assert tensors.missing() == []


def test_shards_of_listed_sizes_are_checked_as_well(store):
    parts = ShardSet(store, "curvature", "now/sums", ListedPartition((3, 7)))
    parts.write_tensors(0, {"sum": torch.ones(2)})
    assert parts.missing() == [1]
    parts.write_tensors(1, {"sum": torch.ones(2)})
    assert parts.missing() == []
    assert replace(parts, partition=ListedPartition((3, 8))).missing() == [1]


def test_every_writer_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "000000.safetensors"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert len({one, other, path}) == 3
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    # The one that ends last stays; it was opened first.
    assert path.read_text() == "one"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_writer_that_fails_leaves_nothing_and_what_was_there_stays(tensors):
    before = tensors.path(1).read_bytes()
    with pytest.raises(RuntimeError), atomic_write(tensors.path(1)) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert tensors.path(1).read_bytes() == before
    assert sorted(path.name for path in tensors.file("").iterdir()) == [tensors.path(n).name for n in range(3)]


@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_writer_left_is_not_taken_for_a_shard(tensors, there):
    if not there:
        tensors.path(1).unlink()
    killed(tensors.path(1))
    (leftover,) = tensors.file("").glob(".*partial")
    assert leftover.read_bytes() == b"half"
    assert tensors.store.list("activations", "now") == ({0: 256, 1: 256, 2: 88} if there else {0: 256, 2: 88})
    assert tensors.missing() == ([] if there else [1])
    write(tensors, 1)
    assert values(tensors) == list(range(600))
    remove_leftovers(tensors.store.root)
    assert not leftover.exists() and tensors.missing() == []


def killed(path: Path) -> None:
    """A process that writes a file kills itself midway."""
    program = (
        "import os, signal, sys; from pathlib import Path; from concept_audit.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[3])
    assert done.returncode == -9


@BOTH
def test_two_writers_of_one_shard_leave_it_complete(kind, request):
    shards = request.getfixturevalue(kind)
    start, failed = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        for _ in range(25):
            try:
                write(shards, 1)
                assert shards.missing() == []
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert values(shards) == list(range(600))
    assert sorted(os.listdir(shards.file(""))) == [shards.path(number).name for number in range(3)]


def test_files_beside_the_shards_are_no_shards(tensors):
    tensors.store.write_json(tensors.file("index.json"), {"done": True})
    tensors.store.write_tensors(tensors.file("query.safetensors"), {"dense.0": torch.ones(1)}, {"rows": 5})
    assert tensors.store.list("activations", "now") == {0: 256, 1: 256, 2: 88}
    assert tensors.store.read_json(tensors.file("index.json")) == {"done": True}


def test_files_of_another_model_are_refused_and_both_are_named(store):
    place = store.path("curvature", "now", "curvature.json")
    store.claim(place, {"model": "one", "data": "d"}, "factors", "to have them fitted again")
    store.claim(place, {"model": "one", "data": "d"}, "factors", "to have them fitted again")
    with pytest.raises(StoreError, match="factors of another model.*model one, but this audit has other.*fitted again"):
        store.claim(place, {"model": "other", "data": "d"}, "factors", "to have them fitted again")
