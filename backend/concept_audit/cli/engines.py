"""Who does the heavy work of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from concept_audit.cli.flags import flags, made
from concept_audit.pipeline.engines.options import EngineOptions

if TYPE_CHECKING:
    from concept_audit.pipeline.engine import Engine

    EngineFlags = Any
else:
    EngineFlags = flags(EngineOptions)


@contextmanager
def working(typed: Any) -> Iterator[Engine | None]:
    """The engine that was typed, until the body ends; None for this process."""
    from concept_audit.pipeline.engines import choose

    with choose.working(made(EngineOptions, typed)) as engine:
        yield engine
