"""Finding and opening audits, and what all commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from concept_audit.cli.flags import AUDIT, option, switch
from concept_audit.errors import StoreError
from concept_audit.progress import Progress, for_this_terminal
from concept_audit.store.listing import audit_names
from concept_audit.store.remote import is_address

if TYPE_CHECKING:
    import pandas as pd

    from concept_audit.audit.audit import Audit
    from concept_audit.pipeline.engine import Engine

DEFAULT_CACHE = Path("cache")
CACHE = Annotated[Path, arg(metavar="DIR", help="where audits and built-in models are kept")]
JSON = Annotated[bool, switch("write it as JSON")]
DEVICE = Annotated[
    str | None,
    option(
        "where the model runs: cpu, cuda, cuda:1, mps; auto is the fastest there is, and split shares the weights out over all GPUs, memory and disk (None: where it was built)",
        "DEVICE",
    ),
]

TRUST = Annotated[bool, switch("run Python code that comes with the model, which the audit was built with")]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A command on an audit."""

    audit: AUDIT
    cache: CACHE = DEFAULT_CACHE

    def open(self, progress: Progress | None = None) -> Audit:
        """The audit.

        Raises:
            StoreError: there is none, or it is not finished.
        """
        return self._opened(progress)

    def _opened(self, progress: Progress | None, **how: Any) -> Audit:
        root = existing(self.audit, self.cache)
        from concept_audit.audit.audit import Audit

        return Audit(root, progress or for_this_terminal(), **how)


@dataclass(frozen=True, kw_only=True)
class Running(Opening):
    """A command on an audit that may run its model."""

    device: DEVICE = None
    trust_remote_code: TRUST = False

    def open(self, progress: Progress | None = None, engine: Engine | None = None) -> Audit:
        """As `Opening.open`."""
        return self._opened(progress, device=self.device, trust_remote_code=self.trust_remote_code, engine=engine)


def existing(audit: str, cache: Path) -> Path:
    """The directory of an audit that is given by path, by name, or by its address in object storage.

    Raises:
        StoreError: there is no audit; those that there are are named.
    """
    if is_address(audit):
        from concept_audit.store.published import found

        return found(audit, cache)
    for path in (Path(audit).expanduser(), cache / audit):
        if (path / "manifest.json").exists():
            return path
    known = audit_names(cache)
    there = f"{cache} has {', '.join(known)}" if known else f"{cache} has none yet, make one with `concept-audit demo`"
    raise StoreError(f"{audit}: no audit there; {there}")


def print_json(values: Any) -> None:
    """Write JSON values to standard output."""
    print(json.dumps(values, indent=2, ensure_ascii=False, default=_plain))


def print_table(frame: pd.DataFrame, as_json: bool) -> None:
    """Write a table for people, or as JSON."""
    if as_json:
        print_json(frame.to_dict("records"))
    else:
        print(frame.to_string(index=False, max_colwidth=60))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
