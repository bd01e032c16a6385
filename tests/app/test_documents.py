"""Pages of an audit of documents that were split: a window says where it lies, and leads to its document."""

from __future__ import annotations

import random

import pytest

from concept_audit import Audit, BuildOptions, LabelledExample, Message, ModelOptions, RowFilter, Window, build
from concept_audit_app.components.desk import list_rows
from concept_audit_app.components.documents import window_words
from concept_audit_app.components.rows import metadata_text
from concept_audit_app.components.scale import scale_of
from tests.app.test_pages import open_page
from tests.conftest import sentence


@pytest.fixture
def audit(tmp_path, monkeypatch, model_directory, write_rows) -> Audit:
    made = random.Random(1)
    rows = [{"text": " ".join(sentence(made, 8) for _ in range(size))} for size in (1, 9, 1, 14)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = ModelOptions(str(model_directory), device="cpu")
    options = BuildOptions(
        str(data), tmp_path / "documents", model, layers=(1,), sae="none", max_tokens=48, long_documents="split"
    )
    audit = Audit(build(options))
    labelled = [
        LabelledExample((Message("user", "q"), Message("assistant", f"{'yes' if n % 2 else 'no'} {'so ' * n}")), n % 2)
        for n in range(12)
    ]
    audit.train_probe("agrees", labelled)
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(tmp_path))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "documents")
    return audit


@pytest.mark.parametrize("name", ["overview", "probe_lab", "ranking", "compare", "groups", "export"])
def test_pages_open_without_an_exception(audit, name):
    page = open_page(name)
    assert not page.exception and not page.error


def said(page) -> str:
    """The headings of the rows on a page."""
    return "\n".join(element.proto.body for element in page.get("html"))


def test_a_window_says_where_it_lies_and_leads_to_its_document(audit):
    page = open_page("ranking")
    places = audit.documents.places(audit.rows.list()["example_id"].tolist()).values()
    assert [window_words(place) for place in places].count("") == 2
    assert all(window_words(place) in said(page) for place in places)
    links = [link.proto for link in page.get("page_link") if link.proto.label == "Document"]
    assert len(links) == sum(place.of > 1 for place in places)
    assert any("where_document_number=3" in link.query_string for link in links)
    page.query_params["where_document_number"] = "3"
    page.run()
    assert not page.exception
    assert all((window_words(place) in said(page)) == (place.document == 3) for place in places if place.of > 1)


def test_a_window_is_told_in_words_and_not_by_its_metadata_besides(audit):
    metadata = '{"shelf": "essays", "document_number": 3, "window_number": 2}'
    assert metadata_text(metadata, Window(3, 2, 4, 10, 20)) == "shelf: essays"
    assert metadata_text(metadata) == "shelf: essays · document_number: 3 · window_number: 2", "of the data's own"
    page = open_page("ranking")
    assert "document_number" not in said(page)
    rows = audit.rank("probe:agrees")
    places = audit.documents.places(rows["example_id"].tolist())
    listed = list_rows(rows, scale_of("vector_filter", audit.rankings.summary("probe:agrees")), RowFilter(), places)
    assert [row["about"] for row in listed] == [window_words(places[row["id"]]) for row in listed]


def test_the_export_page_offers_whole_documents_where_there_are_documents(audit, monkeypatch):
    rows = audit.rows.list()
    places = audit.documents.places(rows["example_id"].tolist())
    part = next(row for row in rows.itertuples() if places[row.example_id].document == 3)
    audit.flags.set([part.content_hash])
    page = open_page("export")
    page.session_state["rows"] = "none"
    page.run()
    assert downloads(page) == [f"Download {len(rows) - 1} rows of 4 documents", "Manifest"]
    (toggle,) = [each for each in page.toggle if each.label == "Whole documents only"]
    toggle.set_value(True).run()
    left = [number for number, place in places.items() if place.document != 3]
    assert not page.exception and downloads(page)[0] == f"Download {len(left)} rows of 3 documents"
    assert set(page.dataframe[0].value["example_id"]) == set(left)
    assert audit.exports.rows_of(RowFilter(without_flags=("remove",)), whole_documents=True) == left
    page.session_state["columns"] = "own"
    page.run()
    assert downloads(page)[0] == "Download 3 documents", "which are the lines of the file"
    whole = audit.exports.to_bytes(
        "jsonl", where=RowFilter(without_flags=("remove",)), schema="own", whole_documents=True
    )[0]
    assert len(whole.splitlines()) == 3
    page.session_state["columns"] = "audit"
    page.session_state["rows"] = "any"
    page.run()
    assert "no document of which every window passes" in page.info[0].value
    audit.flags.set(rows["content_hash"].tolist())
    page.run()
    assert downloads(page)[0] == f"Download {len(rows)} rows of 4 documents"


def downloads(page) -> list[str]:
    """What can be downloaded."""
    return [element.proto.label for element in page.get("download_button")]
