"""Heatmap HTML: colours by value, text escaped."""

from __future__ import annotations

import json
import re

from concept_audit import Heatmap, Segment
from concept_audit_app.components.heatmap import LEVELS, Look, Ramp, legend_html, ramp, turn_html
from concept_audit_app.components.rows import conversation_html, metadata_text


def levels(html: str) -> list[int]:
    return [int(found) for found in re.findall(r"<i class=[ta](\d+) ", html)]


def test_the_ramp_reaches_the_largest_distance_on_the_page():
    maps = [Heatmap(0, ((Segment("a", 3.0), Segment("b", -5.0)),), True), Heatmap(1, ((Segment("c", 1.0),),), True)]
    assert ramp(maps, 1.0) == Ramp(1.0, 6.0, True)


def test_an_unsigned_ramp_begins_at_zero_whatever_the_mean():
    assert ramp([Heatmap(0, ((Segment("a", 3.0),),), False)], 1.0) == Ramp(0.0, 3.0, False)


def test_colour_grows_with_distance_and_tells_the_sides_apart():
    colours = Ramp(0.0, 10.0, True)
    weak, strong = (levels(turn_html([Segment("x", value)], colours))[0] for value in (2.0, 9.0))
    assert 0 < weak < strong < LEVELS
    assert "<i class=t" in turn_html([Segment("x", 5.0)], colours)
    assert "<i class=a" in turn_html([Segment("x", -5.0)], colours)
    assert colours.level(99.0) == LEVELS and Ramp(0.0, 10.0, False).level(-5.0) == 0


def test_tokens_without_value_are_not_wrapped():
    assert turn_html([Segment("plain", 0.0)], Ramp(0.0, 10.0, False)) == '<span class="hm">plain</span>'


def test_a_page_without_values_has_no_colour():
    assert turn_html([Segment("plain", 0.0)], ramp([], 0.0)) == '<span class="hm">plain</span>'


def test_text_is_escaped_in_tokens_and_turns():
    hostile = "<script>alert(1)</script>\"'&"
    token = turn_html([Segment(hostile, 5.0)], Ramp(0.0, 5.0, True))
    turn = conversation_html(json.dumps([{"role": "<script>", "content": hostile}]), None, None)
    for html in (token, turn):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_line_breaks_show_a_sign_and_break():
    assert "↵</u>\n" in turn_html([Segment("a\nb", 0.0)], Ramp(0.0, 1.0, True))
    assert "↵" not in turn_html([Segment("a\nb", 0.0)], Ramp(0.0, 1.0, True), Look(newlines=False))


def test_a_short_context_keeps_what_stands_around_the_strongest_token():
    segments = [Segment(f"w{i} ", 9.0 if i == 50 else 0.0) for i in range(100)]
    html = turn_html(segments, Ramp(0.0, 9.0, True), Look(short=True))
    assert "w50 " in html and "w45 " in html and "w10 " not in html and "w90 " not in html and html.count("…") == 2


def test_screen_readers_are_told_the_strongest_tokens():
    html = turn_html([Segment("gold", 3.0), Segment("the", 0.0)], Ramp(0.0, 3.0, True))
    assert "Strongest tokens: gold +3" in html and "the +0" not in html


def test_null_characters_are_shown_as_a_sign():
    assert "␀" in turn_html([Segment("a\0b", 0.0)], Ramp(0.0, 1.0, True))


def test_values_are_in_the_title():
    assert 'title="+1.23"' in turn_html([Segment("x", 1.2341)], Ramp(0.0, 2.0, True))


def test_a_turn_beyond_the_context_is_plain_and_says_so():
    html = conversation_html(
        '[{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]',
        Heatmap(0, ((Segment("one", 1.0),),), True),
        Ramp(0.0, 1.0, True),
    )
    assert "<i class=t16" in html and "beyond the longest row" in html and ">two<" in html


def test_long_prompts_fold():
    html = conversation_html('[{"role": "user", "content": "' + "word " * 400 + '"}]', None, None)
    assert "<details>" in html


def test_the_legend_names_both_ends():
    html = legend_html(Ramp(1.0, 2.0, True))
    assert "-1 away" in html and "+3 towards" in html


def test_metadata_is_cut_to_a_line():
    text = metadata_text('{"a": "' + "x" * 200 + '", "b": [1, 2]}')
    assert "…" in text and "b: [1, 2]" in text
