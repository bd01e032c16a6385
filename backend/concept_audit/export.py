"""Where the command line still looks for `write`; goes when it asks `concept_audit.data.write`."""

from concept_audit.data.write import write

__all__ = ["write"]
