"""How the desk is laid out: what stands in one line, and whether all of it can be read, in a real browser."""

from __future__ import annotations

import pytest

from concept_audit import Audit
from tests.app.browser import settle

NARROW = {"width": 1280, "height": 800}
NOTE = "flatters the one who asks, and in words that no other row of these data has"
FILTER = "&find=a&in=In+the+response&not_topic=%3Cb%3Erivers%3C%2Fb%3E&range_number=0..1001&scores=-9..99&flag=Flagged"
BELOW = """() => {
    const stop = document.querySelector('[data-testid="stStatusWidget"]')
    return stop !== null && stop.getBoundingClientRect().y > innerHeight / 2
}"""
"""Streamlit's Stop button is shown, in the lower half of the window."""


@pytest.fixture
def flagged(cache_copy) -> Audit:
    """The audit with rows of every flag; the first is not flagged, the second is, and the third is noted besides."""
    audit = Audit(cache_copy / "small")
    hashes = audit.rank("sae:3")["content_hash"].drop_duplicates().tolist()
    audit.flags.set(hashes[1:2], "remove")
    audit.flags.set(hashes[2:3], "review", NOTE)
    for number, flag in enumerate(("remove", "review", "keep")):
        audit.flags.set(hashes[3 + 9 * number : 12 + 9 * number], flag)
    return audit


@pytest.fixture
def desk(page, address, flagged):
    page.set_viewport_size(NARROW)

    def opened(query: str = ""):
        page.goto(f"{address}/audit?concept=sae:3{query}")
        settle(page)
        page.get_by_role("option").first.wait_for()
        page.wait_for_timeout(500)
        return page

    return opened


def boxes(controls) -> list[dict]:
    return [box for one in controls.all() if (box := one.bounding_box()) and box["width"] > 0]


def in_one_line(controls) -> bool:
    """Whether the middles of controls are equally high, and none lies over another."""
    found = sorted(boxes(controls), key=lambda box: box["x"])
    middles = [box["y"] + box["height"] / 2 for box in found]
    apart = all(one["x"] + one["width"] <= other["x"] + 1 for one, other in zip(found, found[1:], strict=False))
    return max(middles) - min(middles) < 4 and apart


@pytest.mark.parametrize("query", ["", FILTER])
def test_no_control_wraps_into_a_second_line(desk, query):
    page = desk(query)
    bar = page.locator(".st-key-bar").locator("h1, button:visible, a:visible, input")
    foot = page.locator(".foot").locator("button:visible, input:visible")
    chips = page.locator(".st-key-chips button:visible")
    assert bar.count() >= 6 and foot.count() == 7 and chips.count() == (5 if query else 0), (
        foot.count(),
        chips.count(),
    )
    for controls in (bar, foot, *([chips] if query else [])):
        assert in_one_line(controls), controls
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= NARROW["width"] for box in boxes(controls))
    if query:
        right = page.get_by_role("listbox").bounding_box()
        assert max(box["x"] + box["width"] for box in boxes(chips)) <= right["x"] + right["width"] + 1
    assert page.locator(".st-key-told p").first.bounding_box()["height"] < 30, "the counts are one line, too"


def test_what_is_said_of_keys_has_a_place_of_its_own_and_is_never_cut(desk):
    page = desk()
    page.keyboard.press("n")
    said = page.get_by_text("A note goes with a flag: X or V first, then N")
    box, foot = said.bounding_box(), page.locator(".foot").bounding_box()
    assert box["y"] >= foot["y"] + foot["height"] - 1 and box["y"] + box["height"] <= NARROW["height"]
    assert said.evaluate("one => one.scrollWidth <= one.clientWidth")
    assert page.evaluate("""document.querySelector('[data-testid="stMain"]').scrollHeight - innerHeight""") <= 0


@pytest.mark.parametrize("place", [0, 1, 2], ids=["unflagged", "flagged", "noted"])
def test_the_head_of_a_row_is_as_wide_as_the_row_and_its_buttons_are_one_line(desk, place):
    page = desk()
    for _ in range(place):
        page.keyboard.press("j")
    card = page.locator('[class*="st-key-row-"][data-cursor="true"]')
    head, words = card.locator('[class*="st-key-head-"]'), card.locator(".flag-words").locator("..")
    assert words.bounding_box()["width"] > 0.8 * card.bounding_box()["width"]
    buttons = head.locator("button:visible")
    assert buttons.count() == (6 if place else 5) and in_one_line(buttons)
    assert head.bounding_box()["height"] < (170 if place == 2 else 145)
    assert (NOTE in words.inner_text()) == (place == 2)


@pytest.mark.parametrize("query", ["&method=feature_activation", "&method=vector_filter"])
def test_rows_to_choose_from_and_a_row_s_text_need_no_scrolling(desk, query):
    page = desk()
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(page.url + query)
    settle(page)
    page.get_by_role("option").first.wait_for()
    page.wait_for_timeout(500)
    whole = [box for box in boxes(page.locator(".row")) if box["y"] + box["height"] <= 900]
    assert len(whole) >= 8
    turns = boxes(page.locator(".st-key-desk-row .turn:visible"))
    assert min(box["y"] for box in turns) < 400


def test_the_stop_button_of_a_page_that_runs_lies_over_no_control(page, address, flagged):
    page.set_viewport_size(NARROW)
    page.goto(f"{address}/audit?concept=sae:3")  # the first page of a server takes long
    # Until the style sheet is there, with the page's first elements, it lies where Streamlit has it.
    page.wait_for_function(BELOW)
    there = page.get_by_test_id("stStatusWidget").bounding_box()
    settle(page)
    controls = page.locator("button:visible, a:visible, input:visible, .row:visible").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(({x, y, width, height}) => ({x, y, width, height}))"
    )
    right, bottom = there["x"] + there["width"], there["y"] + there["height"]
    over = [
        box
        for box in controls
        if box["x"] < right and there["x"] < box["x"] + box["width"]
        if box["y"] < bottom and there["y"] < box["y"] + box["height"]
    ]
    assert len(controls) > 30 and not over


@pytest.mark.parametrize("width", [390, 720])
def test_a_narrow_window_shows_the_strongest_token_of_rows_and_few_lines_of_controls(desk, width):
    page = desk()
    page.set_viewport_size({"width": width, "height": 844})
    page.reload()
    settle(page)
    page.locator(".row .phrase mark").first.wait_for()
    page.wait_for_timeout(500)
    bar = boxes(page.locator(".st-key-bar").locator("button:visible, a:visible, input"))
    middles = sorted(box["y"] + box["height"] / 2 for box in bar)
    lines = 1 + sum(below - above > 15 for above, below in zip(middles, middles[1:], strict=False))
    assert lines <= (3 if width == 390 else 1)
    assert page.get_by_role("button", name="Act on many").is_visible(), "by its name, although only its sign shows"
    seen = page.locator(".row").evaluate_all(
        """rows => rows.filter(row => row.querySelector("mark")).map(row => {
            const phrase = row.querySelector(".phrase").getBoundingClientRect()
            const mark = row.querySelector("mark").getClientRects()[0]
            return mark.top < phrase.bottom && mark.left < phrase.right
        })"""
    )
    assert len(seen) >= 5 and all(seen)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
