"""The pages of the desk's list: by buttons, by keys and by their number, in the URL and in the browser's history."""

from __future__ import annotations

import pytest

from tests.app.browser import cards, row_of, settle

LAST = 9
"""Of 83 rows, 10 a page."""


def there(page) -> str:
    """The number in the box."""
    return page.get_by_role("textbox", name="Page", exact=True).input_value()


def go(page, number: int) -> None:
    """Wait until a page shows, also in the URL."""
    page.wait_for_url(lambda url: f"page={number}" in url if number > 1 else "page=" not in url)
    settle(page)
    assert there(page) == str(number)


def ranks(page) -> list[str]:
    """The ranks in the list."""
    return [line.inner_text().split()[0] for line in page.get_by_role("option").all()]


@pytest.fixture
def desk(page, address):
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    page.get_by_role("option").first.wait_for()
    return page


def test_pages_turn_by_buttons_by_keys_and_by_number_and_back_leads_through_each(desk):
    first = ranks(desk)
    desk.get_by_role("button", name="Page after").click()
    go(desk, 2)
    assert ranks(desk) == [f"#{rank}" for rank in range(11, 21)]
    desk.keyboard.press("}")
    go(desk, LAST)
    assert len(ranks(desk)) == 83 % 10
    assert desk.get_by_role("button", name="Last page").is_disabled()
    desk.keyboard.press("]")
    box = desk.get_by_role("textbox", name="Page", exact=True)
    box.fill("5")
    box.press("Enter")
    go(desk, 5)
    desk.keyboard.press("j")
    assert row_of(desk.locator('[data-cursor="true"]')) == row_of(cards(desk).nth(1)), "the list has the focus again"
    for number in (LAST, 2, 1):
        desk.go_back()
        go(desk, number)
    assert ranks(desk) == first
    desk.go_forward()
    go(desk, 2)
    desk.get_by_role("button", name="First page").click()
    go(desk, 1)


def test_keys_that_follow_quickly_turn_as_many_pages(desk):
    for _ in range(3):
        desk.keyboard.press("]")
    assert there(desk) == "4", "without asking the server"
    go(desk, 4)
    desk.keyboard.press("[")
    go(desk, 3)


@pytest.mark.parametrize(("asked", "shown"), [("99", str(LAST)), ("0", "1"), ("-2", "1"), ("<b>", "1"), ("3", "3")])
def test_a_number_that_is_no_page_is_set_right(page, address, asked, shown):
    page.goto(f"{address}/audit?concept=sae:3&page={asked}")
    settle(page)
    page.get_by_role("option").first.wait_for()
    assert there(page) == shown
    page.wait_for_url(lambda url: f"page={shown}" in url if shown != "1" else "page=" not in url)


def test_typing_in_the_box_is_no_act_and_nonsense_is_forgotten(desk):
    box = desk.get_by_role("textbox", name="Page", exact=True)
    for typed in ("x", "1e9", "2.5", ""):
        box.fill("")
        desk.keyboard.type(typed)
        box.press("Enter" if typed != "1e9" else "Escape")
        assert there(desk) == "1"
    desk.wait_for_timeout(2000)
    assert "page=" not in desk.url and desk.get_by_text("83 unseen").is_visible()


def test_a_filter_leads_to_the_first_page_and_one_page_has_no_numbers(desk):
    desk.keyboard.press("]")
    go(desk, 2)
    desk.keyboard.press("/")
    desk.keyboard.type("onerror")
    desk.keyboard.press("Enter")
    desk.get_by_text("1 of 83 rows", exact=False).wait_for()
    settle(desk)
    assert "page=" not in desk.url and desk.get_by_role("option").count() == 1
    assert not desk.get_by_role("navigation", name="Pages of the list").is_visible()
