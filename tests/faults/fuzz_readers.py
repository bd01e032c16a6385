"""Files that nobody thought of: sound ones, damaged at random, and rows of random JSON.

What is promised is what `test_bad_input` asks of files that somebody did think of: rows, or
an error in words. A minute of it runs with the tests; for longer::

    python -m tests.faults.fuzz_readers --minutes 30
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from concept_audit.data.read import read_examples
from concept_audit.errors import AuditError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": 'a, "b"\n\u00e9'}]
ROWS = [{"messages": TURNS, "n": 1}, {"messages": TURNS * 2, "n": None}]
PAIRS = [{"prompt": "q", "response": 'a, "b"\n', "tag": "x"}, {"prompt": "p", "response": "b", "tag": ""}]


def _csv(delimiter: str) -> bytes:
    quoted = [delimiter.join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in PAIRS]
    return "\n".join([delimiter.join(PAIRS[0]), *quoted]).encode()


def _parquet(rows: list[dict]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


JSONL = b"\n".join(json.dumps(row).encode() for row in ROWS)
SOUND = {
    "a.jsonl": JSONL,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": _csv(","),
    "a.tsv": _csv("\t"),
    "a.jsonl.gz": gzip.compress(JSONL, mtime=0),
    "a.parquet": _parquet(ROWS),
}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None]) | values
turns = st.fixed_dictionaries({}, optional={"role": roles, "content": values, "from": roles, "value": values})
named = st.sampled_from(
    ["messages", "conversations", "prompt", "response", "text", "instruction", "input", "output", "chosen", "label"]
)
rows = st.dictionaries(named | st.text(max_size=4), st.lists(turns | values, max_size=3) | values, max_size=4)
sound_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(min_size=1, max_size=8)}),
    min_size=1,
    max_size=3,
)
chats = st.builds(
    lambda turns, rest: {"messages": turns, **rest},
    sound_turns,
    st.dictionaries(st.text(max_size=4), values, max_size=3),
)
written = st.lists(chats | chats | rows | values, min_size=1, max_size=3).map(
    lambda many: ("a.jsonl", "\n".join(json.dumps(row) for row in many).encode("utf-8", "surrogatepass"))
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A sound file in which some bytes are others, are gone, or come twice."""
    name = draw(st.sampled_from(sorted(SOUND)))
    content = bytearray(SOUND[name])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 16))
        with_ = draw(
            st.binary(max_size=16) | st.sampled_from([b"\0", b"\n", b'"', b",", b"\xff", b"{", b"]", b"1e999"])
        )
        content[at : at + length] = with_
    return name, bytes(content)


def check(file: tuple[str, bytes], folder: Path) -> bool:
    """Read a file; whether it gave rows. Anything but rows or an error in words is raised."""
    name, content = file
    path = folder / name
    path.write_bytes(content)
    try:
        for row in read_examples(path):
            for turn in row.messages:
                turn.content.encode("utf-8")
            json.dumps(dict(row.metadata), allow_nan=False).encode("utf-8")
    except AuditError as error:
        assert str(error).startswith((name, str(path))), f"does not name the file: {error}"
        return False
    return True


def fuzz(examples: int, number: int) -> dict[str, int]:
    """Try so many files, drawn from one seed; how many gave rows, and how many an error."""
    found = {"rows": 0, "errors": 0}
    with tempfile.TemporaryDirectory() as folder:

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(damaged() | written)
        def run(file: tuple[str, bytes]) -> None:
            found["rows" if check(file, Path(folder)) else "errors"] += 1

        run()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    end, total = time.monotonic() + asked.minutes * 60, {"rows": 0, "errors": 0}
    while time.monotonic() < end:
        for kind, many in fuzz(2_000, asked.seed).items():
            total[kind] += many
        asked.seed += 1
        print(
            f"seed {asked.seed}: {total['rows']:,} files gave rows, {total['errors']:,} an error in words", flush=True
        )
