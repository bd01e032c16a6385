"""From the library's options to flags: each option is written down once, in its dataclass.

The dataclasses know nothing of a command line. `flags` makes of one, with all that is
nested in it, a flat group of flags: types and defaults are the fields', help is the
attribute's documentation. `made` takes what was typed back to the dataclass.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING
from functools import cache
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import docstring_parser
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from concept_audit.cli.forms import blocks, layers, listed, numbers

Made = TypeVar("Made")


def form(parse: Callable[[str], Any], metavar: str, show: Callable[[Any], str] = str) -> PrimitiveConstructorSpec:
    """How one word becomes a value: ``8,12,16`` a tuple of layers."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["" if value is None else show(value)],
    )


def joined(values: Any) -> str:
    """A list as it is typed: ``8,12,16``."""
    return ",".join(map(str, values))


FORMS: dict[Any, Any] = {
    tuple[int, ...] | None: form(layers, "8,12,16", joined),
    tuple[int, int] | None: form(blocks, "A-B"),
    tuple[float, ...]: form(numbers, "X[,Y...]", joined),
    tuple[str, ...] | None: form(listed, "A,B,...", joined),
}
"""Types of options → how they are typed."""

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def option(text: str, metavar: str | None = None) -> Any:
    """An option that may be left out: its default is not worth telling, or its help tells it."""
    return arg(help=text, metavar=metavar, help_behavior_hint="")


def switch(text: str) -> Any:
    """An option that is given or not."""
    return arg(help=text, help_behavior_hint="")


FILE = Path | None
AUDIT_HELP = "directory of the audit, its name within the cache, or its address in object storage"
AUDIT = Annotated[str, Positional, arg(metavar="AUDIT", help=AUDIT_HELP)]
ANY_AUDIT = Annotated[str | None, Positional, option(AUDIT_HELP, "AUDIT")]
REPEATED = UseAppendAction


def flags(
    options: type,
    names: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    types: Mapping[str, Any] | None = None,
    optional: bool = False,
) -> Any:
    """A group of flags for a dataclass of options.

    Args:
        names: field → flag, where the flag is called otherwise; fields within a field are ``outer.inner``.
        without: fields that the command line does not offer, or offers in another way.
        types: field → type, where a value is typed in another form; such a field may be left out.
        optional: every flag may be left out, whatever its default.
    """
    columns: list[tuple[str, Any, dataclasses.Field[Any]]] = []
    for path, field, kind, text in _leaves(options):
        if path in without:
            continue
        default = _default(field)
        if types and path in types:
            kind, default = types[path], None if default is MISSING else default
        elif optional:
            kind, default = kind | None, None
        forms = [FORMS[kind]] if kind in FORMS else []
        described = arg(
            name=(names or {}).get(path, field.name).replace("_", "-"),
            help=text,
            metavar=None if forms else _metavar(kind),
            # A default of None or False is told by the help, or goes without saying.
            help_behavior_hint="" if default is None or default is False else None,
        )
        kept = dataclasses.field() if default is MISSING else dataclasses.field(default=default)
        columns.append((path.replace(".", "__"), getitem(Annotated, (kind, *forms, described)), kept))
    columns.sort(key=lambda column: column[2].default is not MISSING)
    group = dataclasses.make_dataclass(options.__name__, columns, frozen=True)
    return Annotated[group, OmitArgPrefixes, arg(help=(options.__doc__ or "").splitlines()[0])]


def made(options: type[Made], typed: Any, **values: Any) -> Made:
    """The options that were typed.

    Args:
        typed: what the flags of `flags(options)` gave.
        values: fields that are not taken as they were typed.
    """
    given = {name.replace("__", "."): value for name, value in vars(typed).items()} | values

    def filled(kind: type, prefix: str) -> Any:
        found = {}
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            path = prefix + field.name
            if path in given:
                found[field.name] = given[path]
            elif dataclasses.is_dataclass(hints[field.name]):
                found[field.name] = filled(hints[field.name], f"{path}.")
        return kind(**found)

    return filled(options, "")


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default; `MISSING` if it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _metavar(kind: Any) -> str | None:
    """What stands for a value of a plain type, or of one that may be None."""
    plain = [one for one in get_args(kind) if one is not type(None)] or [kind]
    return METAVARS.get(plain[0]) if len(plain) == 1 else None


def _leaves(options: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any, str]]:
    """Path, field, type and help of each option, with those of nested dataclasses in their place."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, path = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{path}.")  # type: ignore[arg-type]
        else:
            yield path, field, kind, documented(options)[field.name]


@cache
def documented(options: type) -> dict[str, str]:
    """Attribute → what the docstring says of it, without markup.

    Raises:
        KeyError: when an attribute is asked for that the docstring does not explain.
    """
    texts = {}
    for parameter in docstring_parser.parse(options.__doc__ or "").params:
        text = re.sub(r"`+", "", re.sub(r"\s+", " ", parameter.description or "")).rstrip(".")
        text = re.sub(r"\. None (for |takes |(?=keeps))", ". By default ", text)
        text = re.sub(r"\bNone (for |takes |(?=keeps))", "by default ", text)
        for name in parameter.arg_name.split(","):
            texts[name.strip()] = text
    return texts
