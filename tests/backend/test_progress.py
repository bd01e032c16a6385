"""Progress: never silent, with a time left that can be believed."""

from __future__ import annotations

import io
import time

import pytest

from concept_audit import progress
from concept_audit.progress import LineProgress, Stage, clock


def test_long_work_without_reports_is_never_silent(monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.02)
    out = io.StringIO()
    with LineProgress(out).stage("Waiting"):
        deadline = time.monotonic() + 5
        while out.getvalue().count("so far") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = out.getvalue().splitlines()
    assert lines[0] == "Waiting ..." and lines[-1].startswith("Waiting: done in")
    assert len(lines) >= 5


def test_an_error_ends_the_stage_and_its_heartbeat(monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.01)
    out = io.StringIO()
    with pytest.raises(ZeroDivisionError), LineProgress(out).stage("Failing"):
        raise ZeroDivisionError
    said = out.getvalue()
    time.sleep(0.05)
    assert out.getvalue() == said and "done in" not in said


def test_the_time_left_counts_the_pace_of_this_run_alone(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stage = Stage("Running", 100, "rows")
    assert stage.seconds_left is None
    stage.skip(50)
    assert stage.seconds_left is None
    now = 110.0
    stage.advance(10, "fast")
    assert stage.seconds_left == pytest.approx(40)
    assert stage.describe() == "60/100 rows (60%), 0:40 left, fast"


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (7, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_clocks_read_as_people_write_them(seconds, shown):
    assert clock(seconds) == shown
