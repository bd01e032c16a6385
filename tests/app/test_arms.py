"""Other responses and steering on the Evidence page: offered with their cost, and shown with the right words."""

from __future__ import annotations

import dataclasses

import pytest

from concept_audit import Audit, ValidateOptions
from tests.app.test_pages import words
from tests.app.test_validating import TINY, audit, open_evidence  # noqa: F401 - audit is a fixture

BOTH = ValidateOptions(quick=True, rewrite=True, steer=True)


def test_the_form_offers_them_and_says_what_they_cost(audit: Audit):  # noqa: F811
    test = open_evidence()
    assert "13 trainings on up to" in words(test) and "to generate" not in words(test)
    test.button_group(key="arms").set_value(["rewrite", "steer"]).run()
    assert not test.exception
    cost = audit.evidence.cost(BOTH)
    assert cost.runs == 1 + 6 * (2 + 2 + 2) and cost.answers == min(144, audit.overview().n_rows)
    assert f"{cost.runs} trainings on up to" in words(test) and f"up to {cost.answers} responses to generate" in words(
        test
    )
    assert "--quick --rewrite --steer" in test.code[0].value


@pytest.mark.parametrize("strengths", [(2.0,), (1.0, 2.5)])
def test_the_page_shows_what_they_did(audit: Audit, strengths):  # noqa: F811
    options = dataclasses.replace(TINY, seeds=2, rewrite=True, steer=True, strengths=strengths, pool_rows=20)
    audit.validate("tone", options)
    test = open_evidence()
    assert not test.exception
    assert "With other responses in the top rows, less what as many at random do" in words(test)
    assert "with the concept added in training alone, less what a random direction does" in words(test)
    table = next(each.value for each in test.dataframe if "measure" in each.value.columns)
    assert table["measure"].tolist() == ["removal", "rewrite", *["steer"] * len(strengths)]
    assert table["share"].tolist() == ["10%", "10%", *[f"{strength:g} σ" for strength in strengths]]
    assert set(table["method"].iloc[2:]) == {"The concept"}
