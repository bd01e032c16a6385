"""Which page of a list shows: the number in the URL, written only when it is not the first."""

from __future__ import annotations

from concept_audit_app.components.url import in_url, put

PAGE = "page"
"""The parameter of the URL."""


def page_in_url(pages: int) -> int:
    """The page that shows; a number beyond the last page is set right in the URL.

    Args:
        pages: how many there are.
    """
    asked = in_url(PAGE)
    if asked is None:
        return 1
    page = min(max(int(asked), 1), pages) if asked.isdecimal() else 1
    if asked != str(page):
        go_to(page)
        in_url(PAGE)  # writes it
    return page


def go_to(page: int) -> None:
    """Show another page of the list, from a callback."""
    put(PAGE, None if page == 1 else str(page))


def first_page() -> None:
    """Go back to the first page of a list, since what it lists has changed; a link may name another."""
    go_to(1)
