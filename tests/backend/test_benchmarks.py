"""Benchmarks are run seldom: what they name has to be there when they are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.benchmarks import index_memory

BENCHMARKS = sorted(path.stem for path in Path(index_memory.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_benchmark_imports_is_there(name):
    try:
        importlib.import_module(f"tests.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in ("concept_audit", "concept_audit_app", "tests"):
            raise
        pytest.skip(f"{error.name} is not installed")


def test_the_bounds_that_the_memory_benchmark_makes_smaller_are_there():
    index_memory.shrink(1)
