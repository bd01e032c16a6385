"""A file's checksum, kept in the file itself.

The description that goes into a shard (in the header of tensors, in the footer of a table)
has room for it: the checksum is of the file with zeros in that room, so it covers every
byte, and file and checksum are in place at the same moment.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

NAME = "blake2b"
"""Of the value in the description."""
DIGITS = 32
ROOM = "0" * DIGITS
TABLE = b"PAR1"
"""What a table begins with."""


def seal(path: Path) -> None:
    """Put its checksum into a file whose description holds `ROOM` under `NAME`."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        start = _place(content, ROOM)
        content[start : start + DIGITS] = _hash(content, start).encode()


def matches(path: Path, checksum: str) -> bool:
    """Whether a file is as it was when it was sealed.

    Args:
        checksum: what its description says.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = _place(content, checksum)
        return start >= 0 and _hash(content, start) == checksum


def _place(content: mmap.mmap, digits: str) -> int:
    """Where the checksum stands: after its name, in whatever quotes; -1 if it is not there."""
    # A table's description is at its end, that of tensors at their beginning: gigabytes may come between.
    for find in (content.rfind, content.find) if content[:4] == TABLE else (content.find, content.rfind):
        name = find(NAME.encode())
        start = content.find(digits.encode(), name, name + len(NAME) + DIGITS + 16) if name >= 0 else -1
        if start >= 0:
            return start
    return -1


def _hash(content: mmap.mmap, start: int) -> str:
    hashed = hashlib.blake2b(digest_size=DIGITS // 2)
    with memoryview(content) as view:
        for part in (view[:start], ROOM.encode(), view[start + DIGITS :]):
            hashed.update(part)
            if isinstance(part, memoryview):
                part.release()
    return hashed.hexdigest()
