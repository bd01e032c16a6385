"""The command line: ``concept-audit``."""

from concept_audit.cli.main import main

__all__ = ["main"]
