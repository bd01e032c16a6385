"""Text that would do harm, or break a layout, shows as itself on each page."""

from __future__ import annotations

import csv
import json

import pyarrow.parquet as pq
import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, RowFilter, build
from concept_audit.concepts.options import SaeTraining
from tests.app.browser import CARDS, dashboard, settle
from tests.conftest import chat_rows

FETCHED = "![i](http://127.0.0.1:9/seen.png) **b** $x$ <img src=x onerror='window.harmed=5'> [l](javascript:1)"
"""As markup it would fetch a picture, and harm."""
FIELD = "=cmd|' /C calc'!A0 <img src=x onerror='window.harmed=6'>"
DATA_FILE = "rows <img src=x onerror='window.harmed=7'> ![i](x) $x$ **b**.jsonl"
PROBE = "0.. -- __1__ --- .-_"
HARM = ", ".join(f'[src^="{start}"], [href^="{start}"]' for start in ("x", "http://127.0.0.1:9/", "javascript"))
"""What hostile text would have made of the page."""
"""As odd as a name may be."""
HOSTILE = {
    "script": "<script>window.harmed = 1</script>",
    "handler": "<img src=x onerror='window.harmed = 2'><svg onload=window.harmed=3>",
    "markdown": "**bold** [link](javascript:window.harmed=4) ![i](x) `code` # head :red[red] :material/home:",
    "latex": "$\\frac{1}{2}$ and $$x^2$$",
    "rtl": "left \u202eright to left\u202c שלום عربي",
    "control": "bell \x07 escape \x1b[31m back \x08 tab \t end",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f9ff",
    "null": "before\x00after",
    "long": "word " * 20_000,
    "unbroken": "x" * 3_000,
}


@pytest.fixture(scope="module")
def hostile_cache(tmp_path_factory, model_directory, write_rows):
    cache = tmp_path_factory.mktemp("hostile") / "cache"
    rows = chat_rows(30)
    for name, text in HOSTILE.items():
        turns = [{"role": "user", "content": f"{name}: {text[:60]}"}, {"role": "assistant", "content": text}]
        rows.append({"messages": turns, "topic": text[:60], "kind": name, FIELD: FETCHED})
    build(
        BuildOptions(
            data=str(write_rows(cache.parent / DATA_FILE, rows)),
            out=cache / "hostile",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(2,),
            sae_training=SaeTraining(expansion=2, k=4, batch=128, min_steps=30, max_steps=30),
        )
    )
    audit = Audit(cache / "hostile")
    found = audit.rows.list()
    audit.flags.set(found["content_hash"][-len(HOSTILE) :].tolist(), note=FETCHED, by=FETCHED)
    audit.labels.add(
        "odd",
        [
            LabelledExample((Message("user", "q"), Message("assistant", f"{i} {HOSTILE['handler']}")), i % 2)
            for i in range(8)
        ],
    )
    audit.train_probe("odd")
    audit.labels.add(PROBE, audit.labels.list("odd"))
    audit.concepts.label(3, FETCHED)
    audit.concepts.label(4, FETCHED)
    audit.views.save(FETCHED, "audit", "concept=sae:3&size=<img src=x>", FETCHED)
    return cache


@pytest.fixture(scope="module")
def hostile_url(hostile_cache):
    with dashboard(hostile_cache, "hostile") as url:
        yield url


@pytest.mark.parametrize(
    "path",
    [
        "",
        "?group=kind+%3D+script",
        "concepts?feature=3",
        "concepts?token=a",
        "probe_lab?from=Search&seek=script",
        "audit?concept=sae:3&size=50",
        "audit?concept=probe:odd&size=50&flag=Flagged",
        "compare?concept=sae:3",
        "groups?concept=probe:odd&by=topic",
        "evidence?concept=sae:3",
        "export",
    ],
)
def test_hostile_text_shows_as_itself(page, hostile_url, path):
    page.goto(f"{hostile_url}/{path}")
    settle(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.harmed") is None
    for name in ("Named views", "Log", "Nearest SAE features"):
        opens = page.get_by_text(name, exact=True)
        if opens.count():
            opens.first.click()
            page.wait_for_timeout(200)
            assert page.locator(HARM).count() == 0
            page.keyboard.press("Escape")  # it may lie over the next
            page.wait_for_timeout(200)
    for button in page.get_by_role("button", name="Undo").all()[:1]:
        button.hover()
        page.wait_for_timeout(300)
    assert page.locator(HARM).evaluate_all("found => found.map(one => one.outerHTML)") == []
    assert page.evaluate("window.harmed") is None
    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0, f"the page is {width} px too wide"
    if "audit?concept=probe" in path:
        # One row shows at a time; the others are there, and what the list shows of them.
        said = page.locator(CARDS).evaluate_all("all => all.map(one => one.textContent).join(' ')")
        for name in ("script", "handler", "markdown", "latex", "emoji"):
            assert HOSTILE[name] in said, name
        for sign in ("before␀after", "שלום", "characters more", "bell"):
            assert sign in said, sign
        assert page.locator(".katex").count() == 0


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_hostile_text_is_kept_in_every_export(hostile_cache, format, tmp_path):
    out = tmp_path / f"rows.{format}"
    Audit(hostile_cache / "hostile").exports.write(out, format, RowFilter(flag="any"))
    if format == "csv":
        rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
        assert all(cell[:1] not in ("=", "@", "\t", "\r", "\n") for row in rows for cell in (*row, *row.values()))
    elif format == "jsonl":
        rows = [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]
    else:
        rows = pq.read_table(out).to_pylist()
    field = "'" + FIELD if format == "csv" else FIELD
    assert [row["response"] for row in rows] == list(HOSTILE.values())
    assert {(row[field], row["note"], row["source"]) for row in rows} == {(FETCHED, FETCHED, DATA_FILE)}
