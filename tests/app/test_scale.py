"""Scores in standard deviations."""

from __future__ import annotations

import pytest

from concept_audit_app.components.scale import scale_of


def test_zero_is_no_effect_for_influence_and_the_average_row_for_projections():
    summary = {"mean": 10.0, "deviation": 4.0}
    assert scale_of("concept_influence", summary).of(8.0) == 2.0
    assert scale_of("vector_filter", summary).of(8.0) == -0.5
    assert scale_of("vector_filter", summary).raw(-0.5) == 8.0


@pytest.mark.parametrize(("score", "deviation"), [(3.0, 0.0), (float("nan"), 1.0), (3.0, float("nan"))])
def test_scores_without_a_scale_show_as_zero(score, deviation):
    assert scale_of("vector_filter", {"mean": 0.0, "deviation": deviation}).short(score) == "+0.00"
