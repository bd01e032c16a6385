"""Each page by itself, in Streamlit's test harness: empty states, errors, and what is offered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import concept_audit_app
from concept_audit import (
    Audit,
    BuildOptions,
    CurvatureOptions,
    IndexOptions,
    LabelledExample,
    Message,
    ModelOptions,
    Stage,
    build,
)
from concept_audit.store.index import index_files
from concept_audit.store.layout import Layout
from concept_audit.store.partition import RowPartition
from concept_audit.store.under_way import report
from concept_audit_app.components.tables import NOTHING
from tests.app.browser import settle
from tests.backend.audit.test_read_only import state

MAIN = str(Path(concept_audit_app.__file__).parent / "main.py")
PAGES = ["overview", "concepts", "probe_lab", "ranking", "groups", "export"]

SMALL_INDEX = IndexOptions(
    row_bytes=1024, samples=40, curvature=CurvatureOptions(curvature_tokens=2_000), precision="float32"
)


def open_page(name: str = "overview") -> AppTest:
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    return test.switch_page(f"app_pages/{name}.py").run() if name != "overview" else test


def words(test: AppTest) -> str:
    """Everything that the page says."""
    parts = [*test.title, *test.markdown, *test.caption, *test.info, *test.error, *test.code]
    return "\n".join(str(element.value) for element in parts)


@pytest.fixture
def audit(cache_copy, monkeypatch) -> Audit:
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    return Audit(cache_copy / "small")


@pytest.mark.parametrize("name", PAGES)
def test_pages_open_without_an_exception(audit, name):
    assert not open_page(name).exception


@pytest.mark.parametrize("name", [*PAGES, "compare", "evidence"])
def test_pages_open_read_only_and_write_nothing(audit, monkeypatch, name):
    monkeypatch.setenv("CONCEPT_AUDIT_READ_ONLY", "1")
    before = state(audit.root)
    assert not open_page(name).exception
    assert state(audit.root) == before


@pytest.mark.parametrize("name", PAGES)
def test_pages_open_for_an_audit_without_sae_and_probes(tmp_path, monkeypatch, data_file, model_directory, name):
    build(
        BuildOptions(
            data=str(data_file),
            out=tmp_path / "bare",
            model=ModelOptions(str(model_directory), device="cpu"),
            layers=(2,),
            sae="none",
        )
    )
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(tmp_path))
    test = open_page(name)
    assert not test.exception
    if name in ("concepts", "ranking", "groups"):
        assert "robe" in words(test)


def test_an_empty_cache_says_how_to_make_an_audit(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(tmp_path))
    assert "concept-audit demo" in words(open_page())


def test_an_unfinished_audit_says_how_to_finish_it(cache_copy, monkeypatch):
    manifest = cache_copy / "small" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["stages"]["store"]["done"] = False
    manifest.write_text(json.dumps(values))
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    assert "not finished" in words(open_page())


def test_labels_outlive_the_session(audit):
    turns = (Message("user", "Hello"), Message("assistant", "Good day"))
    audit.labels.add("kept", [LabelledExample(turns, 1)])
    assert "label 3 more that show it and 4 more that do not" in words(open_page("probe_lab"))


def test_a_probe_of_another_model_is_explained_not_shown(audit):
    from concept_audit.store import workspace

    details = {"auroc": 1.0, "auroc_low": 0.9, "auroc_high": 1.0, "n_positive": 4, "n_negative": 4}
    direction = audit.concept("sae:0").direction
    with audit.opened.database.writing() as cursor:
        workspace.save_probe(cursor, "foreign", 2, "difference_of_means", direction, details, "0000")
    test = open_page("ranking")
    assert not test.exception
    assert "train it again" in words(test)


def test_the_overview_says_how_far_the_index_is(audit):
    assert f"concept-audit index {audit.root}" in words(open_page()), "from anywhere"
    files = index_files(Layout(audit.root), "0", RowPartition(300))
    files.write_description({"done": False})
    stage = Stage("Gradient of every row", 200, "rows")
    stage.advance(90, "45 rows a second, 2 of 2 workers")
    report(files.rows.store, files.progress, stage)
    test = open_page()
    assert not test.exception and "Gradient index:" not in words(test)
    (bar,) = test.get("progress")
    assert "gradient of every row" in bar.proto.text and "2 of 2 workers" in bar.proto.text
    shutil.rmtree(files.root)
    audit.build_index(SMALL_INDEX)
    about = audit.index.describe()
    layers = f"{len(about['chosen'])} of {about['tracked']} layers"
    assert f"Gradient index: 1 KiB a row, {layers}, blocks 1 to 3" in words(open_page())


def test_rows_that_are_query_examples_wear_a_badge(audit):
    pages = {}
    for method in ("bm25", "vector_filter"):
        test = AppTest.from_file(MAIN, default_timeout=60).run()
        test.query_params.update({"concept": "sae:3", "method": method})
        pages[method] = test.switch_page("app_pages/ranking.py").run()
        assert not pages[method].exception
    shown = {name: [str(e.value) for e in page.get("html")] for name, page in pages.items()}
    first = audit.rank("sae:3", "bm25", top=10)
    assert first["is_query"].any()
    badges = [text for text in shown["bm25"] if "query example</span>" in text]
    assert len(badges) == first["is_query"].sum()
    assert all("scored by the others alone" in text for text in badges)
    assert not [text for text in shown["vector_filter"] if "query example" in text]


def test_the_evidence_page_says_how_many_labelled_rows_are_left_out(audit):
    rows = audit.rows.list(limit=24)
    examples = [
        LabelledExample(tuple(Message(**turn) for turn in json.loads(text)), i % 2)
        for i, text in enumerate(rows["messages"])
    ]
    audit.train_probe("tone", examples, layer=2)
    audit.rank("tone")
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": "probe:tone"})
    test = test.switch_page("app_pages/evidence.py").run()
    assert not test.exception
    assert "24 rows were labelled to train this probe, and are left out" in words(test)


def test_the_evidence_page_shows_a_validation(audit):
    from concept_audit import Recipe, ValidateOptions
    from tests.backend.test_audit import typed

    audit.train_probe("tone", typed(24), layer=2)
    test = open_page("evidence")
    assert f"concept-audit validate {audit.root}" in words(test), "from anywhere"
    recipe = Recipe(rank=2, learning_rate=1e-2, max_steps=1, batch=4, max_tokens=40, precision="float32")
    audit.validate(
        "tone",
        ValidateOptions(
            methods=("vector_filter", "bm25"),
            removed=("vector_filter",),
            seeds=2,
            subsets=4,
            recipe=recipe,
            answer_tokens=2,
            natural_rows=4,
        ),
    )
    test = open_page("evidence")
    assert not test.exception
    assert "Without the top rows" in words(test) and "Linear datamodelling score" in words(test)
    assert "Paired by seed" in words(test)


def test_the_evidence_of_a_single_seed_says_why_it_has_no_interval():
    def page(seeds: int) -> None:
        import pandas as pd

        from concept_audit.metrics import paired
        from concept_audit_app.components.evidence import _against_random

        found = paired([-0.5, -0.25][:seeds])
        interval = {"estimate": found.value, "low": found.low, "high": found.high, "p": found.p, "n": found.n}
        line = {"measure": "removal", "method": "bm25", "share": 0.1, **interval}
        _against_random(pd.DataFrame([line]))

    alone, several = (AppTest.from_function(page, default_timeout=60, args=(seeds,)).run() for seeds in (1, 2))
    assert not alone.exception and not several.exception
    assert alone.dataframe[0].value[["low", "high", "p"]].isna().all(axis=None)
    assert alone.dataframe[0].proto.placeholder == NOTHING
    specs = [test.get("plotly_chart")[0].proto.spec for test in (alone, several)]
    assert ["(one seed)" in spec for spec in specs] == [True, False]
    assert ["(95% interval)" in spec for spec in specs] == [False, True]
    why = f"{NOTHING} stands where a single seed gives no interval"
    assert why in words(alone) and why not in words(several)


def test_overview_by_its_name_leads_to_the_overview(page, address):
    page.goto(f"{address}/overview?group=topic+%3D+money")
    settle(page)
    assert page.locator("h1").inner_text() == "small"
    assert page.url == f"{address}/?group=topic+%3D+money" and not page.get_by_text("Page not found").count()
    assert page.get_by_role("link", name="Overview", exact=True).count() == 1, "it stands among the pages once"


def test_long_work_can_be_cancelled_and_goes_on_where_it_was(audit, monkeypatch):
    """A click starts the script anew, which raises in the running one at its next step."""
    from streamlit.runtime.scriptrunner import RerunException

    from concept_audit import InfluenceOptions
    from concept_audit_app.components import progress

    offered, advances = [], []
    monkeypatch.setattr(progress.st, "button", lambda label, **_: offered.append(label))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)

    class Bar:
        def progress(self, share, text):
            advances.append(share)
            if len(advances) == 3:
                raise RerunException(None)

    monkeypatch.setattr(progress.st, "progress", lambda *_: Bar())
    exact = InfluenceOptions.of(engine="exact", curvature="identity", precision="float32")
    with pytest.raises(RerunException):
        audit.rankings.ensure("sae:3", "concept_influence", exact, progress.PageProgress(cancel=True))
    assert "Cancel" in offered and not audit.rankings.has("sae:3", "concept_influence", exact)
    audit.rankings.ensure("sae:3", "concept_influence", exact)
    assert audit.rankings.has("sae:3", "concept_influence", exact)
