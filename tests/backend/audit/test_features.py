"""What is known of SAE features, checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from concept_audit import ConceptError, RowFilter
from concept_audit.store.activations import read_firings
from tests.conftest import shards


def test_a_histogram_counts_every_activation(audit):
    for feature in audit.concepts.features(order="density")["feature_id"][:5]:
        about = audit.concepts.feature(int(feature))
        found = read_firings(shards(audit.root, "features"), int(feature), list(range(300)))
        values = np.concatenate([rows[:, 1] for rows in found.values()])
        assert int(np.sum(about.histogram)) == len(values)
        expected, _ = np.histogram(values, bins=24, range=(0, about.max_activation))
        # Levels are kept to 1.6%, so a value near an edge may fall into the next bin.
        assert np.abs(np.cumsum(about.histogram) - np.cumsum(expected)).max() <= max(3, 0.1 * len(values))


def test_similar_features_are_those_of_the_largest_cosine(audit):
    directions = {f: audit.concept(f"sae:{f}").direction for f in audit.concepts.features()["feature_id"]}
    near = audit.concepts.similar(directions[3], 5, besides=3)
    expected = sorted((-float(v @ directions[3]), f) for f, v in directions.items() if f != 3)[:5]
    assert near["feature_id"].tolist() == [f for _, f in expected]
    assert near["cosine"].tolist() == pytest.approx([-c for c, _ in expected], abs=1e-5)


def test_quantile_groups_part_the_rows_in_which_a_feature_fires(audit):
    feature = int(audit.concepts.features(order="density")["feature_id"].iloc[0])
    rows = audit.concepts.rows_by_quantile(feature, 2)
    every = audit.concepts.strongest_rows(feature, 1000)
    groups = rows.groupby("quantile").first()
    assert groups["group_rows"].sum() == len(every) and len(rows) == 8
    assert (
        groups["low"].is_monotonic_decreasing and (groups["low"].to_numpy()[:-1] >= groups["high"].to_numpy()[1:]).all()
    )
    assert rows[rows["quantile"] == 1]["max_activation"].tolist() == every["max_activation"].tolist()[:2]


def test_log_odds_of_separating_features(audit):
    found = audit.concepts.separating("metadata", "topic", "money", limit=200)
    money = set(audit.rows.list(RowFilter(metadata={"topic": ("money",)}))["example_id"])
    row = found.iloc[0]
    fires = set(
        audit.opened.read(
            lambda c: c.execute(
                "SELECT example_id FROM main.feature_activations WHERE feature_id = ?", [int(row.feature_id)]
            ).df()
        )["example_id"]
    )
    a, b = len(fires & money), len(fires - money)
    c, d = len(money) - a, 300 - len(money) - b
    assert (row.inside, row.outside) == (a, b)
    assert row.log_odds == pytest.approx(math.log((a + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5))))
    half = 1.959964 * math.sqrt(sum(1 / (n + 0.5) for n in (a, b, c, d)))
    assert (row.low, row.high) == pytest.approx((row.log_odds - half, row.log_odds + half))
    sureness = found["log_odds"].abs() - (found["high"] - found["low"]) / 2
    assert sureness.is_monotonic_decreasing
    assert audit.concepts.separating("flagged").empty


def test_features_of_a_text_are_what_the_sae_finds(audit):
    found = audit.concepts.of_text("the river bank takes money")
    assert "".join(found.tokens).replace(" ", "") == "theriverbanktakesmoney"
    assert len(found.token) and found.token.max() < len(found.tokens) and (found.activation > 0).all()
    strongest = found.strongest()
    assert [s[1] for s in strongest] == sorted((s[1] for s in strongest), reverse=True)
    assert sum(len(s[2]) for s in strongest) == len(found.token)
    with pytest.raises(ConceptError, match="empty"):
        audit.concepts.of_text("  ")


def test_labels_of_features_are_kept_and_searched(audit):
    before = audit.concepts.feature(3).label
    audit.concepts.label(3, "about rivers")
    assert audit.concepts.feature(3).label == "about rivers"
    assert 3 in audit.concepts.features("ABOUT RIV")["feature_id"].tolist()
    assert audit.concepts.list().set_index("concept_id").label["sae:3"] == "about rivers"
    audit.concepts.label(3, None)
    assert audit.concepts.feature(3).label == before
    with pytest.raises(ConceptError, match="characters"):
        audit.concepts.label(3, "x" * 500)
    with pytest.raises(ConceptError, match="99999"):
        audit.concepts.feature(99999)


def test_promoted_tokens_are_those_of_the_unembedding(audit):
    import torch

    from concept_audit.model.chat import ChatRenderer

    lm = audit.model()
    text = ChatRenderer(lm.tokenizer, 64).decode_token
    direction = torch.from_numpy(audit.concept("sae:3").direction)
    gained = direction * lm.model.model.norm.weight
    logits = lm.model.lm_head.weight @ gained
    about = audit.concepts.feature(3)
    assert list(about.promoted) == [text(t) for t in logits.topk(10).indices.tolist()]
    assert list(about.suppressed) == [text(t) for t in (-logits).topk(10).indices.tolist()]


def test_words_phrases_lengths_and_sources_filter(audit):
    rows = audit.rows.list()
    both = [
        ("river" in (t := f"{p} {r}".lower()) and "money" in t) for p, r in zip(rows.prompt, rows.response, strict=True)
    ]
    assert audit.rows.count(RowFilter(text="MONEY river")) == sum(both)
    phrase = [any("the river" in t.lower() for t in pair) for pair in zip(rows.prompt, rows.response, strict=True)]
    assert audit.rows.count(RowFilter(text='"the river"')) == sum(phrase)
    assert audit.rows.count(RowFilter(tokens=(1, 30))) == int((rows.n_tokens <= 30).sum())
    assert (
        audit.rows.count(RowFilter(sources=("rows.jsonl",))) == 300
        and audit.rows.count(RowFilter(sources=("other",))) == 0
    )
