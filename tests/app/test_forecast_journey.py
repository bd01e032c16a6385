"""From a forecast to a cleaned set in a real browser: the concept that moves, its rows, a flag, what if, the export."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pandas as pd
import pytest

from concept_audit import Audit, RowFilter
from concept_audit_app.components.forecast_view import in_units, movers
from tests.app.browser import PATIENCE, cards, dashboard, row_of, settle, words


@pytest.fixture
def place(forecast_base, tmp_path) -> Path:
    """An audit with the forecast of all rows and the influence of the feature that leads it, which may be written to."""
    cache = Path(shutil.copytree(forecast_base, tmp_path / "cache"))
    audit = Audit(cache / "small")
    first = movers(in_units(audit.forecast(), "relative"))["concept_id"].iloc[0]
    audit.rank(first, "concept_influence")
    return cache / "small"


def test_from_the_forecast_to_the_rows_a_flag_what_if_and_the_export(page, place, tmp_path):
    with dashboard(place.parent, place.name) as url:
        page.goto(f"{url}/forecast")
        settle(page)
        assert "would by chance" in words(page)
        page.get_by_role("link", name=re.compile("Rows that push")).click()
        page.wait_for_url("**/audit?**")
        settle(page)
        asked = parse_qs(urlparse(page.url).query)
        (concept,) = asked["concept"]
        assert asked["method"] == ["concept_influence"]
        first = row_of(cards(page).first)
        audit = Audit(place)
        assert first == audit.rank(concept, "concept_influence")["example_id"].iloc[0]
        page.locator("h1").first.click()
        page.keyboard.press("x")
        cards(page).first.get_by_text("flagged: remove").wait_for(state="attached")
        settle(page)
        page.goto(f"{url}/forecast?forecast=without")
        settle(page)
        page.get_by_text("At once, for concepts with influence scores").wait_for()
        effects = Audit(place).forecasts.removal_effects().set_index("concept_id").loc[concept]
        assert effects["n_left_out"] == 1 and effects["after"] < effects["before"]
        page.get_by_role("button", name="Compute the forecast").click()
        page.get_by_text("move further than 95%").wait_for(timeout=4 * PATIENCE)  # the model is loaded, and runs
        settle(page)
        assert Audit(place).forecasts.has(RowFilter(flag="any"))
        page.goto(f"{url}/export")
        settle(page)
        with page.expect_download() as download:
            page.get_by_role("button", name=re.compile("Download 1 row")).click()
        download.value.save_as(tmp_path / "flagged.csv")
    table = pd.read_csv(tmp_path / "flagged.csv")
    assert table["example_id"].tolist() == [first] and table["flag"].tolist() == ["remove"]
