"""An audit in Python: what a notebook, the command line and the app all use."""

from __future__ import annotations

from backend.api.counterfactuals import Counterfactuals
from backend.api.exports import Exports
from backend.api.flags import Flags
from backend.api.probes import Probes
from backend.api.rows import Rows


class Audit(Rows, Probes, Flags, Exports, Counterfactuals):
    """One audit on disk: its rows, concepts, rankings, labels and flags.

    Safe to share between threads. The model is loaded when something first needs it.
    """
