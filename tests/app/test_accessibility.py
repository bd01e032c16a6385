"""axe-core on every page: no serious or critical violation that is ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from concept_audit import Audit, LabelledExample, Message
from tests.app.browser import settle

AXE = Path(__file__).parent / "axe/node_modules/axe-core/axe.min.js"
PAGES = ["", "forecast", "concepts", "probe_lab", "audit", "compare", "groups", "evidence", "export"]
STREAMLITS = {
    "aria-allowed-attr",
    "aria-required-children",
    "aria-required-parent",
    "scrollable-region-focusable",
    "nested-interactive",
    "label",
    "aria-input-field-name",
    "select-name",
}
"""Rules that Streamlit's own widgets break; what they say of anything else still counts."""
WIDGET = '[data-baseweb], [data-testid^="stDataFrame"], [role="slider"], .stPlotlyChart, [data-testid^="stSlider"]'


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: npm install --prefix tests/app/axe axe-core@4")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_serious_violation(browser, address, cache_copy, scheme):
    audit = Audit(cache_copy / "small")
    audit.labels.add(
        "tone", [LabelledExample((Message("user", "Hi"), Message("assistant", f"Yes {i}")), i % 2) for i in range(8)]
    )
    audit.train_probe("tone")
    audit.flags.set([audit.rows.list(limit=1)["content_hash"][0]])
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    found = []
    for path in PAGES:
        page.goto(f"{address}/{path}")
        settle(page)
        page.wait_for_timeout(500)
        page.evaluate(AXE.read_text("utf-8"))
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        for violation in result["violations"]:
            if violation["impact"] not in ("serious", "critical"):
                continue
            for node in violation["nodes"]:
                selector = node["target"][0] if isinstance(node["target"][0], str) else node["target"][0][0]
                theirs = violation["id"] in STREAMLITS and page.evaluate(
                    "([s, w]) => !!document.querySelector(s)?.closest(w)", [selector, WIDGET]
                )
                if not theirs:
                    found.append(f"{path or 'overview'}: {violation['id']}: {selector}: {node['html'][:160]}")
    context.close()
    assert not found, "\n".join(found)
