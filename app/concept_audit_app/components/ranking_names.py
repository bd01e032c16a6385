"""What rankings are called where several of one method stand side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence

from concept_audit_app.components.methods import NAMES

FORMS = ("contrast", "own_answers", "unit_normalised", "leave_out_own")


def ranking_names(rankings: Sequence[tuple[str, str]]) -> list[str]:
    """Rankings for people, from method and parameters: the method, and what tells its rankings apart."""
    parts = [_parts(json.loads(parameters)) for _, parameters in rankings]
    names: list[str] = []
    for (method, _), own in zip(rankings, parts, strict=True):
        alike = [p for (other, _), p in zip(rankings, parts, strict=True) if other == method]
        kept = [part for part in own if part == "index" or not all(part in p for p in alike)]
        name = NAMES[method] + (f" ({', '.join(kept)})" if kept else "")
        same = sum(other == name or other.startswith(f"{name} no. ") for other in names)
        names.append(f"{name} no. {same + 1}" if same else name)
    return names


def _parts(parameters: dict) -> list[str]:
    found = [f"layer {parameters['layer']}"] if "layer" in parameters else []
    found += [word for word in ("index", "identity", "kfac") if word in parameters.values()]
    found += [name.replace("_", " ") for name in FORMS if parameters.get(name)]
    found += ["by advantage"] if "advantage" in parameters else []
    return found + ([f"damping {parameters['damping']:g}"] if "damping" in parameters else [])
