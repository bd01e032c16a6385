"""How the threads of a product wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASKED = "import concept_audit, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "told"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_that_wait_leave_the_processor_to_others_unless_somebody_says_how(given, told):
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-c", ASKED], env=plain | given, capture_output=True, text=True, check=True)
    # PyTorch reads it when it is imported, which the package leaves to whoever needs it.
    assert found.stdout.split() == [told, "False"]
