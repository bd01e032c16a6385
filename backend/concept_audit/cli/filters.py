"""The filters of the command line: which rows, by their text, their metadata and their flags."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Literal

from concept_audit.cli.flags import REPEATED, arg
from concept_audit.errors import AuditError

if TYPE_CHECKING:
    from concept_audit.audit.audit import Audit
    from concept_audit.store.filters import RowFilter

WHERE = Annotated[
    tuple[str, ...],
    REPEATED,
    arg(
        metavar="FIELD=VALUE",
        help="only rows with this metadata value; FIELD!=VALUE leaves rows with it out, FIELD>=N and FIELD<=N bound "
        "a number; may be repeated",
    ),
]
TEXT = Annotated[str, arg(help="only rows with these words in prompt or response")]
TEXT_IN = Annotated[
    Literal["", "prompt", "response"], arg(help="where the words of --text have to be, if not in either")
]


def filtered(
    audit: Audit, text: str, where: tuple[str, ...], flag: str, text_in: Literal["", "prompt", "response"] = ""
) -> RowFilter:
    """The rows that filters let through.

    Raises:
        AuditError: a condition is none, or names a field that no row has.
    """
    from concept_audit.store.filters import RowFilter

    kept: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    known = set(audit.rows.metadata_fields()["field"])
    for each in where:
        name, operator, value = _condition(each, known)
        if operator in ("<", ">"):
            low, high = ranges.get(name, (float("-inf"), float("inf")))
            bound = _number(each, value)
            ranges[name] = (max(low, bound), high) if operator == ">" else (low, min(high, bound))
        else:
            chosen = left_out if operator else kept
            chosen[name] = (*chosen.get(name, ()), value)
    return RowFilter(text=text, metadata=kept, flag=flag, text_in=text_in, without=left_out, ranges=ranges)


def _condition(text: str, known: Collection[str]) -> tuple[str, str, str]:
    """The field, the sign before the equals sign if it is an operator's, and the value.

    A field whose own name ends in such a sign is meant where there is one.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise AuditError(f"--where {text!r} is not FIELD=VALUE (or FIELD!=VALUE, FIELD>=N, FIELD<=N)")
    operator = name[-1] if name not in known and name[-1] in "!<>" else ""
    name = name[:-1] if operator else name
    if name not in known:
        raise AuditError(f"--where {name}=...: no such metadata field; there are {', '.join(sorted(known)) or 'none'}")
    return name, operator, value


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise AuditError(f"--where {text}: {value!r} is no number") from None
