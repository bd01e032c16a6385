"""Forecasts of an audit: against exact scores through the store, kept, filtered, and what goes wrong."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest

from concept_audit import Audit, ConceptError, InfluenceOptions, LabelledExample, Message, RowFilter, StoreError
from concept_audit.audit.forecast import COLUMNS, neutral_prompts
from concept_audit.cli import main
from concept_audit.pipeline import forecast as stage
from tests.conftest import chat_rows

OPTIONS = InfluenceOptions.of(precision="float32", curvature_tokens=2_000)
RIVERS = RowFilter(metadata={"topic": ("rivers",)})


def examples(count: int, seed: int) -> list[LabelledExample]:
    made = chat_rows(count, seed=seed)
    return [LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)]


PROMPTS = [example.messages for example in examples(5, seed=9)]


@pytest.fixture(scope="module")
def audit(built, tmp_path_factory):
    """An audit with a probe, and the forecast of all rows."""
    audit = Audit(shutil.copytree(built, tmp_path_factory.mktemp("forecast") / "small"))
    audit.train_probe("tone", examples(12, seed=5), layer=3)
    audit.forecast(prompts=PROMPTS, options=OPTIONS)
    return audit


def row_of(table, concept):
    return table.set_index("concept_id").loc[concept]


def test_a_forecast_is_the_mean_of_the_exact_scores_of_the_store(audit):
    """A probe above the SAE's layer, and the feature that moves most by its activation, with the prompts as queries."""
    table = audit.forecast(prompts=PROMPTS, options=OPTIONS)
    live = audit.concepts.features()
    assert len(table) == len(live) + 1 and list(table)[: len(COLUMNS)] == COLUMNS
    strongest = table[table["kind"] == "sae_feature"].iloc[0]["concept_id"]
    queries = tuple(LabelledExample(tuple(messages), 1) for messages in PROMPTS)
    exact = OPTIONS.changed(queries=queries, target="activation", engine="exact", leave_out_own=False)
    for concept in ("probe:tone", strongest):
        found, wanted = row_of(table, concept), audit.rankings.summary(concept, "concept_influence", exact)
        assert found["forecast"] == pytest.approx(wanted["mean"], rel=1e-3)
        assert found["low"] < found["forecast"] < found["high"] and found["null_low"] < 0 < found["null_high"]
        assert found["n_rows"] == 300


def test_a_forecast_is_kept_and_gone_on_with(audit, monkeypatch):
    assert audit.forecasts.has(prompts=PROMPTS, options=OPTIONS)
    again = Audit(audit.root, read_only=True)
    kept = again.forecast(prompts=PROMPTS, options=OPTIONS)  # a read-only audit runs no model
    assert kept.equals(audit.forecast(prompts=PROMPTS, options=OPTIONS))
    with pytest.raises(StoreError, match="read-only"):
        again.forecast(prompts=PROMPTS[:2], options=OPTIONS)
    done: list[int] = []
    run = stage.Forecasting.run

    def stopping(self, opened, number):
        if len(done) == 3:
            raise KeyboardInterrupt
        run(self, opened, number)
        done.append(number)

    monkeypatch.setattr(stage.Forecasting, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        audit.forecasts.ensure(RIVERS, PROMPTS, OPTIONS)
    first, done[:] = list(done), [-1] * 4
    audit.forecasts.ensure(RIVERS, PROMPTS, OPTIONS)
    assert not set(first) & set(done[4:]) and len(first) + len(done[4:]) == stage.GROUPS


def test_parts_add_up_and_differ(audit):
    """The parts' means, weighed by their rows, are the whole's; the rest needs no pass of its own."""
    whole, part = (audit.forecast(where, PROMPTS, OPTIONS) for where in (RowFilter(), RIVERS))
    rest = audit.forecasts.without(RIVERS, PROMPTS, OPTIONS)
    n, m = part["n_rows"].iloc[0], rest["n_rows"].iloc[0]
    assert n == audit.forecasts.count(RIVERS) and n + m == 300
    parts = {name: table.set_index("concept_id")["forecast"] for name, table in (("a", part), ("b", rest))}
    sums = (n * parts["a"] + m * parts["b"]) / 300
    whole = whole.set_index("concept_id")["forecast"]
    assert np.allclose(sums.loc[whole.index], whole, rtol=1e-4, atol=1e-6 * whole.abs().max())
    difference = audit.forecasts.difference(RIVERS, None, PROMPTS, OPTIONS).set_index("concept_id")["forecast"]
    assert np.allclose(difference, (parts["a"] - parts["b"]).loc[difference.index], rtol=1e-4, atol=1e-9)
    money = audit.forecast(RowFilter(metadata={"topic": ("money",)}), PROMPTS, OPTIONS).set_index("concept_id")
    assert np.allclose(
        money["forecast"].loc[whole.index], parts["b"].loc[whole.index], rtol=1e-3, atol=1e-6 * whole.abs().max()
    )


def test_the_what_if_of_stored_rankings_is_the_mean_of_the_rows_that_stay(audit):
    options = OPTIONS.changed(curvature="identity")
    rows = audit.rank("tone", "concept_influence", options=options).set_index("example_id")
    scores = rows["score"]
    audit.flags.set(rows["content_hash"].loc[[3, 5, 7]].tolist(), "remove")
    found = audit.forecasts.removal_effects()
    row = found[np.isclose(found["before"], scores.mean(), rtol=1e-6)].iloc[0]
    assert row["concept_id"] == "probe:tone" and row["n_left_out"] == 3
    assert row["after"] == pytest.approx(scores.drop([3, 5, 7]).mean())


def test_what_cannot_be_forecast_says_why(audit):
    with pytest.raises(ConceptError, match="no row passes"):
        audit.forecast(RowFilter(text="nosuchword"), PROMPTS, OPTIONS)
    with pytest.raises(ConceptError, match="no prompts"):
        audit.forecast(prompts=[], options=OPTIONS)
    with pytest.raises(ConceptError, match="prompt 1 has no assistant turn"):
        audit.forecast(prompts=[[Message("user", "Hello")]], options=OPTIONS)
    with pytest.raises(ConceptError, match="whatever their scores"):
        audit.forecast(RowFilter(percentile=90.0))
    few = audit.forecast(RowFilter(example_ids=(4, 8)), PROMPTS, OPTIONS)
    assert np.isfinite(few["forecast"]).all() and few["low"].isna().all()


def test_sixty_four_neutral_prompts_come_with_the_package():
    prompts = neutral_prompts()
    assert len({messages[0].content for messages in prompts}) == 64
    assert all([m.role for m in messages] == ["user", "assistant"] for messages in prompts)


def test_the_command_writes_the_columns_of_the_contract(audit, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": [vars(m) for m in messages]}) + "\n" for messages in PROMPTS), "utf-8"
    )
    asked = ["--precision", "float32", "--curvature-tokens", "2000", "--prompts", str(file)]
    assert main(["forecast", str(audit.root), *asked, "--format", "csv", "--filter", "topic=rivers"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == COLUMNS
    wanted = audit.forecast(RIVERS, PROMPTS, OPTIONS)
    assert [row["concept_id"] for row in rows] == wanted["concept_id"].tolist()
    assert np.allclose([float(row["forecast"]) for row in rows], wanted["forecast"])
    assert main(["forecast", str(audit.root), *asked, "--where", "nofield=x"]) == 1
    assert "no such metadata field" in capsys.readouterr().err
