"""Figures: the same bytes under any settings, and labels as they are written."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from concept_audit.evidence.figures import Bar, Series, intervals, lines, matrix

NAN = float("nan")
NAMES = ["random", "<b> & $x$", "concept_influence:contrast:damping=0.5:" + "long " * 20 + "end"]
FIGURES = {
    "intervals": lambda: intervals([Bar(name, -0.25 * i, -1.0, NAN) for i, name in enumerate(NAMES)], "change"),
    "lines": lambda: lines([Series(name, [1, 2], [NAN, 0.5], [0, 0], [1, NAN]) for name in NAMES], "share", "change"),
    "matrix": lambda: matrix(NAMES, np.array([[1, -0.5, NAN], [-0.5, 1, 0], [NAN, 0, 1]])),
}


def words(svg: str) -> set[str]:
    return {"".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_the_same_numbers_give_the_same_bytes_under_any_settings(draw):
    drawn = draw()
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "svg.hashsalt": None}):
        assert draw() == drawn
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_labels_are_written_in_full_and_are_never_markup(draw):
    drawn = draw()
    assert set(NAMES) <= words(drawn)
    assert "<image" not in drawn and "nan" not in drawn


def test_numbers_have_a_true_minus_sign():
    assert "−0.25" in words(FIGURES["intervals"]()) and "−0.50" in words(FIGURES["matrix"]())
    assert not any(word.startswith("-") for draw in FIGURES.values() for word in words(draw()))


def test_nothing_to_draw_is_drawn_as_nothing():
    assert "vector_filter" not in intervals([Bar("vector_filter", NAN, NAN, NAN)], "change")
