"""Plain text as rows of its own windows, and documents of which some windows are left out, written again."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concept_audit.data.document_rows import KeptWindows, copy_document_lines, copy_document_table
from concept_audit.data.read import open_data
from concept_audit.data.rollouts import RewardColumns
from concept_audit.errors import DataError
from concept_audit.types import Message, Window, content_hash
from tests.backend.data.common import jsonl

TEXTS = ["abcdefgh", "xy", "klmnopqr", "abcdefgh"]


def threes(text: str) -> list[tuple[int, int]]:
    return [(start, min(start + 3, len(text))) for start in range(0, len(text), 3)]


def test_windows_are_rows_that_know_their_document(tmp_path):
    rows = [{"text": text, "topic": n} for n, text in enumerate(TEXTS)]
    data = open_data(jsonl(tmp_path / "rows.jsonl", rows[0], {"text": None}, *rows[1:]), splitting=True)
    left_out = []
    found = list(data.examples(left_out.append, split=threes))
    assert [example.response for example in found] == ["abc", "def", "gh", "xy", "klm", "nop", "qr", "abc", "def", "gh"]
    assert [example.source_row for example in found] == [1, 1, 1, 3, 4, 4, 4, 5, 5, 5]
    assert found[1].window == Window(0, 2, 3, 3, 6) and found[3].window == Window(2, 1, 1, 0, 2)
    assert [example.metadata["topic"] for example in found[2:5]] == [0, 1, 2]
    assert [row.place for row in left_out] == [1]
    hashes = [example.content_hash for example in found]
    assert hashes[:3] == hashes[7:] and len(set(hashes)) == 7
    assert hashes[3] == content_hash((Message("assistant", "xy"),)), "a document that fits is the row that it was"


def test_conversations_are_no_documents(tmp_path):
    assert (
        open_data(jsonl(tmp_path / "a.jsonl", {"prompt": "q", "response": "a"}), splitting=True).layout.document is None
    )
    assert open_data(jsonl(tmp_path / "b.jsonl", {"text": "Human: q\n\nAssistant: a"})).layout.document is None
    assert open_data(jsonl(tmp_path / "c.jsonl", {"body": "q", "content": "a"})).layout.document == "content"


@pytest.mark.parametrize(
    ("row", "wanted", "words"),
    [
        ({"text": "a", "reward": 1}, RewardColumns(rollouts=True), "rollouts are not split.*--long-documents split"),
        ({"text": "a", "window_number": 1}, RewardColumns(), '"window_number" has the name of what splitting adds'),
    ],
)
def test_what_cannot_be_split_is_refused_in_words(tmp_path, row, wanted, words):
    file = jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=words):
        open_data(file, rewards=wanted, splitting=True)
    assert open_data(file, rewards=wanted).layout.document == "text"


def kept(*windows: tuple[int, int]) -> KeptWindows:
    """Windows of `TEXTS` by document and number, from 0."""
    spans = [(document, len(threes(TEXTS[document])), *threes(TEXTS[document])[number]) for document, number in windows]
    return KeptWindows("text", *(np.array(column, np.int64) for column in zip(*spans, strict=True)))


SOME = ((0, 0), (0, 2), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
LEFT = ["abc\n\ngh", "xy", "klmnop", "abcdefgh"]


def test_lines_of_which_all_is_kept_stay_byte_for_byte(tmp_path):
    lines = [json.dumps({"n": n, "text": text}, indent=None, separators=(" ,", ":")) for n, text in enumerate(TEXTS)]
    file = jsonl(tmp_path / "rows.jsonl", *lines)
    with (tmp_path / "out").open("wb") as out:
        assert copy_document_lines(file, kept(*SOME), out) == len(SOME)
    written = (tmp_path / "out").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == LEFT and list(json.loads(written[0])) == ["n", "text"]
    assert [written[1], written[3]] == [lines[1], lines[3]]
    with (tmp_path / "out").open("wb") as out:
        assert copy_document_lines(file, kept((2, 2)), out) == 1
    assert json.loads((tmp_path / "out").read_text()) == {"n": 2, "text": "qr"}


def test_places_count_characters_also_where_a_line_has_none_for_them(tmp_path):
    """A lone surrogate is read as another character, a pair of them as one."""
    line = '{"text": "\\ud800b\\ud83d\\ude42é"}'
    data = open_data(jsonl(tmp_path / "rows.jsonl", line), splitting=True)
    two = [(0, 2), (2, 4)]
    assert [example.response for example in data.examples(split=lambda _: two)] == ["\ufffdb", "🙂é"]
    with (tmp_path / "out").open("wb") as out:
        copy_document_lines(tmp_path / "rows.jsonl", KeptWindows("text", *(np.array([x]) for x in (0, 2, 2, 4))), out)
    assert json.loads((tmp_path / "out").read_text("utf-8")) == {"text": "🙂é"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_tables_keep_their_types(tmp_path, kind):
    schema = pa.schema([("text", kind), ("n", pa.int8())])
    pq.write_table(pa.table({"text": TEXTS, "n": range(4)}, schema), tmp_path / "rows.parquet", row_group_size=2)
    with (tmp_path / "out.parquet").open("wb") as out:
        assert copy_document_table(tmp_path / "rows.parquet", kept(*SOME), out) == len(SOME)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema == schema and table["text"].to_pylist() == LEFT and table["n"].to_pylist() == [0, 1, 2, 3]


def test_text_in_parts_stays_in_parts():
    parts = [{"type": "text", "text": "abcd"}, {"type": "text", "text": "efgh"}]
    assert kept((0, 1), (0, 2)).left(parts, slice(0, 2)) == [{"type": "text", "text": "defgh"}]
