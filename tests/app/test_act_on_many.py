"""One act on all rows that pass the filter, in a real browser."""

from __future__ import annotations

import re

import pandas as pd

from concept_audit import Audit, RowFilter
from tests.app.browser import cards, settle

MONEY = RowFilter(metadata={"topic": ("money",)})


def act(page, what: str):
    """The dialog, at one of its acts, for all rows of the filter."""
    page.get_by_role("button", name="Act on many").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("All that pass the filter", exact=True).click()
    dialog.get_by_role("radio", name=what, exact=True).click()
    settle(page)
    return dialog


def undo(page, said: str) -> None:
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_text(re.compile(f"^Undone.*{said}")).wait_for()
    settle(page)


def test_flags_notes_labels_and_files_of_a_whole_filter_each_undone_in_one(page, address, cache_copy, tmp_path):
    audit = Audit(cache_copy / "small")
    rows = audit.rank("sae:3", where=MONEY)
    texts, count = set(rows["content_hash"]), len(rows)
    assert count > 10, "more than a page"
    page.goto(f"{address}/audit?concept=sae:3&where_topic=money")
    settle(page)
    dialog = act(page, "Flag")
    dialog.get_by_text(f"{count} rows on all pages: {count} unseen", exact=True).wait_for()
    dialog.get_by_role("button", name=f"Flag to review: {count}").click()
    page.get_by_text(f"{len(texts)} texts flagged to review").wait_for()
    settle(page)
    dialog = act(page, "Note")
    dialog.get_by_label("Note").fill("read <b>twice</b>")
    dialog.get_by_label("Note").press("Tab")
    dialog.get_by_role("button", name=f"Write the note on flagged rows of {count}").click()
    page.get_by_text(f"{len(texts)} texts noted").wait_for()
    settle(page)
    noted = audit.rows.list(RowFilter(flag="review"))
    assert set(noted["content_hash"]) == texts and set(noted["note"]) == {"read <b>twice</b>"}
    assert "flagged: review (read <b>twice</b>)" in cards(page).first.inner_text()
    dialog = act(page, "Label")
    box = dialog.get_by_role("combobox", name="Probe")
    box.fill("about money")
    box.press("Enter")
    dialog.get_by_role("button", name=f"Shows it: {count}").click()
    page.get_by_text(f"{len(texts)} texts labelled for about money").wait_for()
    settle(page)
    assert {e.content_hash: e.label for e in audit.labels.list("about money")} == dict.fromkeys(texts, 1)
    dialog = act(page, "Export")
    with page.expect_download() as download:
        dialog.get_by_role("button", name=f"Download {count} rows").click()
    download.value.save_as(tmp_path / "view.csv")
    assert set(pd.read_csv(tmp_path / "view.csv")["example_id"]) == set(rows["example_id"])
    dialog.get_by_text("The first", exact=True).click()
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download 20 rows").click()
    download.value.save_as(tmp_path / "first.csv")
    assert pd.read_csv(tmp_path / "first.csv")["example_id"].tolist() == rows["example_id"].tolist()[:20]
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="detached")
    undo(page, "about money")
    assert list(audit.labels.list("about money")) == []
    undo(page, f"{len(texts)} texts")
    assert set(audit.rows.list(RowFilter(flag="review"))["note"]) == {""}
    undo(page, f"{len(texts)} texts")
    assert audit.rows.count(RowFilter(flag="any")) == 0


def test_the_twenty_worst_rows_are_flagged_and_the_rest_exported_in_five_clicks(page, address, cache_copy, tmp_path):
    audit, clicks = Audit(cache_copy / "small"), []

    def click(place) -> None:
        clicks.append(str(place))
        place.click()

    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    click(page.get_by_role("button", name="Act on many"))
    click(page.get_by_role("dialog").get_by_role("button", name="Flag to remove: 20"))
    page.get_by_text(re.compile("texts flagged to remove")).wait_for()
    settle(page)
    click(page.get_by_role("link", name="Export", exact=True))
    settle(page)
    click(page.get_by_role("radio", name="Cleaned data"))
    settle(page)
    flagged = set(audit.rows.list(RowFilter(flag="remove"))["example_id"])
    rest = set(audit.rows.list()["example_id"]) - flagged
    assert len(flagged) >= 20, "copies of a row share its flag"
    with page.expect_download() as download:
        click(page.get_by_role("button", name=f"Download {len(rest)} rows"))
    download.value.save_as(tmp_path / "cleaned.csv")
    assert set(pd.read_csv(tmp_path / "cleaned.csv")["example_id"]) == rest
    assert len(clicks) == 5


def test_after_a_download_escape_closes_the_dialog_and_its_button_has_the_focus(page, address):
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    dialog = act(page, "Export")
    button = dialog.get_by_role("button", name=re.compile("^Download"))
    for _ in range(2):
        with page.expect_download() as download:
            button.click()
        download.value.path()
        page.wait_for_function("document.activeElement.innerText?.includes('Download')", timeout=10_000)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached", timeout=10_000)
    assert "Act on many" in page.evaluate("document.activeElement.innerText")
    dialog = act(page, "Export")
    button.click()
    page.wait_for_function("document.querySelector('[role=dialog] [data-testid=stDownloadButton] button').disabled")
    page.wait_for_timeout(50)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached", timeout=10_000)


def test_rows_that_somebody_has_kept_are_told_before_an_act_and_are_unseen_after_the_way_back(
    page, address, cache_copy
):
    audit = Audit(cache_copy / "small")
    hashes = audit.rank("sae:3")["content_hash"].drop_duplicates().tolist()
    audit.flags.set(hashes[:1], "keep")
    audit.flags.set(hashes[1:2], "remove")
    kept, flagged = audit.rows.count(RowFilter(flag="keep")), audit.rows.count(RowFilter(flag="remove"))
    page.goto(f"{address}/audit?concept=sae:3")
    settle(page)
    assert "kept" in cards(page).first.inner_text() and "flagged" not in cards(page).first.inner_text()
    page.get_by_role("button", name="Act on many").click()
    dialog = page.get_by_role("dialog")
    first = audit.rank("sae:3", top=20)["flag"].value_counts()
    dialog.get_by_text(f"20 rows on all pages: {first['remove']} remove · {first['keep']} keep").wait_for()
    dialog.get_by_text("All that pass the filter", exact=True).click()
    dialog.get_by_text(
        f"83 rows on all pages: {flagged} remove · {kept} keep · {83 - kept - flagged} unseen"
    ).wait_for()
    dialog.get_by_role("button", name="Back to unseen: 83").click()
    page.get_by_text("2 texts unseen again").wait_for()
    settle(page)
    page.get_by_text("83 rows · 83 unseen").wait_for()
    assert audit.rows.count(RowFilter(flag="unseen")) == 83
