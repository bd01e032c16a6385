"""The file in which a probe goes from one audit to another: JSON, with its direction and its examples."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from concept_audit.concepts.probe import FITS
from concept_audit.errors import ConceptError
from concept_audit.store.examples import messages_from_json, messages_json
from concept_audit.store.workspace import SavedProbe, check_probe_name
from concept_audit.types import LabelledExample, ProbeFit

KIND = "concept-audit probe"
LENGTH_TOLERANCE = 1e-3


def probe_to_json(probe: SavedProbe, model: str, examples: Sequence[LabelledExample]) -> str:
    """The text of a file.

    Args:
        model: the name of the model, for people; its fingerprint is what counts.
    """
    told = {
        "kind": KIND,
        "name": probe.name,
        "layer": probe.layer,
        "fit": probe.fit,
        "model_fingerprint": probe.model_fingerprint,
        "model": model,
        "details": dict(probe.details),
        "direction": [float(x) for x in probe.direction],
        "examples": [{"messages": json.loads(messages_json(e.messages)), "label": e.label} for e in examples],
    }
    return json.dumps(told, ensure_ascii=False, indent=1) + "\n"


def probe_from_json(content: str, name: str | None = None) -> tuple[SavedProbe, list[LabelledExample]]:
    """A probe and its examples, from the text of a file.

    Args:
        name: another name for it.

    Raises:
        ConceptError: not such a file, or its name will not do.
    """
    try:
        told = json.loads(content)
        if told["kind"] != KIND:
            raise KeyError("kind")
        wanted = check_probe_name(name or told["name"])
        direction = np.asarray(told["direction"], np.float32)
        examples = [
            LabelledExample(messages_from_json(json.dumps(e["messages"])), int(e["label"])) for e in told["examples"]
        ]
        fit: ProbeFit = told["fit"]
        if fit not in FITS:
            raise KeyError("fit")
        fingerprint = str(told["model_fingerprint"])
        saved = SavedProbe(wanted, 1, int(told["layer"]), fit, direction, dict(told["details"]), fingerprint)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConceptError(
            f"not a probe that was taken away from here ({error!r}); choose a file of `Export`"
        ) from error
    return saved, examples


def check_probe(probe: SavedProbe, fingerprint: str) -> None:
    """Refuse a probe that means nothing to the model of this fingerprint.

    Raises:
        ConceptError: it was made for another model, or its direction is not of unit length.
    """
    if probe.model_fingerprint != fingerprint:
        raise ConceptError(
            f"probe {probe.name!r}: made for a model of fingerprint {probe.model_fingerprint}, this audit has "
            f"{fingerprint}; upload its examples instead and train it here"
        )
    length = float(np.linalg.norm(probe.direction))
    if not np.isfinite(probe.direction).all() or abs(length - 1) > LENGTH_TOLERANCE:
        raise ConceptError(f"probe {probe.name!r}: its direction is not of unit length; the file is damaged")
