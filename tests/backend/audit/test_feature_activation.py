"""SAE features rank rows by how strongly they fire, unless something else is asked for."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest

from concept_audit import Audit, ConceptError, methods_of, usual_method
from concept_audit.cli.main import main
from tests.backend.test_audit import of_rows


def by_hand(audit: Audit, feature: int) -> np.ndarray:
    """The sum of what fires over the tokens of the response that are not its end, from the shards."""
    scores = np.zeros(audit.overview().n_rows)
    with duckdb.connect() as con:
        fired = con.execute(
            f"""SELECT example_id, sum(activation) FROM '{audit.root}/shards/features/*/*.parquet'
                WHERE feature_id = ? GROUP BY example_id""",
            [feature],
        ).fetchall()
        tokens = dict(
            con.execute(
                f"""SELECT example_id, len(list_filter(parts, lambda p: p = 2))
                    FROM '{audit.root}/shards/tokens/*/*.parquet'"""
            ).fetchall()
        )
    for example_id, total in fired:
        scores[example_id] = total / tokens[example_id]
    return scores


def test_rows_are_ranked_by_mean_activation_and_those_where_it_is_silent_come_last(audit):
    feature = int(audit.concepts.features()["feature_id"].iloc[0])
    expected = by_hand(audit, feature)
    found = audit.rank(f"sae:{feature}")
    assert found["score"].to_numpy() == pytest.approx(expected[found["example_id"]], rel=1e-5)
    assert found["rank"].tolist() == list(range(1, len(expected) + 1))
    assert found["score"].is_monotonic_decreasing
    firing = int((expected > 0).sum())
    assert 0 < firing < len(expected) and (found["score"][:firing] > 0).all() and not found["score"][firing:].any()
    assert found["exact"].all() and not found["is_query"].any()


def test_it_is_what_features_are_ranked_by_and_the_build_has_done_it(audit):
    usual = audit.rankings.find("sae:3", None)
    assert usual.identity.method == "feature_activation" == usual_method("sae_feature") and usual.stored
    assert audit.rankings.has("sae:3", "vector_filter")
    audit.train_probe("topic", of_rows(audit), layer=2)
    assert audit.rankings.find("topic", None).identity.method == "vector_filter" == usual_method("probe")
    with pytest.raises(ConceptError, match="of SAE features alone, and topic is a probe"):
        audit.rank("topic", "feature_activation")
    assert set(methods_of("sae_feature")) - set(methods_of("probe")) == {"feature_activation"}
    assert "feature_activation" not in methods_of("sae_feature", pairs=True)


def test_an_audit_without_these_rankings_makes_them_when_they_are_asked_for(audit_directory):
    without = "DELETE FROM base.{} WHERE ranking_id IN (SELECT ranking_id FROM base.rankings WHERE method = $1)"
    with duckdb.connect(str(audit_directory / "audit.duckdb")) as con:
        for table in ("ranking_scores", "rankings"):
            con.execute(without.format(table), ["feature_activation"])
    audit = Audit(audit_directory)
    assert not audit.rankings.has("sae:3", "feature_activation")
    found = audit.rank("sae:3")
    assert found["score"].to_numpy() == pytest.approx(by_hand(audit, 3)[found["example_id"]], rel=1e-5)
    assert audit.rankings.has("sae:3", "feature_activation")


def test_a_heatmap_adds_up_to_the_score_that_stands_beside_it(audit):
    feature = int(audit.concepts.features()["feature_id"].iloc[0])
    name = f"sae:{feature}"
    fires = audit.rank(name, top=3)
    for row in fires.itertuples():
        (turn,) = audit.rows.heatmaps(name, [row.example_id])[row.example_id].turns
        values = [segment.value for segment in turn if not segment.end_of_turn]
        assert np.mean(values) == pytest.approx(row.score, rel=1e-4)
    points = audit.rank(name, "vector_filter", top=3)
    for row in points.itertuples():
        (turn,) = audit.rows.heatmaps(name, [row.example_id], projected=True)[row.example_id].turns
        assert np.mean([segment.value for segment in turn]) == pytest.approx(row.score, rel=1e-3, abs=1e-4)


def test_the_command_line_and_exports_say_which_method_it_was(audit, tmp_path):
    out = tmp_path / "ranked.csv"
    assert main(["rank", str(audit.root), "--concept", "sae:3", "--out", str(out)]) == 0
    assert float(out.read_text("utf-8").splitlines()[1].split(",")[2]) == audit.rank("sae:3")["score"][0]
    about = audit.exports.write(tmp_path / "view.csv", concept="sae:3")
    assert about["method"] == "feature_activation" and about["parameters"] == {}
