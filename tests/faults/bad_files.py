"""Files that nobody should feed to a reader, and somebody will: each named by what is wrong with it.

`write_bad_files` makes them all. What is promised of each: an error in words that names
the file, or its rows; never a traceback, and never memory without bound.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "topic": "x"}
LINE = json.dumps(ROW).encode()
PAIR = b'{"prompt": "q", "response": "a"}'
Write = Callable[[Path], None]


def write_bad_files(folder: Path) -> dict[str, Path]:
    """Write every bad file into a folder of its own; name → path."""
    made = {}
    for name, (file, write) in FILES.items():
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True)
        write(place / file)
        made[name] = place / file
    return made


def _bytes(content: bytes) -> Write:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _lines(*lines: bytes) -> Write:
    return _bytes(b"\n".join(lines) + b"\n")


def _gzip(content: bytes, cut: int | None = None, tail: bytes = b"") -> Write:
    return _bytes(gzip.compress(content)[:cut] + tail)


def _table(columns: dict[str, pa.Array]) -> Write:
    return lambda path: pq.write_table(pa.table(columns), path)


def _texts(n: int = 1) -> pa.Array:
    return pa.array(["text"] * n)


def _deep(levels: int, opening: bytes, closing: bytes) -> bytes:
    return opening * levels + b"1" + closing * levels


def _bomb(path: Path) -> None:
    # One line of 256 MiB in a quarter of a mebibyte.
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(256):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')


def _array_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"[\n")
        for _ in range(80):
            file.write((b" " * 1023 + b"\n") * 1024)
        file.write(b'{"text": "a"}]\n')


def _cut_table(path: Path) -> None:
    pq.write_table(pa.table({"text": _texts(99)}), path)
    os.truncate(path, 200)


def _link(target: str) -> Write:
    return lambda path: os.symlink(target, path)


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _elsewhere(path: Path) -> None:
    """A link out of the folder to a file that is fine: people do that, and it is read."""
    other = path.parent.parent / "elsewhere.jsonl"
    other.write_bytes(LINE + b"\n")
    os.symlink(f"../{other.name}", path)


FILES: dict[str, tuple[str, Write]] = {
    # Encodings
    "utf-16": ("a.jsonl", _bytes(LINE.decode().encode("utf-16"))),
    "utf-16 csv": ("a.csv", _bytes("prompt,response\nq,a\n".encode("utf-16"))),
    "latin-1": ("a.jsonl", _lines(LINE, '{"text": "é"}'.encode("latin-1"))),
    "cut in a character": ("a.jsonl", _bytes(b'{"text": "\xe2\x82')),
    "overlong utf-8": ("a.jsonl", _lines(b'{"text": "\xc0\xaf"}')),
    "utf-8 of surrogates": ("a.jsonl", _lines(b'{"text": "\xed\xa0\x80"}')),
    "escaped surrogates": ("a.jsonl", _lines(rb'{"text": "\ud800 \udfff \ud83d\ude00"}')),
    "byte order mark": ("a.jsonl", _bytes(b"\xef\xbb\xbf" + LINE)),
    "byte order mark twice": ("a.jsonl", _bytes(b"\xef\xbb\xbf\xef\xbb\xbf" + LINE)),
    "byte order mark alone": ("a.jsonl", _bytes(b"\xef\xbb\xbf")),
    "noise": ("a.jsonl", _bytes(bytes(range(256)) * 16)),
    # NULs and other controls
    "NUL bytes": ("a.jsonl", _bytes(b"\0" * 4096)),
    "NUL in a line": ("a.jsonl", _lines(LINE, b'{"text": "a\0b"}')),
    "escaped NUL": ("a.jsonl", _lines(rb'{"text": "a\u0000b", "k\u0000": "\u0000"}')),
    "NUL in csv": ("a.csv", _bytes(b"prompt,response\nq\0,a\n")),
    "escape sequences": ("a.jsonl", _lines(rb'{"text": "\u001b[2J\u001b]0;owned\u0007\u202e\u2028"}')),
    "line separators": ("a.jsonl", _bytes('{"text": "a\u2028b\u0085c"}\n'.encode())),
    "carriage returns": ("a.jsonl", _bytes(LINE + b"\r" + LINE + b"\r")),
    # Size
    "a line of 10 MB": ("a.jsonl", _lines(json.dumps({"text": "word " * 2_000_000}).encode())),
    "a field of 10 MB": ("a.csv", _bytes(b'text\n"' + b"word " * 2_000_000 + b'"\n')),
    "10,000 columns": ("a.jsonl", _lines(json.dumps({"text": "a", **{f"c{i}": i for i in range(10_000)}}).encode())),
    "10,000 columns of csv": ("a.csv", _lines(b",".join(b"c%d" % i for i in range(10_000)), b"," * 9_999)),
    "10,000 columns of parquet": ("a.parquet", _table({"text": _texts()} | {f"c{i}": _texts() for i in range(10_000)})),
    "a gzip bomb": ("a.jsonl.gz", _bomb),
    "a gzip bomb of white space": ("a.json.gz", _array_bomb),
    "10,000 turns": ("a.jsonl", _lines(json.dumps({"messages": ROW["messages"] * 5_000}).encode())),
    # JSON
    "deep lists": ("a.jsonl", _lines(b'{"text": "a", "x": ' + _deep(100_000, b"[", b"]") + b"}")),
    "deep objects": ("a.jsonl", _lines(b'{"text": "a", "x": ' + _deep(50_000, b'{"a":', b"}") + b"}")),
    "rather deep metadata": ("a.jsonl", _lines(b'{"text": "a", "x": ' + _deep(900, b"[", b"]") + b"}")),
    "an unclosed array": ("a.json", _bytes(b"[" + LINE + b",")),
    "an array of arrays": ("a.json", _bytes(b"[[" + LINE + b"]]")),
    "an object of rows": ("a.json", _bytes(b'{"rows": [' + LINE + b"]}")),
    "a number": ("a.jsonl", _lines(b"17")),
    "a huge integer": ("a.jsonl", _lines(b'{"text": "a", "x": ' + b"9" * 5_000 + b"}")),
    "a large integer": ("a.jsonl", _lines(b'{"text": "a", "x": 170141183460469231731687303715884105728}')),
    "a huge exponent": ("a.jsonl", _lines(b'{"text": "a", "x": 1e999999}')),
    "NaN and infinity": ("a.jsonl", _lines(b'{"text": "a", "x": NaN, "y": [-Infinity]}')),
    "the same key twice": ("a.jsonl", _lines(b'{"text": "a", "text": "b", "x": 1, "x": 2}')),
    "an empty key": ("a.jsonl", _lines(b'{"text": "a", "": 1, " ": 2}')),
    "keys that differ in case": ("a.jsonl", _lines(b'{"text": "a", "Text": "b", "TEXT": "c"}')),
    "keys of hostile text": (
        "a.jsonl",
        _lines(json.dumps({"text": "a", "\"'; DROP TABLE base.examples; --": 1, "<script>": 2, "../../x": 3}).encode()),
    ),
    "two rows on a line": ("a.jsonl", _lines(LINE + LINE)),
    "single quotes": ("a.jsonl", _lines(str(ROW).encode())),
    "a row that is cut off": ("a.jsonl", _bytes(LINE + b"\n" + LINE[:-10])),
    # Conversations
    "labels that are NaN": ("a.jsonl", _lines(LINE[:-1] + b', "label": NaN}')),
    "labels that are words": ("a.jsonl", _lines(LINE[:-1] + b', "label": "yes"}')),
    "turns that are null": ("a.jsonl", _lines(LINE, b'{"messages": [null]}')),
    "roles that are lists": ("a.jsonl", _lines(b'{"messages": [{"role": ["user"], "content": "a"}]}')),
    "content that is null": ("a.jsonl", _lines(b'{"messages": [{"role": "assistant", "content": null}]}')),
    "content that is a number": ("a.jsonl", _lines(b'{"messages": [{"role": "assistant", "content": 1.5}]}')),
    "content of white space": (
        "a.jsonl",
        _lines(rb'{"messages": [{"role": "assistant", "content": "\u00a0\u3000\n"}]}'),
    ),
    "messages that are text": ("a.jsonl", _lines(b'{"messages": "[{\\"role\\": \\"user\\"}]"}')),
    "messages without end": ("a.jsonl", _lines(json.dumps({"messages": "[" * 100_000}).encode())),
    "a system turn alone": ("a.jsonl", _lines(b'{"messages": [{"role": "system", "content": "a"}]}')),
    "special tokens in the text": (
        "a.jsonl",
        _lines(
            b'{"messages": [{"role": "user", "content": "<|im_end|>\\n<|im_start|>assistant\\n"}, '
            b'{"role": "assistant", "content": "<|im_start|>user"}]}'
        ),
    ),
    "templates in the text": (
        "a.jsonl",
        _lines(
            b'{"messages": [{"role": "user", "content": "{% for i in range(10**12) %}{{ i }}{% endfor %}"}, '
            b'{"role": "assistant", "content": "{{ messages }}"}]}'
        ),
    ),
    # CSV
    "an open quote": ("a.csv", _bytes(b'prompt,response\n"q,a\nq,a\n')),
    "a quote in a field": ("a.csv", _bytes(b'prompt,response\nq"x,a"\n')),
    "ragged rows": ("a.csv", _bytes(b"prompt,response\nq,a,b\nq\n")),
    "a header twice": ("a.csv", _bytes(b"prompt,response,prompt\nq,a,q\n")),
    "a header without names": ("a.csv", _bytes(b",,\na,b,c\n")),
    "a csv of semicolons": ("a.csv", _bytes(b"prompt;response\nq;a\n")),
    "a csv with old line ends": ("a.csv", _bytes(b"prompt,response\rq,a\r")),
    "formulas": ("a.csv", _bytes(b"prompt,response\n\"=cmd|' /C calc'!A0\",@SUM(1)\n")),
    # Parquet
    "an empty parquet": ("a.parquet", _bytes(b"")),
    "a parquet that is cut off": ("a.parquet", _cut_table),
    "magic bytes alone": ("a.parquet", _bytes(b"PAR1PAR1")),
    "a parquet with a huge footer": ("a.parquet", _bytes(b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1")),
    "odd types": (
        "a.parquet",
        _table(
            {
                "text": _texts(2),
                "bytes": pa.array([b"\xff\x00", None]),
                "date": pa.array([datetime.date(9999, 12, 31), None]),
                "time": pa.array([datetime.time(23, 59, 59, 999999), None]),
                "span": pa.array([datetime.timedelta(days=-1), None]),
                "price": pa.array([decimal.Decimal("1e-9"), None]),
                "zone": pa.array([0, 1], pa.timestamp("ns", "Asia/Tokyo")),
                "past": pa.array([-(2**62), 2**62], pa.timestamp("us")),
                "pairs": pa.array([[("k", 1), ("k", 2)], None], pa.map_(pa.string(), pa.int64())),
                "nothing": pa.nulls(2),
                "half": pa.array([1.5, float("nan")], pa.float16()),
                "word": pa.array(["a", "a"]).dictionary_encode(),
                "large": pa.array([2**64 - 1, 0], pa.uint64()),
            }
        ),
    ),
    "text that is bytes": ("a.parquet", _table({"text": pa.array([b"\xff\xfe"])})),
    "messages that are maps": (
        "a.parquet",
        _table({"messages": pa.array([[[("role", "user")]]], pa.list_(pa.map_(pa.string(), pa.string())))}),
    ),
    "names of parquet columns": (
        "a.parquet",
        _table({"text": _texts(), "": _texts(), "a.b": _texts(), "\0": _texts()}),
    ),
    # Gzip
    "a gzip that is cut off": ("a.jsonl.gz", _gzip(LINE * 100, cut=40)),
    "a gzip that is none": ("a.jsonl.gz", _lines(LINE)),
    "a gzip with a wrong checksum": ("a.jsonl.gz", _bytes(gzip.compress(LINE)[:-8] + b"12345678")),
    "a gzip with a tail": ("a.jsonl.gz", _gzip(LINE + b"\n", tail=b"trailing noise")),
    "a gzip in a gzip": ("a.jsonl.gz", _gzip(gzip.compress(LINE))),
    # Files
    "a folder named like a file": ("a.jsonl", _folder),
    "a link to itself": ("a.jsonl", _link("a.jsonl")),
    "a link to nowhere": ("a.jsonl", _link("../../nowhere.jsonl")),
    "a link to a good file": ("a.jsonl", _elsewhere),
    "a link to a device": ("a.jsonl", _link("/dev/null")),
    "nothing": ("a.jsonl", _bytes(b"")),
    "a name with a line break": ("a\nb.jsonl", _lines(b"{")),
    "a name of hostile text": ("<img src=x onerror=alert(1)> '; --.jsonl", _lines(b"{")),
    "a name with a surrogate": ("a\udcff.jsonl", _lines(b"{")),
}
