"""Audit the training data of a language model: which rows push it towards a concept.

    from backend import Audit, BuildOptions, ModelOptions, build

    build(BuildOptions(data="train.jsonl", out=Path("cache/mine"), model=ModelOptions("smollm2-135m-instruct")))
    audit = Audit("cache/mine")
    audit.train_probe("flattery", read_labelled("examples.jsonl"))
    audit.rank("flattery", top=50)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backend.audit import Audit
    from backend.data.conversation import Columns
    from backend.data.read import read_labelled
    from backend.errors import AuditError, ConceptError, DataError, ModelError, StoreError
    from backend.model.load import ModelOptions
    from backend.pipeline.build import build
    from backend.pipeline.options import BuildOptions
    from backend.store.filters import RowFilter
    from backend.types import Concept, Example, LabelledExample, Message

# Loaded when first used: torch and transformers take seconds, and `--help` needs neither.
_HOME = {
    "Audit": "audit",
    "AuditError": "errors",
    "BuildOptions": "pipeline.options",
    "Columns": "data.conversation",
    "Concept": "types",
    "ConceptError": "errors",
    "DataError": "errors",
    "Example": "types",
    "LabelledExample": "types",
    "Message": "types",
    "ModelError": "errors",
    "ModelOptions": "model.load",
    "RowFilter": "store.filters",
    "StoreError": "errors",
    "build": "pipeline.build",
    "read_labelled": "data.read",
}
__all__ = [
    "Audit",
    "AuditError",
    "BuildOptions",
    "Columns",
    "Concept",
    "ConceptError",
    "DataError",
    "Example",
    "LabelledExample",
    "Message",
    "ModelError",
    "ModelOptions",
    "RowFilter",
    "StoreError",
    "build",
    "read_labelled",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
