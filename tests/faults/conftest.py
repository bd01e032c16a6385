"""One warm process for all short forms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.failing_writes import compiled
from tests.faults.warm import Warm


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Iterator[Warm]:
    """It can let writes fail where there is a C compiler."""
    place = tmp_path_factory.mktemp("warm")
    with Warm(place, compiled(place)) as process:
        yield process
