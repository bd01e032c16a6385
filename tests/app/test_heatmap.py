"""Heatmap HTML: colours by value, text escaped."""

from __future__ import annotations

import json
import re

from app.components.heatmap import Ramp, legend_html, ramp, turn_html
from app.components.rows import conversation_html, metadata_text
from backend import Heatmap, Segment


def strengths(html: str) -> list[float]:
    return [float(found) for found in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", html)]


def test_the_ramp_reaches_the_largest_distance_on_the_page():
    maps = [
        Heatmap(0, ((Segment("a", 3.0), Segment("b", -5.0)),), True),
        Heatmap(1, ((Segment("c", 1.0),),), True),
    ]
    assert ramp(maps, 1.0) == Ramp(1.0, 6.0, True)


def test_an_unsigned_ramp_begins_at_zero_whatever_the_mean():
    assert ramp([Heatmap(0, ((Segment("a", 3.0),),), False)], 1.0) == Ramp(0.0, 3.0, False)


def test_colour_grows_with_distance_and_tells_the_sides_apart():
    colours = Ramp(0.0, 10.0, True)
    weak, strong = (strengths(turn_html([Segment("x", value)], colours))[0] for value in (2.0, 9.0))
    assert weak < strong
    assert colours.colour(5.0).split(",")[:3] != colours.colour(-5.0).split(",")[:3]


def test_tokens_without_value_are_not_wrapped():
    assert turn_html([Segment("plain", 0.0)], Ramp(0.0, 10.0, False)) == "plain"


def test_a_page_without_values_has_no_colour():
    assert turn_html([Segment("plain", 0.0)], ramp([], 0.0)) == "plain"


def test_text_is_escaped_in_tokens_and_turns():
    hostile = "<script>alert(1)</script>\"'&"
    token = turn_html([Segment(hostile, 5.0)], Ramp(0.0, 5.0, True))
    turn = conversation_html(json.dumps([{"role": "<script>", "content": hostile}]), None, None)
    for html in (token, turn):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_line_breaks_show_a_sign_and_break():
    assert "↵</span>\n" in turn_html([Segment("a\nb", 0.0)], Ramp(0.0, 1.0, True))


def test_exact_values_are_in_the_title():
    assert 'title="+1.234"' in turn_html([Segment("x", 1.2341)], Ramp(0.0, 2.0, True))


def test_a_turn_beyond_the_context_is_plain_and_says_so():
    html = conversation_html(
        '[{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]',
        Heatmap(0, ((Segment("one", 1.0),),), True),
        Ramp(0.0, 1.0, True),
    )
    assert "rgba(" in html and "beyond the longest row" in html and ">two<" in html


def test_long_prompts_fold():
    html = conversation_html('[{"role": "user", "content": "' + "word " * 400 + '"}]', None, None)
    assert "<details>" in html


def test_the_legend_names_both_ends():
    html = legend_html(Ramp(1.0, 2.0, True))
    assert "-1 away" in html and "+3 towards" in html


def test_metadata_is_cut_to_a_line():
    text = metadata_text('{"a": "' + "x" * 200 + '", "b": [1, 2]}')
    assert "…" in text and "b: [1, 2]" in text
