"""A trajectory on screen: turns by role, calls folded under the names of their tools, text escaped."""

from __future__ import annotations

import json

from concept_audit import Heatmap, Segment
from concept_audit_app.components.heatmap import Ramp
from concept_audit_app.components.rows import conversation_html

EVIL = "<img src=x onerror=alert(1)>"
TURNS = [
    {"role": "tools", "content": json.dumps([{"type": "function", "function": {"name": EVIL}}])},
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": f"walk{EVIL}", "arguments": {"to": EVIL}}]},
    {"role": "tool", "content": f"green {EVIL}", "name": EVIL},
    {"role": "assistant", "content": "earlier", "train": False, "reasoning_content": EVIL},
    {"role": "assistant", "content": "done"},
]


def test_calls_are_folded_under_their_names_and_everything_is_escaped():
    shown = conversation_html(json.dumps(TURNS), None, None)
    assert "<img" not in shown and shown.count("&lt;img") >= 6
    assert "<details><summary>calls walk&lt;img" in shown
    assert "assistant (not trained on)" in shown and ">done</div>" in shown


def test_colours_go_to_the_turns_that_count():
    heatmap = Heatmap(0, ((Segment("CALLED", 1.0),), (Segment("DONE", -1.0),)), signed=True)
    shown = conversation_html(json.dumps(TURNS), heatmap, Ramp(0.0, 1.0, True))
    assert "<details open><summary>calls walk" in shown and "CALLED</i></span>" in shown
    before, after = shown.split("assistant (not trained on)")
    assert "DONE" in after and "DONE" not in before and "earlier" in after and ">done" not in after
