"""The overview's next step: by what is there and what has been seen."""

from __future__ import annotations

import pytest

from concept_audit import Audit
from concept_audit_app.components.next_steps import TOP, features_found, probes_found
from tests.app.test_pages import open_page, words
from tests.backend.test_audit import typed


@pytest.fixture
def audit(cache_copy, monkeypatch) -> Audit:
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache_copy))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    return Audit(cache_copy / "small")


def links(test) -> list[str]:
    return [element.proto.label for element in test.get("page_link")]


def test_the_probe_with_most_unseen_rows_comes_first_until_all_have_been_seen(audit):
    for name, layer in (("tone", 2), ("care", 3)):
        audit.train_probe(name, typed(24), layer=layer)
    top = {name: audit.rank(name, top=TOP) for name in ("tone", "care")}
    only = set(top["tone"]["content_hash"]) - set(top["care"]["content_hash"])
    assert only, "else the two probes put the same rows first"
    audit.flags.set(top["tone"]["content_hash"].tolist()[:1], "keep")
    audit.flags.set(sorted(only), "keep")
    first, second = probes_found(audit)
    assert (first.name, second.name) == ("care", "tone") and first.unseen > second.unseen
    test = open_page()
    seen = first.top - first.unseen
    told = (
        f"{seen or 'None'} of the 20 rows that are strongest in the probe “care” {'has' if seen == 1 else 'have'} been"
    )
    assert not test.exception and told in words(test)
    assert "Look at them" in links(test)
    audit.flags.set(audit.rows.list()["content_hash"].tolist(), "keep")
    test = open_page()
    assert "have been seen" in words(test) and "Draw a probe" in links(test) and "Look at them" not in links(test)
    audit.flags.set(top["tone"]["content_hash"].tolist()[:1], "remove")
    test = open_page()
    assert "1 row flagged" in words(test) and "Export" in links(test) and "Draw a probe" not in links(test)


def test_features_are_told_by_a_piece_of_text_whose_strongest_token_is_a_word(audit):
    found = features_found(audit)
    clearest = audit.feature_labels.clearest([int(each.concept_id.removeprefix("sae:")) for each in found])
    assert found and len({each.piece[1].lower() for each in found}) == len(found)
    for each in found:
        before, token, after = each.piece
        assert token.isalpha() and len(token) > 2 and not before[-1:].isalpha() and not after[:1].isalpha()
        assert before + token + after == clearest[int(each.concept_id.removeprefix("sae:"))].text
    shown = "".join(element.proto.body for element in open_page().get("html"))
    assert all(f"<mark>{each.piece[1]}</mark>" in shown for each in found)
