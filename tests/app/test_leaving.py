"""Leaving a page: what was done by keys a moment before, and where a step back leads, in a real browser."""

from __future__ import annotations

import re

from concept_audit import Audit, RowFilter
from tests.app.browser import cards, row_of, settle, type_probe

ROWS = 4


def desk(page, address: str) -> list[int]:
    """The Audit page, ready for keys: the numbers of its rows."""
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    page.locator('[role="option"][aria-selected="true"]').wait_for()
    return [row_of(card) for card in cards(page).all()]


def flag(page) -> None:
    """Flag the first rows, as fast as it goes."""
    page.keyboard.press("a")
    for _ in range(ROWS):
        page.keyboard.press("x")


def flagged(cache) -> set[int]:
    return set(Audit(cache / "small").rows.list(RowFilter(flag="remove"))["example_id"])


def left_out(audit: Audit, rows: list[int]) -> int:
    """How many rows a cleaned data set has without these; copies of a row share its flag."""
    table = audit.rows.list()
    hashes = set(table.loc[table["example_id"].isin(rows), "content_hash"])
    return int((~table["content_hash"].isin(hashes)).sum())


def test_flags_of_the_last_moment_are_in_the_cleaned_data(page, address, cache_copy):
    rows = desk(page, address)[:ROWS]
    flag(page)
    page.get_by_role("link", name="Export", exact=True).click()
    page.locator("h1", has_text="Export").wait_for()
    settle(page)
    page.get_by_role("radio", name="Cleaned data").click()
    settle(page)
    left = left_out(Audit(cache_copy / "small"), rows)
    assert page.get_by_role("button", name=re.compile(r"^Download [\d,]+ rows$")).inner_text().split()[-2] == str(left)
    assert set(rows) <= flagged(cache_copy)


def test_flags_of_the_last_moment_outlive_a_step_back(page, address, cache_copy):
    page.goto(address)
    settle(page)
    page.get_by_role("link", name="Audit", exact=True).click()
    page.locator("h1", has_text="Audit").wait_for()
    settle(page)
    page.locator('[role="option"][aria-selected="true"]').wait_for()
    rows = [row_of(card) for card in cards(page).all()][:ROWS]
    flag(page)
    page.go_back()
    page.get_by_role("heading", name="Stages").wait_for()
    settle(page)
    page.wait_for_timeout(2000)
    assert set(rows) <= flagged(cache_copy)
    assert page.get_by_role("heading", name="Stages").is_visible(), "and the page is the one that was gone back to"


def test_labels_of_the_last_moment_are_kept(page, address, cache_copy):
    page.goto(f"{address}/probe_lab")
    settle(page)
    type_probe(page, "in haste")
    page.get_by_role("button", name="Shows it").wait_for()
    page.locator('[role="option"][aria-selected="true"]').wait_for()
    page.wait_for_timeout(600)  # the box keeps the focus for a while
    for key in "yny":
        page.keyboard.press(key)
    page.get_by_role("link", name="Overview", exact=True).click()
    page.get_by_role("heading", name="Stages").wait_for()
    settle(page)
    assert sorted(e.label for e in Audit(cache_copy / "small").labels.list("in haste")) == [0, 1, 1]


def test_a_page_that_stays_empty_is_asked_for_anew(page, address):
    """Streamlit draws nothing where a piece of the page that is being left is asked for: every other time or so."""
    for _ in range(4):
        desk(page, address)
        flag(page)
        page.evaluate("window.__conceptAuditRows.taken = 1e9")  # so that the link does not wait
        page.get_by_role("link", name="Export", exact=True).click()
        page.wait_for_timeout(2500)
        settle(page)
        assert page.locator("h1").inner_text() == "Export"


def test_one_step_back_leads_to_the_page_before_and_from_a_filter_to_the_view_without_it(page, address):
    page.goto(address)
    settle(page)
    for name in ("Audit", "Groups"):
        page.get_by_role("link", name=name, exact=True).click()
        page.locator("h1", has_text=name).wait_for()
        settle(page)
    assert "by=" in page.url, "the page has completed its address"
    page.go_back()
    page.locator("h1", has_text="Audit").wait_for()
    settle(page)
    page.get_by_role("button", name="Page after").click()
    page.wait_for_url("**page=2**")
    settle(page)
    page.go_back()
    page.wait_for_url(lambda url: "page=2" not in url)
    settle(page)
    assert page.locator("h1").inner_text() == "Audit"
    page.go_back()
    page.get_by_role("heading", name="Stages").wait_for()
