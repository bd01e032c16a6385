"""What a report says of runs is what their figures say: intervals, seeds, and no more than a test shows."""

from __future__ import annotations

import pandas as pd
import pytest

from concept_audit.evidence.report import table
from concept_audit.store.evidence import RESULT_COLUMNS, Evidence

NAN = float("nan")


def said_of(**quantities: tuple[float, float, float, float, int]) -> str:
    """What is told of one removal: quantity → estimate, low, high, p, seeds."""
    results = [
        ["removal", name, "vector_filter", other, 0.1, *figures]
        for name, figures in quantities.items()
        for other in ("whole", "random")
    ]
    frame = pd.DataFrame(results, columns=RESULT_COLUMNS)
    return table(Evidence("0", "probe:tone", {}, pd.DataFrame(), frame, pd.DataFrame()))


def test_a_figure_comes_with_its_interval_and_its_seeds():
    said = said_of(own=(-1.05, -1.53, -0.57, 0.011, 3), preference=(-0.04, -0.044, -0.037, 0.0002, 6))
    assert "lowers the concept in the model's own answers significantly" in said
    assert "by −1.05 (95% interval −1.53 to −0.57, p = 0.011, 3 seeds)" in said
    assert "changes by −0.04 (95% interval −0.044 to −0.037, p < 0.001, 6 seeds)" in said
    assert "No p value here is corrected for the number of comparisons" in said


def test_where_the_interval_includes_0_nothing_is_said_to_fall():
    said = said_of(own=(-0.26, -0.54, 0.03, 0.063, 4), loss=(-0.012, -0.034, 0.010, 0.2, 4))
    assert "does not change the concept in the model's own answers significantly" in said and "lowers" not in said
    assert (
        "the loss on natural rows (nats) does not change significantly, by −0.012 (95% interval −0.034 to 0.01" in said
    )


@pytest.mark.parametrize(
    "loss, course", [((0.03, 0.01, 0.05, 0.01, 4), "rises"), ((-0.03, -0.05, -0.01, 0.01, 4), "falls")]
)
def test_a_cost_is_said_and_so_is_its_contrary(loss, course):
    said = said_of(own=(-0.26, -0.54, 0.03, 0.063, 4), loss=loss)
    assert f"the loss on natural rows (nats) {course} significantly, by" in said


def test_one_seed_proves_nothing():
    said = said_of(own=(-0.3, NAN, NAN, NAN, 1), loss=(0.5, NAN, NAN, NAN, 1))
    assert "in too few seeds to test" in said and "by −0.3 (1 seed)" in said
    assert "was not tested, by 0.5 (1 seed)" in said and "no significant" not in said and "nan" not in said
