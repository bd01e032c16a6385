"""Labels of SAE features from a file: as this package writes them, or Neuronpedia's explanations."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from concept_audit.data.formats import Row, file_rows
from concept_audit.data.write import FORMULA_STARTS
from concept_audit.errors import DataError

COLUMNS = ("feature_id", "layer", "label", "origin", "maker", "score", "low", "high", "n", "snippet")
LONGEST = 120
NESTED = ("explanations", "features", "data", "results")
"""Keys under which the records of a file lie that is one object."""

LeftOut = Counter[str]
"""Why records were left out → how many."""


@dataclass(frozen=True)
class ReadLabel:
    """A label as it stands in a file.

    Attributes:
        person: whether a person wrote it.
        maker: who or what did, as far as the file says.
        score, low, high: balanced accuracy of detection with its interval; NaN if unknown.
    """

    feature: int
    label: str
    person: bool = False
    maker: str = ""
    score: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    snippet: str = ""


def read_feature_labels(path: Path, layer: int, n_features: int) -> tuple[list[ReadLabel], LeftOut]:
    """The labels of a file that are of this SAE, in its order, and why others were left out.

    A record has ``feature_id`` (or Neuronpedia's ``index``), ``label`` (or ``description``), and perhaps ``layer``: a
    number, or a name that begins with one. Neuronpedia counts layers from 0 and names what is before or after one, so
    ``12-res-jb`` may be read at 12 or 13 blocks.

    Args:
        layer: where the SAE reads, in blocks.
        n_features: of the SAE.

    Raises:
        DataError: the file cannot be read, or no record of it is of use; it says what is missing.
    """
    found: list[ReadLabel] = []
    left_out: LeftOut = Counter()
    for row in _records(file_rows(path)):
        read = _label(row, layer, n_features)
        if isinstance(read, str):
            left_out[read] += 1
        elif read is not None:
            found.append(read)
    if not found:
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in left_out.most_common(3)) or "it has no records"
        raise DataError(
            f"{path}: no label for this audit's features: {reasons}. Records need feature_id and label, or "
            "Neuronpedia's index and description"
        )
    return found, left_out


def _records(rows: Iterable[Row]) -> Iterator[Mapping[str, Any] | str]:
    """Records, and the reason where one cannot be read; a file that is one object holds them in a list."""
    rows = iter(rows)
    first = list(islice(rows, 2))
    if len(first) == 1 and not first[0].problem:
        values = first[0].values
        for name in NESTED:
            if isinstance(values.get(name), list):
                shared = {key: value for key, value in values.items() if key not in NESTED}
                yield from ({**shared, **one} if isinstance(one, Mapping) else "not an object" for one in values[name])
                return
    for row in (*first, *rows):
        yield "cannot be read" if row.problem else row.values


def _label(record: Mapping[str, Any] | str, layer: int, n_features: int) -> ReadLabel | str | None:
    if isinstance(record, str):
        return record
    number = _whole(_first(record, "feature_id", "index", "feature"))
    if number is None:
        return "without feature_id or index"
    text = _text(_first(record, "label", "description"))
    if not text:
        return "without label or description"
    if not 0 <= number < n_features:
        return f"a feature beyond the {n_features:,} of this SAE"
    ours = "feature_id" in record
    named = record.get("layer")
    at = _layer(named)
    if named not in (None, "") and (at is None or not (at == layer or (not ours and at == layer - 1))):
        return f"another layer than this SAE's, {layer}"
    origin = _text(record.get("origin"))
    if origin == "tokens":
        return None
    maker = _text(_first(record, "maker", "explanationModelName"))[:LONGEST]
    # A score of Neuronpedia's is not a balanced accuracy.
    score, low, high = (_share(record.get(name)) if ours else math.nan for name in ("score", "low", "high"))
    count = _whole(record.get("n")) or 0
    snippet = _text(record.get("snippet"))
    return ReadLabel(number, text[:LONGEST], origin == "person", maker, score, low, high, count, snippet)


def _first(record: Mapping[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _text(value: Any) -> str:
    """A value on one line, without the apostrophe that guards a cell of a spreadsheet, nor control characters."""
    if not isinstance(value, str):
        return ""
    if value.startswith("'") and value[1:].startswith(FORMULA_STARTS):
        value = value[1:]
    return "".join(letter if letter.isprintable() else " " for letter in value).strip()


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = str(value).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _layer(value: Any) -> int | None:
    number = _whole(value)
    if number is not None:
        return number
    begins = re.match(r"[0-9]{1,4}(?![0-9])", value.strip()) if isinstance(value, str) else None
    return int(begins[0]) if begins else None


def _share(value: Any) -> float:
    """A number from 0 to 1; NaN for all else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if 0 <= number <= 1 else math.nan
