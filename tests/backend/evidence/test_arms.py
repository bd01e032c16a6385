"""Runs that rewrite the top rows, and runs that steer: what they train on, what they are held against, and going on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from concept_audit import Audit, AuditError, BuildOptions, ConceptError, ModelOptions, build
from concept_audit.evidence.report import report, table
from concept_audit.evidence.training import Likelihood
from concept_audit.model.generate import answers
from concept_audit.pipeline import validate as stage
from concept_audit.pipeline.answers import last_response, own_answers
from concept_audit.pipeline.validation import rewriting, runs
from concept_audit.pipeline.validation.options import resolved
from concept_audit.pipeline.validation.setting import setting_of, tokens_of
from concept_audit.pipeline.validation.steering import steering_of
from concept_audit.progress import Progress
from concept_audit.types import PROMPT
from tests.backend.evidence.test_preferences import audit as pairs  # noqa: F401 - a fixture
from tests.backend.evidence.test_validate import SMALL, InOtherProcesses, labelled, same, units
from tests.conftest import write_jsonl

PLAIN = dataclasses.replace(SMALL, methods=("vector_filter", "bm25"), retention=False, subsets=0, draws=1)
FEW = dataclasses.replace(PLAIN, shares=(0.05,), pool_rows=40)
REWRITE = dataclasses.replace(FEW, rewrite=True)
ARMS = dataclasses.replace(REWRITE, steer=True, strengths=(1.0, 3.0))
KINDS = {"base": 1, "whole": 2, "removal": 4, "rewrite": 4, "steer": 8}


@pytest.fixture(scope="module")
def probed(built, tmp_path_factory):
    root = shutil.copytree(built, tmp_path_factory.mktemp("arms") / "small")
    Audit(root).train_probe("tone", labelled(10), layer=2)
    return root


@pytest.fixture(scope="module")
def done(probed, tmp_path_factory):
    audit = Audit(shutil.copytree(probed, tmp_path_factory.mktemp("done") / "small"))
    return audit, audit.validate("tone", ARMS)


@pytest.fixture
def audit(probed, tmp_path):
    return Audit(shutil.copytree(probed, tmp_path / "small"))


def no_answers(*given, **named):
    pytest.fail("the model was asked")


def planned(audit: Audit, options, monkeypatch) -> list[runs.Run]:
    """The runs of a validation; those that are missing are done."""
    seen, plan = [], stage.plan
    monkeypatch.setattr(stage, "plan", lambda *given: seen.extend(plan(*given)) or plan(*given))
    audit.validate("tone", options)
    return seen


def test_every_run_is_there_and_held_against_removal_random_and_the_whole(done):
    audit, evidence = done
    assert evidence.runs["kind"].value_counts().to_dict() == KINDS
    assert audit.evidence.cost(ARMS).runs == sum(KINDS.values()) - 1 and audit.evidence.cost(ARMS).answers == 40
    assert np.isfinite(evidence.runs[["own", "text", "shown", "preference", "loss"]].to_numpy()).all()
    assert set(evidence.runs.query("kind in ('rewrite', 'steer')")["n_rows"]) == {40}
    own = evidence.runs.set_index(["kind", "method", "share", "seed"])["preference"].to_dict()
    found = evidence.results.set_index(["measure", "quantity", "method", "other", "share"])["estimate"].to_dict()
    places = {"random": ("rewrite", "random", 0.05), "removal": ("removal", "vector_filter", 0.05)}
    for other, place in (places | {"whole": ("whole", "", 1.0)}).items():
        by_hand = np.mean([own["rewrite", "vector_filter", 0.05, s] - own[(*place, s)] for s in range(2)])
        assert found["rewrite", "preference", "vector_filter", other, 0.05] == pytest.approx(by_hand)
    for strength in (1.0, 3.0):
        for other, place in {"random": ("steer", "random", strength), "whole": ("whole", "", 1.0)}.items():
            by_hand = np.mean([own["steer", "concept", strength, s] - own[(*place, s)] for s in range(2)])
            assert found["steer", "preference", "concept", other, strength] == pytest.approx(by_hand) != 0
    again = audit.evidence.get(evidence.evidence_id)
    assert again.about == json.loads(json.dumps(evidence.about)) and same(again.results, evidence.results)


def test_the_training_set_is_the_same_but_for_the_responses_of_the_chosen_rows(audit, monkeypatch):
    made: list[Likelihood] = []
    monkeypatch.setattr(runs, "Likelihood", lambda rows: made.append(Likelihood(rows)) or made[-1])
    seen = planned(audit, dataclasses.replace(REWRITE, seeds=1), monkeypatch)
    trained = [run for run in seen if run.rows]
    assert len(made) == len(trained)
    lm, tokens = audit.model(), tokens_of(audit.concepts._opened.sources())
    removed = {run.method: set(run.rows) for run in trained if run.kind == "removal"}
    rewritten = [(run, each.rows) for run, each in zip(trained, made, strict=True) if run.kind == "rewrite"]
    assert len(rewritten) == 2
    for run, rows in rewritten:
        assert set(run.rewritten) == set(run.rows) - removed[run.method], "what is rewritten is what is removed"
        for place, number in enumerate(run.rows):
            ids, response = tokens[number].input_ids, tokens[number].parts != PROMPT
            start = last_response(tokens[number])
            if number in run.rewritten:
                (answer,) = answers(lm, [ids[:start]], 128)
                text = lm.tokenizer.decode(answer[0], skip_special_tokens=True)
                again = lm.tokenizer(text)["input_ids"]
                ends = len(answer[0]) < 128
                ids = np.array([*ids[:start], *again, *[lm.tokenizer.eos_token_id] * ends])
                response = np.arange(len(ids)) >= start
            length = min(len(ids), 40)
            assert rows.ids[place][:length].tolist() == ids[:length].tolist()
            assert rows.response[place][:length].tolist() == response[:length].tolist()
            assert not rows.response[place][len(ids) :].any()


def test_the_other_runs_are_those_of_a_validation_without(audit, done, monkeypatch):
    evidence = audit.validate("tone", FEW)
    assert not {"rewritten_by", "spread"} & set(evidence.about), "an earlier validation keeps its name"
    trained, one = [], runs.one_run
    monkeypatch.setattr(runs, "one_run", lambda *given: trained.append(given[2].kind) or one(*given))
    more = audit.validate("tone", ARMS)
    assert sorted(trained) == ["rewrite"] * 4 + ["steer"] * 8, "removals and the whole had been done"
    assert more.evidence_id == done[1].evidence_id != evidence.evidence_id
    assert same(more.runs, done[1].runs)
    trained.clear()
    monkeypatch.setattr(rewriting, "answers", no_answers)
    audit.validate("tone", ARMS)
    audit.validate("tone", dataclasses.replace(REWRITE, seeds=1, shares=(0.1,)))
    assert trained.count("rewrite") == 2 and trained.count("steer") == 0, "other rows, and no answer is made again"


def test_answers_that_another_method_left_are_taken(audit, monkeypatch):
    own_answers(audit.concepts._opened.sources(), Progress())
    monkeypatch.setattr(rewriting, "answers", no_answers)
    found = audit.validate("tone", dataclasses.replace(REWRITE, seeds=1))
    assert found.about["n_rewritten"] == 4 and found.about["rewritten_by"] == "the audited model"


def test_killed_in_answers_and_in_runs_it_goes_on_where_it_was(audit, done, monkeypatch):
    one, made, asked = runs.one_run, rewriting.answers, []

    def killed(*given):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(given)
        return made(*given)

    monkeypatch.setattr(rewriting, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        audit.validate("tone", ARMS)
    monkeypatch.setattr(rewriting, "answers", lambda *given: asked.append(given) or made(*given))
    trained: list[str] = []

    def stopping(lm, setting, run, options, step):
        if len(trained) == 6:
            raise KeyboardInterrupt
        trained.append(run.kind)
        return one(lm, setting, run, options, step)

    monkeypatch.setattr(runs, "one_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        audit.validate("tone", ARMS)
    assert len(asked) == 2, "the first group of rows was kept, the second is of the 8 others"
    monkeypatch.setattr(runs, "one_run", lambda *given: trained.append(given[2].kind) or one(*given))
    evidence = audit.validate("tone", ARMS)
    assert len(asked) == 2 and pd.Series(trained).value_counts().to_dict() == KINDS
    assert same(evidence.runs, done[1].runs) and evidence.evidence_id == done[1].evidence_id


def test_other_processes_answer_and_train_alike(audit, done):
    engine = InOtherProcesses()
    evidence = Audit(audit.root, engine=engine).validate("tone", ARMS)
    assert [name for name, _ in engine.made].count("OwnAnswers") == 2
    assert [name for name, _ in engine.made].count("TrainingRuns") == sum(KINDS.values())
    assert evidence.evidence_id == done[1].evidence_id and same(evidence.runs, done[1].runs)


def test_the_report_tells_of_rewriting_and_steering(done):
    text, figures = report(done[1])
    assert "## Removing, rewriting and keeping the top rows, and steering" in text
    assert "have responses of the audited model in place of theirs" in text and "(after Chen et al. 2025" in text
    assert "Rewriting the responses of the top 5% by vector_filter instead of removing the rows" in text
    assert "Training on all rows while 3 standard deviations of the concept are added" in text
    assert "| rewrite | 5% | vector_filter | own |" in text and "| steer | 3 σ | concept | own |" in text
    assert {"rewrite-own.svg", "steer-own.svg"} <= set(figures)
    assert "strength of steering (standard deviations)" in figures["steer-own.svg"]
    assert "nan" not in table(done[1]) and "| steer | 300% |" not in text


def test_the_unit_of_steering_is_the_spread_of_the_rows_along_what_ranks_them(done):
    audit, evidence = done
    sources, scores = audit.concepts._opened.sources(), evidence.scores.query("method == 'vector_filter'")
    setting = setting_of(sources, audit.concept("tone"), resolved(ARMS), audit.model(), Progress())
    along = scores.set_index("example_id")["score"].loc[setting.ids]
    assert len(along) == 40 and evidence.about["spread"] == pytest.approx(along.std(ddof=0))
    assert not np.allclose(setting.concept.direction, setting.held_out.direction), "what is added does not measure"
    np.testing.assert_array_equal(steering_of(sources, setting).direction, setting.concept.direction)


def test_an_endpoint_is_asked_once_for_every_prompt(audit, judge):
    judge.reply = lambda body: f"Answer to {body['messages'][-1]['content'][:9]}"
    asking = dataclasses.replace(
        PLAIN, pool_rows=40, seeds=1, shares=(0.1,), rewrite_url=judge.url, rewrite_model="kind"
    )
    with pytest.raises(ConceptError, match="--rewrite-budget 2: . prompts are to be answered"):
        audit.validate("tone", dataclasses.replace(asking, rewrite_budget=2))
    assert not judge.asked
    judge.statuses = [200, 200, 200, 400]
    with pytest.raises(AuditError, match="answered 400 .*check --rewrite-url, --rewrite-model"):
        audit.validate("tone", asking)
    judge.statuses, before = [200], len(judge.asked)
    evidence = audit.validate("tone", asking)
    prompts = [each["messages"][-1]["content"] for each in judge.asked]
    assert before == 4 and len(prompts) == len(set(prompts)) + 1, "the one that failed is asked again, and no other"
    assert evidence.about["n_rewritten"] == len(set(prompts)) <= 8 == audit.evidence.cost(asking).answers
    assert evidence.about["rewritten_by"] == "kind"
    audit.validate("tone", asking)
    assert len(judge.asked) == len(prompts)
    text = next(units(audit).glob("rewritten-*.json")).read_text("utf-8")
    assert "Answer to " in text


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"rewrite_url": "http://localhost:1/v1"}, "--rewrite-url and --rewrite-model go together"),
        ({"rewrite": True, "removed": ()}, "--rewrite: rows that a method would remove"),
        ({"rewrite": True, "rewrite_budget": 0}, "--rewrite-budget 0: must be 1 or more"),
        ({"steer": True, "strengths": (0.0,)}, "--strength 0: must be more than 0"),
        ({"steer": True, "strengths": (float("nan"),)}, "--strength nan"),
        ({"strengths": (1.0,)}, "--strength: is of runs that steer; give --steer too"),
        ({"steer": True, "strengths": (1.0, 1.0)}, "--strength: name at least one, and each once"),
    ],
)
def test_what_makes_no_sense_is_said(audit, changed, said):
    with pytest.raises(ConceptError, match=said):
        audit.validate("tone", dataclasses.replace(FEW, **changed))


def test_pairs_are_neither_rewritten_nor_steered(pairs):  # noqa: F811
    usual = dataclasses.replace(FEW, origin=None, positive=())
    with pytest.raises(ConceptError, match="--rewrite: a preference pair has two responses"):
        pairs.validate("agrees", dataclasses.replace(usual, rewrite=True))
    with pytest.raises(ConceptError, match="--steer: has been thought out for the loss of single responses"):
        pairs.validate("agrees", dataclasses.replace(usual, steer=True))


def test_plain_text_has_no_prompt_and_is_refused_before_anything_is_done(tmp_path, model_directory, rows, monkeypatch):
    texts = [row["messages"][1]["content"] for row in rows[:30]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    model = ModelOptions(str(model_directory), device="cpu")
    audit = Audit(build(BuildOptions(str(data), tmp_path / "audit", model, layers=(2,), sae="none")))
    audit.train_probe("tone", labelled(10), layer=2)
    monkeypatch.setattr(runs, "one_run", no_answers)
    with pytest.raises(ConceptError, match=r"--rewrite: 2\d of the rows to train on have no prompt .*texts.jsonl row"):
        audit.validate("tone", dataclasses.replace(FEW, rewrite=True, origin=None, positive=()))


def test_the_command_line_takes_them(audit, capsys):
    from concept_audit.cli import main

    words = ["validate", str(audit.root), "--concept", "tone", "--quick", "--removed", "vector_filter", "--seeds", "1"]
    words += ["--max-steps", "1", "--batch", "4", "--rows", "20", "--rewrite", "--steer", "--strength", "0.5,4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Rewriting the responses of the top 10% by vector_filter" in said and "while 0.5 standard deviations" in said
    made = audit.evidence.get(audit.evidence.list()["evidence_id"].iloc[0])
    kinds = {"base": 1, "whole": 1, "removal": 2, "rewrite": 2, "steer": 4}
    assert made.runs["kind"].value_counts().to_dict() == kinds and made.about["strengths"] == [0.5, 4.0]
    assert main([*words, "--rewrite-url", "https://elsewhere.example/v1", "--rewrite-model", "kind"]) == 1
    assert "send prompts of the data to https://elsewhere.example/v1? Pass --yes" in capsys.readouterr().err
