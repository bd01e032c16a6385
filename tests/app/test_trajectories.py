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


def test_a_call_is_folded_where_the_strong_tokens_are_elsewhere():
    heatmap = Heatmap(0, ((Segment("CALLED", 0.1),), (Segment("DONE", -1.0),)), signed=True)
    assert "<details><summary>calls walk" in conversation_html(json.dumps(TURNS), heatmap, Ramp(0.0, 1.0, True))


PAIR = [
    {"role": "user", "content": f"shared {EVIL}"},
    {"role": "assistant", "content": f"the same but good {EVIL}"},
    {"role": "rejected", "content": ""},
    {"role": "user", "content": f"shared {EVIL}"},
    {"role": "assistant", "content": "the same but bad"},
]


def test_the_sides_of_a_pair_stand_beside_each_other_with_differing_words_in_bold():
    shown = conversation_html(json.dumps(PAIR), None, None)
    assert "<img" not in shown and shown.count("shared") == 1
    left, right = shown.split("<strong>rejected</strong>")
    assert "<strong>chosen</strong>" in left and "<strong>good" in left and "the same but " in left
    assert "<strong>bad</strong>" in right and "good" not in right
    assert "assistant" not in shown, "one turn a side needs no column that says whose it is"


def test_the_colours_of_a_pair_go_to_the_side_that_they_are_of():
    turns = ((Segment("same ", 1.0), Segment("GOOD", 2.0)), (Segment("same ", -1.0), Segment("BAD", -2.0)))
    shown = conversation_html(json.dumps(PAIR), Heatmap(0, turns, True, rejected=1), Ramp(0.0, 2.0, True))
    left, right = shown.split("<strong>rejected</strong>")
    assert "<b><i class=t16" in left and "GOOD" in left and "BAD" not in left
    assert "<b><i class=a16" in right and "BAD" in right and "<b><i class=a8" not in right
