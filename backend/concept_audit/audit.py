"""An audit in Python: what a notebook, the command line and the app all use."""

from __future__ import annotations

from concept_audit.api.counterfactuals import Counterfactuals
from concept_audit.api.exports import Exports
from concept_audit.api.flags import Flags
from concept_audit.api.probes import Probes
from concept_audit.api.rows import Rows


class Audit(Rows, Probes, Flags, Exports, Counterfactuals):
    """One audit on disk: its rows, concepts, rankings, labels and flags.

    Safe to share between threads. The model is loaded when something first needs it.
    """
