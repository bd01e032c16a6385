"""Text that would do harm, or break a layout, shows as itself on each page."""

from __future__ import annotations

import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, build
from concept_audit.concepts.options import SaeTraining
from tests.app.browser import dashboard, settle, words
from tests.conftest import chat_rows

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
        rows.append({"messages": turns, "topic": text[:60], "kind": name})
    build(
        BuildOptions(
            data=str(write_rows(cache.parent / "rows.jsonl", rows)),
            out=cache / "hostile",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(2,),
            sae_training=SaeTraining(expansion=2, k=4, batch=128, min_steps=30, max_steps=30),
        )
    )
    audit = Audit(cache / "hostile")
    found = audit.rows.list()
    audit.flags.set(found["content_hash"][-len(HOSTILE) :].tolist(), note=HOSTILE["handler"], by="<b>me</b> $x$")
    audit.labels.add(
        "odd",
        [
            LabelledExample((Message("user", "q"), Message("assistant", f"{i} {HOSTILE['handler']}")), i % 2)
            for i in range(8)
        ],
    )
    audit.train_probe("odd")
    audit.concepts.label(3, HOSTILE["handler"])
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
    assert page.locator('img[src="x"], [href^="javascript"]').count() == 0
    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0, f"the page is {width} px too wide"
    if "audit?concept=probe" in path:
        said = words(page)
        for name in ("script", "handler", "markdown", "latex", "emoji"):
            assert HOSTILE[name] in said, name
        for sign in ("before␀after", "שלום", "characters more", "bell"):
            assert sign in said, sign
        assert page.locator(".katex").count() == 0
