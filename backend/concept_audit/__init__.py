"""Audit the training data of a language model: which rows push it towards a concept.

from concept_audit import Audit, BuildOptions, ModelOptions, build

build(BuildOptions(data="train.jsonl", out=Path("cache/mine"), model=ModelOptions("smollm2-135m-instruct")))
audit = Audit("cache/mine")
audit.train_probe("flattery", read_labelled("examples.jsonl"))
audit.rank("flattery", top=50)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Threads of a product that wait for each other spin for microseconds, then sleep. They would for milliseconds, and with
# much beside them on the processor, such as browsers, that can make a pass over the model several times as slow
# (tests/benchmarks/waiting.py). Read when PyTorch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from concept_audit.addresses import is_allowed
    from concept_audit.audit.audit import Audit
    from concept_audit.concepts.features_of_text import TextFeatures
    from concept_audit.concepts.heatmap import Heatmap, Segment
    from concept_audit.concepts.options import SaeTraining
    from concept_audit.concepts.probe import MIN_EACH, TrainedProbe
    from concept_audit.concepts.probe_report import ProbeReport
    from concept_audit.data.conversation import Columns
    from concept_audit.data.read import read_labelled, read_prompts, read_queries
    from concept_audit.data.rollouts import RewardColumns
    from concept_audit.data.write import FORMATS, Format
    from concept_audit.errors import AuditError, ConceptError, DataError, ModelError, StoreError
    from concept_audit.evidence.forecast_report import forecast_table, forecast_verdict, probe_table
    from concept_audit.evidence.options import Recipe
    from concept_audit.influence.options import (
        CurvatureOptions,
        IndexOptions,
        InfluenceOptions,
        QueryOptions,
        ScoringOptions,
    )
    from concept_audit.metrics import precision_recall
    from concept_audit.model.options import ModelOptions
    from concept_audit.pipeline.build import build
    from concept_audit.pipeline.engines.on_ray import RayEngine
    from concept_audit.pipeline.engines.processes import ProcessEngine
    from concept_audit.pipeline.options import BuildOptions
    from concept_audit.pipeline.validation.forecast_options import ForecastTrial
    from concept_audit.pipeline.validation.options import Candidate, ValidateOptions
    from concept_audit.progress import Progress, Stage
    from concept_audit.store.bulk_labels import LabelChange
    from concept_audit.store.compare import Agreement
    from concept_audit.store.evidence import Evidence
    from concept_audit.store.examples import messages_from_json
    from concept_audit.store.filters import RowFilter
    from concept_audit.store.flags import FlagChange
    from concept_audit.store.listing import audit_names
    from concept_audit.store.workspace import SavedProbe
    from concept_audit.types import (
        METHODS,
        Concept,
        Example,
        LabelledExample,
        Message,
        Window,
        methods_of,
        usual_method,
    )

# Loaded when first used: torch and transformers take seconds, and `--help` needs neither.
_HOME = {
    "FORMATS": "data.write",
    "METHODS": "types",
    "MIN_EACH": "concepts.probe",
    "Agreement": "store.compare",
    "Audit": "audit.audit",
    "AuditError": "errors",
    "BuildOptions": "pipeline.options",
    "Candidate": "pipeline.validation.options",
    "Columns": "data.conversation",
    "Concept": "types",
    "ConceptError": "errors",
    "CurvatureOptions": "influence.options",
    "DataError": "errors",
    "Evidence": "store.evidence",
    "Example": "types",
    "FlagChange": "store.flags",
    "ForecastTrial": "pipeline.validation.forecast_options",
    "Format": "data.write",
    "Heatmap": "concepts.heatmap",
    "IndexOptions": "influence.options",
    "InfluenceOptions": "influence.options",
    "LabelChange": "store.bulk_labels",
    "LabelledExample": "types",
    "Message": "types",
    "ModelError": "errors",
    "ModelOptions": "model.options",
    "ProbeReport": "concepts.probe_report",
    "ProcessEngine": "pipeline.engines.processes",
    "Progress": "progress",
    "QueryOptions": "influence.options",
    "RayEngine": "pipeline.engines.on_ray",
    "Recipe": "evidence.options",
    "RewardColumns": "data.rollouts",
    "RowFilter": "store.filters",
    "SaeTraining": "concepts.options",
    "SavedProbe": "store.workspace",
    "ScoringOptions": "influence.options",
    "Segment": "concepts.heatmap",
    "Stage": "progress",
    "StoreError": "errors",
    "TextFeatures": "concepts.features_of_text",
    "TrainedProbe": "concepts.probe",
    "ValidateOptions": "pipeline.validation.options",
    "Window": "types",
    "audit_names": "store.listing",
    "build": "pipeline.build",
    "forecast_table": "evidence.forecast_report",
    "forecast_verdict": "evidence.forecast_report",
    "is_allowed": "addresses",
    "messages_from_json": "store.examples",
    "methods_of": "types",
    "precision_recall": "metrics",
    "probe_table": "evidence.forecast_report",
    "read_labelled": "data.read",
    "read_prompts": "data.read",
    "read_queries": "data.read",
    "usual_method": "types",
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
    "CurvatureOptions",
    "DataError",
    "Evidence",
    "Example",
    "FlagChange",
    "ForecastTrial",
    "Format",
    "Heatmap",
    "IndexOptions",
    "InfluenceOptions",
    "LabelChange",
    "LabelledExample",
    "Message",
    "ModelError",
    "ModelOptions",
    "ProbeReport",
    "ProcessEngine",
    "Progress",
    "QueryOptions",
    "RayEngine",
    "Recipe",
    "RewardColumns",
    "RowFilter",
    "SaeTraining",
    "SavedProbe",
    "ScoringOptions",
    "Segment",
    "Stage",
    "StoreError",
    "TextFeatures",
    "TrainedProbe",
    "ValidateOptions",
    "Window",
    "audit_names",
    "build",
    "forecast_table",
    "forecast_verdict",
    "is_allowed",
    "messages_from_json",
    "methods_of",
    "precision_recall",
    "probe_table",
    "read_labelled",
    "read_prompts",
    "read_queries",
    "usual_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
