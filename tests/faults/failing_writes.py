"""A full or broken disk for one process: the k-th call that changes a file below a directory fails, or all from it on.

`failing_writes.c` stands before the C library's own functions, so it counts Python's writes as well as DuckDB's,
Arrow's and those of safetensors.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path


def compiled(place: Path) -> Path | None:
    """The library; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = place / "failing_writes.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def arm(below: str, number: int, error: int, once: bool) -> None:
    """From now on, in this process, count what changes a file below a directory, and have some of it fail.

    Args:
        number: the first call that fails, counting from 1; 0 for none.
        error: what it fails with, such as `errno.ENOSPC`.
        once: the calls after it succeed.
    """
    ctypes.CDLL(None).fault_arm(below.encode(), ctypes.c_long(number), error, int(once))


def count() -> int:
    """How many calls there have been."""
    library = ctypes.CDLL(None)
    library.fault_count.restype = ctypes.c_long
    return library.fault_count()
