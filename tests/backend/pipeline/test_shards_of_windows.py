"""Documents whose windows lie in several shards of rows."""

from __future__ import annotations

import pyarrow.parquet as pq

from concept_audit.data.read import open_data
from concept_audit.pipeline.read import read_rows
from concept_audit.progress import Stage
from concept_audit.store.partition import RowPartition
from concept_audit.store.shard_store import TABLE, RowShards, ShardStore
from tests.conftest import write_jsonl


def test_documents_may_lie_in_several_shards_of_which_one_is_made_again(tmp_path):
    data = open_data(write_jsonl(tmp_path / "rows.jsonl", [{"text": str(n) * 7} for n in range(10, 1_500)]))
    store, made = ShardStore(tmp_path / "shards"), Stage("", None, "rows")

    def read():
        assert read_rows(store, "key", data, None, made, lambda text: [(0, 5), (5, 9), (9, len(text))]) == 0
        kept = RowShards(store, "rows", "key", RowPartition(3 * 1_490), TABLE)
        return [row for number in kept.numbers() for row in pq.read_table(kept.path(number)).to_pylist()], kept

    rows, kept = read()
    assert len(list(kept.numbers())) > 2 and len(rows) == 3 * 1_490
    assert [row["document"] for row in rows] == [n for n in range(1_490) for _ in range(3)]
    kept.path(1).unlink()
    assert read()[0] == rows
