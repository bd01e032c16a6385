"""An audit that a test may write to."""

from __future__ import annotations

import pytest

from concept_audit import Audit


@pytest.fixture
def audit(audit_directory) -> Audit:
    return Audit(audit_directory)
