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
    from backend.concepts.features_of_text import TextFeatures
    from backend.concepts.heatmap import Heatmap, Segment
    from backend.concepts.probe import MIN_EACH, TrainedProbe
    from backend.concepts.probe_report import ProbeReport
    from backend.data.conversation import Columns
    from backend.data.read import read_labelled, read_prompts, read_queries
    from backend.errors import AuditError, ConceptError, DataError, ModelError, StoreError
    from backend.evidence.training import Recipe
    from backend.export import FORMATS
    from backend.model.load import ModelOptions
    from backend.pipeline.attribution import InfluenceOptions
    from backend.pipeline.build import build
    from backend.pipeline.index import IndexOptions
    from backend.pipeline.options import BuildOptions
    from backend.pipeline.validation.options import Candidate, ValidateOptions
    from backend.progress import Progress, Stage
    from backend.store.compare import Agreement
    from backend.store.evidence import Evidence
    from backend.store.filters import RowFilter
    from backend.store.flags import FlagChange
    from backend.store.layout import audit_names
    from backend.types import METHODS, Concept, Example, LabelledExample, Message

# Loaded when first used: torch and transformers take seconds, and `--help` needs neither.
_HOME = {
    "FORMATS": "export",
    "METHODS": "types",
    "MIN_EACH": "concepts.probe",
    "Agreement": "store.compare",
    "Audit": "audit",
    "AuditError": "errors",
    "BuildOptions": "pipeline.options",
    "Candidate": "pipeline.validation.options",
    "Columns": "data.conversation",
    "Concept": "types",
    "ConceptError": "errors",
    "DataError": "errors",
    "Evidence": "store.evidence",
    "Example": "types",
    "FlagChange": "store.flags",
    "Heatmap": "concepts.heatmap",
    "IndexOptions": "pipeline.index",
    "InfluenceOptions": "pipeline.attribution",
    "LabelledExample": "types",
    "Message": "types",
    "ModelError": "errors",
    "ModelOptions": "model.load",
    "ProbeReport": "concepts.probe_report",
    "Progress": "progress",
    "Recipe": "evidence.training",
    "RowFilter": "store.filters",
    "Segment": "concepts.heatmap",
    "Stage": "progress",
    "StoreError": "errors",
    "TextFeatures": "concepts.features_of_text",
    "TrainedProbe": "concepts.probe",
    "ValidateOptions": "pipeline.validation.options",
    "audit_names": "store.layout",
    "build": "pipeline.build",
    "read_labelled": "data.read",
    "read_prompts": "data.read",
    "read_queries": "data.read",
}
__all__ = [
    "FORMATS",
    "METHODS",
    "MIN_EACH",
    "Agreement",
    "Audit",
    "AuditError",
    "BuildOptions",
    "Candidate",
    "Columns",
    "Concept",
    "ConceptError",
    "DataError",
    "Evidence",
    "Example",
    "FlagChange",
    "Heatmap",
    "IndexOptions",
    "InfluenceOptions",
    "LabelledExample",
    "Message",
    "ModelError",
    "ModelOptions",
    "ProbeReport",
    "Progress",
    "Recipe",
    "RowFilter",
    "Segment",
    "Stage",
    "StoreError",
    "TextFeatures",
    "TrainedProbe",
    "ValidateOptions",
    "audit_names",
    "build",
    "read_labelled",
    "read_prompts",
    "read_queries",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
