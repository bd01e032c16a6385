"""The file in which a probe goes from one audit to another: JSON, with its direction and its examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from concept_audit.concepts.probe import FITS
from concept_audit.data.turns import read_tools, read_turns
from concept_audit.errors import ConceptError, DataError, first_line
from concept_audit.store.examples import messages_json
from concept_audit.store.workspace import SavedProbe, check_probe_name
from concept_audit.types import ROLES, TOOLS, LabelledExample, ProbeFit

KIND = "concept-audit probe"
LENGTH_TOLERANCE = 1e-3
LARGEST = 1e30
"""Of a number in a file; NaN and infinity are none."""


def probe_to_json(probe: SavedProbe, model: str, examples: Sequence[LabelledExample]) -> str:
    """The text of a file.

    Args:
        model: the name of the model, for people; its fingerprint is what counts.
    """
    values = {
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
    return json.dumps(values, ensure_ascii=False, indent=1) + "\n"


def probe_from_json(content: str, name: str | None = None) -> tuple[SavedProbe, list[LabelledExample]]:
    """A probe and its examples, from the text of a file.

    The file may come from anybody, and what it holds is shown on every page: each value is checked.

    Args:
        name: another name for it.

    Raises:
        ConceptError: not such a file, or its name will not do.
    """
    try:
        values = json.loads(content)
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise ValueError(f"its kind is not {KIND!r}")
        wanted = check_probe_name(name or _text(values, "name"))
        direction = np.array([_number(x, "direction") for x in _list(values, "direction")], np.float32)
        if direction.ndim != 1 or not len(direction):
            raise ValueError("direction has no numbers")
        examples = [_example(example) for example in _list(values, "examples")]
        fit: ProbeFit | None = next((fit for fit in FITS if fit == values.get("fit")), None)
        if fit is None:
            _no("fit")
        layer = _count(values, "layer")
        details = _details(values.get("details"))
        saved = SavedProbe(wanted, 1, layer, fit, direction, details, _text(values, "model_fingerprint"))
    except (ValueError, RecursionError) as error:
        raise ConceptError(
            f"not a probe that was taken away from here ({first_line(error)}); choose a file of `Export`"
        ) from error
    return saved, examples


def _details(found: Any) -> dict[str, Any]:
    """What training reported of a probe: the values that are shown or reckoned with, and no others."""
    if not isinstance(found, dict):
        raise ValueError("details is no object")
    details: dict[str, Any] = {name: _share(found, name) for name in ("auroc", "auroc_low", "auroc_high")}
    details |= {name: _count(found, name) for name in ("n_positive", "n_negative")}
    details |= {name: _number(found[name], name) for name in ("boundary", "threshold") if name in found}
    details["tried"] = [
        {"layer": _count(t, "layer"), "fit": str(t.get("fit")), "auroc": _share(t, "auroc")}
        for t in _list(found, "tried")
        if isinstance(t, dict) and t.get("fit") in FITS
    ]
    return details


def _example(found: Any) -> LabelledExample:
    if not isinstance(found, dict) or found.get("label") not in (0, 1) or isinstance(found["label"], bool):
        raise ValueError("an example has no label 0 or 1")
    turns = _list(found, "messages")
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in (*ROLES, TOOLS)
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(
                f"an example has a turn without content, or with a role that is none of {', '.join(ROLES)}"
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("an example does not end with a turn of the assistant")
    try:
        offered = [read_tools(turn["content"], "tools") for turn in turns if turn["role"] == TOOLS]
        said = read_turns([turn for turn in turns if turn["role"] != TOOLS], "messages", "")
    except DataError as error:
        raise ValueError(str(error)) from error
    return LabelledExample((*chain.from_iterable(offered), *said), int(found["label"]))


def _list(values: dict[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    return found if isinstance(found, list) else _no(name)


def _text(values: dict[str, Any], name: str) -> str:
    found = values.get(name)
    return found if isinstance(found, str) else _no(name)


def _count(values: dict[str, Any], name: str) -> int:
    found = values.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else _no(name)


def _share(values: dict[str, Any], name: str) -> float:
    found = _number(values.get(name), name)
    return found if 0 <= found <= 1 else _no(name)


def _number(found: Any, name: str) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < LARGEST:
        return _no(name)
    return float(found)


def _no(name: str) -> NoReturn:
    raise ValueError(f"no sound value for {name!r}")


def check_probe(probe: SavedProbe, fingerprint: str, d_model: int) -> None:
    """Refuse a probe that means nothing to the model of this fingerprint.

    Args:
        d_model: width of the model's residual stream.

    Raises:
        ConceptError: it was made for another model, or its direction is not of unit length and that width.
    """
    if probe.model_fingerprint != fingerprint:
        raise ConceptError(
            f"probe {probe.name!r}: made for a model of fingerprint {probe.model_fingerprint}, this audit has "
            f"{fingerprint}; upload its examples instead and train it here"
        )
    if len(probe.direction) != d_model:
        raise ConceptError(
            f"probe {probe.name!r}: its direction has {len(probe.direction)} numbers, the model's residual stream "
            f"{d_model}; the file is damaged"
        )
    length = float(np.linalg.norm(probe.direction))
    if not np.isfinite(probe.direction).all() or abs(length - 1) > LENGTH_TOLERANCE:
        raise ConceptError(f"probe {probe.name!r}: its direction is not of unit length; the file is damaged")
