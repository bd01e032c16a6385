"""Errors that a user can act on. Each names the thing, the reason and the way out."""

from __future__ import annotations


class AuditError(Exception):
    """Something the user can put right; shown without a traceback."""


class DataError(AuditError):
    """The training data or a file of examples cannot be read as asked."""


class ModelError(AuditError):
    """The model, its tokenizer or an adapter cannot be loaded or used as asked."""


class ConceptError(AuditError):
    """A concept cannot be found, loaded or trained."""


class StoreError(AuditError):
    """An audit on disk is absent, incomplete, of another make or held by another process."""


class FinishedIndexError(StoreError):
    """There is a finished gradient index, which only goes when that is asked for."""


def first_line(error: Exception) -> str:
    """The gist of an error that a library words in many lines, or in none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
