"""One command: what it is called, and what happens to its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from concept_audit.cli.backups import Backup, Restore
from concept_audit.cli.building import Build, Demo, Index
from concept_audit.cli.checking import Check
from concept_audit.cli.concepts import Concepts, Features, Probe
from concept_audit.cli.forecast import Forecast
from concept_audit.cli.labels import Label
from concept_audit.cli.moving import Pull, Push
from concept_audit.cli.ranking import Export, Flag, Rank
from concept_audit.cli.serving import Delete, Info, List, Serve, Sql
from concept_audit.cli.validation import Validate
from concept_audit.errors import AuditError

COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "build": Build,
    "probe": Probe,
    "index": Index,
    "forecast": Forecast,
    "rank": Rank,
    "flag": Flag,
    "export": Export,
    "validate": Validate,
    "serve": Serve,
    "info": Info,
    "list": List,
    "concepts": Concepts,
    "features": Features,
    "label": Label,
    "sql": Sql,
    "check": Check,
    "delete": Delete,
    "backup": Backup,
    "restore": Restore,
    "push": Push,
    "pull": Pull,
}
DESCRIPTION = (
    "See which rows of a training set push a language model towards a concept, and take them out. "
    "Start with `concept-audit demo`. Each command has its own --help."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # The libraries' own bars would write across ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(_version())
        return 0
    try:
        return parsed(words or ["--help"]).run() or 0
    except AuditError as error:
        print(f"concept-audit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nconcept-audit: interrupted; the same command goes on where this one was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep Python from complaining when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parsed(words: Sequence[str]) -> Any:
    """The command that words stand for, with its options; exits with 2 where they make no sense."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="concept-audit",
        description=DESCRIPTION,
        args=list(words),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _version() -> str:
    import importlib.metadata

    try:
        return f"concept-audit {importlib.metadata.version('concept-audit')}"
    except importlib.metadata.PackageNotFoundError:
        return "concept-audit (not installed)"
