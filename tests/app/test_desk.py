"""The desk: a list of rows beside the one that is looked at, in a real browser."""

from __future__ import annotations

import time

import pytest

from concept_audit import Audit
from tests.app.browser import CARDS, cards, coloured_tokens, row_of, settle

PAGES_LEFT = """() => document.querySelector('[data-testid="stMain"]').scrollHeight - innerHeight"""


def shown(page) -> list[int]:
    """The rows whose card shows."""
    return [row_of(card) for card in page.locator(CARDS).all() if card.is_visible()]


def options(page):
    """The lines of the list."""
    return page.get_by_role("listbox", name="Rows of this page").get_by_role("option")


@pytest.fixture
def desk(page, address):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    options(page).first.wait_for()
    coloured_tokens(page).first.wait_for()
    return page


def test_eight_rows_and_one_whole_are_there_without_scrolling_and_keys_walk_them_at_once(desk, cache_copy):
    places = [each.bounding_box() for each in options(desk).all()]
    list_end = desk.get_by_role("listbox", name="Rows of this page").bounding_box()
    end = min(list_end["y"] + list_end["height"], 900)
    assert sum(place["y"] + place["height"] <= end + 1 for place in places) >= 8
    assert places[0]["y"] < 400
    assert desk.evaluate(PAGES_LEFT) <= 0, "the page itself does not scroll"
    rows = [row_of(card) for card in cards(desk).all()]
    assert shown(desk) == rows[:1] and desk.locator(CARDS).first.bounding_box()["y"] < 400
    assert options(desk).first.locator("mark").count() == 1, "the phrase about the strongest token"
    for row in rows[1:4]:
        desk.keyboard.press("j")
        assert shown(desk) == [row], "without asking the server"
    options(desk).nth(6).click()
    assert shown(desk) == [rows[6]]
    desk.keyboard.press("c")
    assert options(desk).nth(6).inner_text().endswith("keep")
    deadline = time.monotonic() + 30
    while Audit(cache_copy / "small").flags.log().empty and time.monotonic() < deadline:
        desk.wait_for_timeout(200)
    desk.get_by_text("1 keep · 82 unseen").wait_for()
    desk.keyboard.press("?")
    assert desk.get_by_role("dialog", name="Keys").get_by_text("flag to review").is_visible()
    desk.keyboard.press("j")
    assert shown(desk) == [rows[6]], "the map is read in peace"
    desk.keyboard.press("?")
    desk.keyboard.press("]")
    desk.wait_for_url("**page=2**")
    settle(desk)
    assert not set(rows) & {row_of(card) for card in cards(desk).all()}
    desk.keyboard.press("/")
    assert desk.evaluate("document.activeElement.getAttribute('aria-label')") == "Text"


def test_on_a_narrow_screen_the_row_stands_below_the_list(page, address):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    page.locator(CARDS).first.wait_for()
    listed = page.get_by_role("listbox", name="Rows of this page").bounding_box()
    row = page.locator(CARDS).first.bounding_box()
    assert row["y"] >= listed["y"] + listed["height"] and row["width"] > 300
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_each_part_of_the_filter_is_said_and_goes_by_its_cross(page, address):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/audit?concept=sae:3&find=money&flag=Not+flagged&where_topic=money&where_topic=rivers")
    settle(page)
    chips = {"“money”": "find", "Not flagged": "flag", "topic: money or rivers": "where_topic"}
    for words in chips:
        page.get_by_role("button", name=words, exact=True).wait_for()
    for words, key in chips.items():
        page.get_by_role("button", name=words, exact=True).click()
        settle(page)
        assert f"{key}=" not in page.url
        assert page.get_by_role("button", name=words, exact=True).count() == 0


def test_rows_like_a_row_are_found_and_shown_together(page, address):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    card = page.locator(CARDS).first
    card.wait_for()
    row = row_of(card)
    card.get_by_role("button", name="Similar").click()
    page.locator(".like").nth(7).wait_for()
    page.get_by_role("link", name="Show these 9 together").click()
    page.get_by_role("button", name="9 rows alone").wait_for()
    settle(page)
    assert row in {row_of(each) for each in cards(page).all()} and cards(page).count() == 9
    page.get_by_role("button", name="9 rows alone").click()
    settle(page)
    assert "row=" not in page.url
