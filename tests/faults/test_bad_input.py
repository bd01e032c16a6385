"""Bad input: an error in words that names the file, or rows; never a traceback, never memory without bound."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from concept_audit.data import formats
from concept_audit.data.read import read_examples, read_labelled
from concept_audit.errors import AuditError
from tests.faults.bad_files import FILES, write_bad_files
from tests.faults.fuzz_readers import fuzz

MEMORY = 1 << 30
"""What reading the worst of them may add to the process, in bytes of address space."""


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> dict[str, Path]:
    return write_bad_files(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def bounded_memory():
    """Whoever takes a bomb whole meets a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("name", "read"), [(name, read_labelled if "label" in name else read_examples) for name in FILES]
)
def test_a_bad_file_gives_its_rows_or_an_error_in_words(bad_files, name, read, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_ARRAY", 64 << 20)
    path = bad_files[name]
    try:
        for row in read(path):
            assert all(isinstance(turn.content, str) for turn in row.messages)
            "".join(turn.content for turn in row.messages).encode("utf-8")
    except AuditError as error:
        told = str(error)
        assert path.name.split(".")[0][:20] in told, f"does not name the file: {told}"
        assert len(told) < 2_000 and told.strip() == told, "not a sentence"


def test_files_damaged_at_random_give_rows_or_an_error_in_words():
    found = fuzz(examples=600, number=1)
    assert min(found.values()) > 50, "the damage is too great, or too small, to tell much"
