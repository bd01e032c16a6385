"""The forecast against real steps: what Taylor's theorem asks for, the stage end to end, and its command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_audit import (
    Audit,
    ConceptError,
    ForecastTrial,
    InfluenceOptions,
    LabelledExample,
    Message,
    Recipe,
    RowFilter,
)
from concept_audit.cli import main
from concept_audit.evidence.forecast_agreement import agreement, between_seeds, views
from concept_audit.evidence.forecast_report import forecast_markdown, forecast_table, forecast_text, forecast_verdict
from concept_audit.evidence.forecast_runs import Prompted, read, real_change
from concept_audit.influence.forecast import changes, gradient_sum
from concept_audit.influence.queries import precondition
from concept_audit.metrics import spearman
from concept_audit.model.linear import linear_layers
from concept_audit.model.trainable import weights_of
from concept_audit.pipeline.validation import forecast as stage
from tests.backend.influence.test_forecast import DAMPING, DEEPEST, LAYER, Sae, curvatures, model, rows
from tests.conftest import chat_rows

OPTIONS = InfluenceOptions.of(precision="float32", curvature="identity")
SMALL = ForecastTrial(
    seeds=2,
    recipe=Recipe(rank=2, learning_rate=1e-3, max_steps=2, batch=12, max_tokens=2048, precision="float32"),
    pool_rows=24,
)
PROMPTS = [tuple(Message(**turn) for turn in row["messages"]) for row in chat_rows(5, seed=9)]


@pytest.fixture(scope="module")
def probed(built, tmp_path_factory):
    audit = Audit(shutil.copytree(built, tmp_path_factory.mktemp("forecast_runs") / "small"))
    made = chat_rows(12, seed=5)
    labelled = [
        LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)
    ]
    audit.train_probe("tone", labelled, layer=3)
    return audit


@pytest.fixture(scope="module")
def done(probed):
    """An audit whose forecast was held against runs of both kinds."""
    return probed, probed.validate_forecast(SMALL, PROMPTS, OPTIONS)


def forecast_of_the_same_rows(audit: Audit):
    """Every feature's and the probe's, by concept."""
    with_loss = [row.example_id for row in stage.tokens_of(audit.opened.sources()) if stage.has_loss(row)]
    drawn = stage.shuffled([f"pool:{i}" for i in with_loss], 0)[: SMALL.pool_rows]
    where = RowFilter(example_ids=tuple(with_loss[place] for place in drawn))
    assert audit.forecasts.has(where, PROMPTS, OPTIONS)  # so that it is the one that was tried
    return audit.forecast(where, PROMPTS, OPTIONS).set_index("concept_id")["forecast"]


def by_number(forecast) -> np.ndarray:
    """Of the features alone, in the order of their numbers."""
    numbers = sorted(int(name[4:]) for name in forecast.index if name.startswith("sae:"))
    return np.array([forecast[f"sae:{number}"] for number in numbers])


def units(audit: Audit) -> list[dict]:
    files = sorted((audit.root / "shards" / "evidence" / "units").glob("*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def predicted(lm, layers, step, prompts, sae):
    """Streams and features that change to first order, means over the prompts."""
    found = [e for batch in changes(lm, layers, step, prompts, (LAYER, DEEPEST), sae.encode, LAYER, 64) for e in batch]
    streams = {layer: np.mean([e.streams[layer] for e in found], 0) for layer in (LAYER, DEEPEST)}
    return streams, np.mean([e.features for e in found], 0)


@pytest.mark.parametrize("curved", [True, False])
def test_a_small_real_step_changes_every_feature_as_the_forecast_says(curved):
    """Full-batch descent, preconditioned or plain, by a thousandth of the way, in float64."""
    lm, data, prompts, sae = model(double=True), rows(), rows((14, 11, 21), seed=4), Sae(torch.float64)
    layers = linear_layers(lm, 1, DEEPEST)
    total, _ = gradient_sum(lm, layers, data, [1.0] * len(data), range(len(data)), budget=64)
    if curved:
        total = precondition(total, curvatures(lm, layers, data).__getitem__, DAMPING)
    scale = 1e-4 / max(float(matrix.abs().max()) for matrix in total)
    step = [-scale * matrix for matrix in total]
    prompted = Prompted(prompts, (LAYER, DEEPEST), sae.encode, LAYER)
    streams, features = predicted(lm, layers, step, prompts, sae)
    before = read(lm, prompted)
    with weights_of(layers) as weights, torch.no_grad():
        for weight, change in zip(weights, step, strict=True):
            weight += change
        real = read(lm, prompted).less(before)
    moved = features != 0
    assert moved.sum() > 10 and float(spearman(features[moved], real.features[moved])) > 0.999
    for layer, stream in streams.items():
        assert np.allclose(real.streams[layer], stream, rtol=0, atol=2e-2 * np.abs(stream).max())
    assert np.array_equal(read(lm, prompted).features, before.features)


def test_the_step_beside_a_run_is_plain_descent_and_as_long_as_the_run():
    """With all weights and little training it is the forecast without curvature; the model is left as it was."""
    lm, data, prompts, sae = model(double=True), rows(), rows((14, 11, 21), seed=4), Sae(torch.float64)
    prompted = Prompted(prompts, (LAYER, DEEPEST), sae.encode, LAYER)
    before = read(lm, prompted)
    recipe = Recipe(weights="all", learning_rate=1e-6, max_steps=1, batch=6)
    found = real_change(lm, data, list("abcdef"), recipe, 0, prompted)
    layers = linear_layers(lm, 1, lm.n_layers)
    # Adam's first step moves every weight by the learning rate, whatever its gradient is.
    n_weights = sum(layer.d_in * layer.d_out for layer in layers)
    assert found.length == pytest.approx(1e-6 * n_weights**0.5, rel=0.05)
    total, _ = gradient_sum(lm, layers, data, [1.0] * len(data), range(len(data)), budget=64)
    norm = float(sum(matrix.square().sum() for matrix in total)) ** 0.5
    wanted_streams, wanted = predicted(lm, layers, [-found.length / norm * m for m in total], prompts, sae)
    moved = wanted != 0
    assert float(spearman(wanted[moved], found.stepped.features[moved])) > 0.999
    largest = np.abs(wanted_streams[DEEPEST]).max()
    assert np.allclose(found.stepped.streams[DEEPEST], wanted_streams[DEEPEST], rtol=0, atol=0.02 * largest)
    assert found.training.steps == 1 and np.array_equal(read(lm, prompted).features, before.features)


def test_agreement_is_what_it_says():
    actual = np.array([5.0, 4, 3, 2, 1, -1, -2, -3, 0, np.nan])
    forecast = np.array([9.0, 1, 8, 7, 0, -2, 3, -4, 2, 1])
    found = agreement(forecast, actual, top=2)
    assert found["top_up"].value == 0.5 and found["top_down"].value == 0.5 and found["top_up"].n == 2
    assert found["sign"].value == pytest.approx(6 / 7) and found["sign"].n == 7
    assert found["spearman"].value == pytest.approx(float(spearman(forecast[:9], actual[:9])))
    assert found["spearman"].low <= found["spearman"].value <= found["spearman"].high
    perfect = between_seeds([actual[:9], 2 * actual[:9], 3 * actual[:9]], top=2)
    assert all(estimate.value == pytest.approx(1) and estimate.n == 3 for estimate in perfect.values())
    factor = views(np.array([2.0, 0.0]), np.array([True, False]))
    assert factor["relative"][0] == 0.5 and np.isnan(factor["relative"][1]) and np.isnan(factor["firing"][1])


def test_every_finding_is_there_and_kept(done):
    audit, evidence = done
    n_live = len(audit.concepts.features())
    results = evidence.results.set_index(["measure", "quantity", "method", "other"])["estimate"].to_dict()
    for kind in ("lora", "all"):
        for method in ("forecast", "mean_activation", "gradient_step", "another_seed"):
            for view in ("live", "firing", "relative"):
                assert -1 <= results["spearman", view, method, kind] <= 1
        trained = [np.array(unit["trained"]["features"]) for unit in units(audit) if unit["kind"] == kind]
        assert len(trained) == 2 and not np.array_equal(*trained)
        forecast = forecast_of_the_same_rows(audit)
        by_hand = float(spearman(by_number(forecast), np.mean(trained, 0)))
        assert results["spearman", "live", "forecast", kind] == pytest.approx(by_hand)
        assert results["change", "probe:tone", "forecast", kind] == pytest.approx(forecast["probe:tone"], rel=1e-4)
    assert evidence.about["n_live"] == n_live and "no answers" in evidence.about["lacking"]["data_minus_own_answers"]
    assert audit.evidence.of_forecasts()["evidence_id"].tolist() == [evidence.evidence_id]
    assert audit.evidence.list().empty  # which is of single concepts
    again = audit.evidence.get(evidence.evidence_id)
    assert forecast_text(again) == forecast_text(evidence)
    assert not list((audit.root / "shards" / "evidence" / "shared").glob("*"))


def test_the_plain_step_of_an_audit_agrees_with_its_forecast_without_curvature(done):
    """Through the store and the workers: a step of all weights on the same rows."""
    audit, _ = done
    wanted = by_number(forecast_of_the_same_rows(audit))
    stepped = next(unit["stepped"]["features"] for unit in units(audit) if unit["kind"] == "all")
    moved = wanted != 0
    assert float(spearman(wanted[moved], np.array(stepped)[moved])) > 0.95


def test_runs_that_are_done_are_not_done_again_and_a_killed_validation_goes_on(done, monkeypatch):
    audit, evidence = done
    run, made = stage.ForecastRuns.run, []
    monkeypatch.setattr(
        stage.ForecastRuns, "run", lambda self, opened, n: made.append(self.runs[n]) or run(self, opened, n)
    )
    again = audit.validate_forecast(SMALL, PROMPTS, OPTIONS)
    assert not made and again.evidence_id == evidence.evidence_id
    more = replace(SMALL, weights=("lora",), seeds=3)
    audit.validate_forecast(more, PROMPTS, OPTIONS)
    assert [(one.kind, one.seed) for one in made] == [("lora", 2)]


def test_own_answers_are_a_baseline_where_the_audit_has_them(done, monkeypatch):
    audit, _ = done
    means = audit.opened.sources().shards("activations")
    kept = type(audit.opened.sources()).shards
    # What the model would answer, shifted from what the rows say: the difference is known.
    monkeypatch.setattr(
        type(audit.opened.sources()),
        "shards",
        lambda self, kind: means if kind == "answer_activations" else kept(self, kind),
    )
    real = stage.means_of
    shift = np.random.default_rng(0).normal(size=32).astype(np.float32)
    monkeypatch.setattr(
        stage, "means_of", lambda s, layer, ids, seen=[]: real(s, layer, ids) - (shift if seen or seen.append(1) else 0)
    )
    features = np.array(sorted(int(f) for f in audit.concepts.features()["feature_id"]))
    found, lacking = stage._baselines(audit.opened.sources(), np.arange(20), features)
    direction = audit.concept(f"sae:{features[3]}").direction
    assert not lacking and found["data_minus_own_answers"][3] == pytest.approx(float(direction @ shift), rel=1e-4)
    fires = audit.opened.read(
        lambda c: c.execute(
            "SELECT sum(mean_activation) / 20 FROM main.feature_activations WHERE feature_id = ? AND example_id < 20",
            [int(features[3])],
        ).fetchone()
    )
    assert found["mean_activation"][3] == pytest.approx(fires[0] or 0.0)


def test_the_command_trains_tells_and_writes_a_report(probed, tmp_path, capsys):
    audit = Audit(shutil.copytree(probed.root, tmp_path / "small"))
    file, report = tmp_path / "prompts.jsonl", tmp_path / "report.md"
    file.write_text("".join(json.dumps({"messages": [vars(m) for m in turns]}) + "\n" for turns in PROMPTS), "utf-8")
    asked = ["validate", str(audit.root), "--forecast", "--prompts", str(file), "--rows", "16", "--seeds", "1"]
    asked += ["--train", "lora", "--max-steps", "1", "--lora-rank", "2"]
    assert main([*asked, "--report", str(report)]) == 0
    said = capsys.readouterr().out
    assert "LoRA (1 run on 16 rows): Spearman over" in said and "probe:tone" in said
    assert "# The forecast of `small` against training" in report.read_text("utf-8")
    kept = audit.evidence.get(Audit(audit.root).evidence.of_forecasts()["evidence_id"].iloc[0])
    assert kept.about["n_rows"] == 16 and set(kept.about["recipes"]) == {"lora"}
    assert (
        forecast_verdict(kept)
        and len(forecast_table(kept)) == 3 * 3
        and "Not told: data less own answers" in forecast_markdown(kept)
    )
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evidence_id"] == kept.evidence_id


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--forecast", "--concept", "tone"], "leave out --concept"),
        (["--forecast", "--methods", "bm25", "--subsets", "3"], "leave out --methods, --subsets"),
        (["--forecast", "--seeds", "0"], "--seeds 0: must be 1 or more"),
        (["--forecast", "--rows", "1"], "--rows 1: must be 2 or more"),
        ([], "which concept"),
        (["--concept", "tone", "--prompts", "x.jsonl"], "only --forecast"),
    ],
)
def test_what_makes_no_sense_is_refused(probed, capsys, asked, told):
    assert main(["validate", str(probed.root), *asked]) == 1
    assert told in capsys.readouterr().err


def test_no_kind_of_run_is_refused(probed):
    with pytest.raises(ConceptError, match="at least one kind"):
        probed.validate_forecast(ForecastTrial(weights=()), PROMPTS, OPTIONS)
