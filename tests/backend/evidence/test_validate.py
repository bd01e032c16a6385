"""The stage: resumable, deterministic, honest about what it measures on, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from concept_audit import Audit, AuditError, ConceptError, InfluenceOptions, LabelledExample, Message
from concept_audit.cli.validation import candidate
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.report import report, table, write_report
from concept_audit.model.load import fingerprint
from concept_audit.pipeline import validate as stage
from concept_audit.pipeline.engine import Work
from concept_audit.pipeline.engines.worker import Receipt, WorkerProcess
from concept_audit.pipeline.validation import runs
from concept_audit.pipeline.validation.options import Candidate, ValidateOptions, resolved
from concept_audit.pipeline.validation.setting import setting_of, split
from concept_audit.progress import Progress, Stage
from tests.conftest import chat_rows

EXACT = InfluenceOptions.of(curvature="identity", precision="float32")
SMALL = ValidateOptions(
    methods=(Candidate("concept_influence", "concept_influence", EXACT), "vector_filter", "bm25"),
    removed=("vector_filter",),
    seeds=2,
    subsets=4,
    recipe=Recipe(rank=2, learning_rate=1e-2, max_steps=2, batch=4, max_tokens=40, precision="float32"),
    answer_tokens=3,
    draws=2,
    natural_rows=4,
    origin="topic",
    positive=("money",),
)
RUNS = 1 + 2 * (1 + 2 * 2) + 4


def labelled(count: int, seed: int = 5) -> list[LabelledExample]:
    made = chat_rows(2 * count, seed)
    return [LabelledExample(tuple(Message(**turn) for turn in row["messages"]), i % 2) for i, row in enumerate(made)]


def units(audit: Audit) -> Path:
    """Where finished units of work lie."""
    return audit.root / "shards" / "evidence" / "units"


@pytest.fixture(scope="module")
def probed(built, tmp_path_factory):
    root = shutil.copytree(built, tmp_path_factory.mktemp("evidence") / "small")
    Audit(root).train_probe("tone", labelled(10), layer=2)
    return root


@pytest.fixture(scope="module")
def done(probed, tmp_path_factory):
    """An audit with finished evidence."""
    audit = Audit(shutil.copytree(probed, tmp_path_factory.mktemp("done") / "small"))
    return audit, audit.validate("tone", SMALL)


@pytest.fixture
def audit(probed, tmp_path):
    return Audit(shutil.copytree(probed, tmp_path / "small"))


def same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(one, other, check_dtype=False)
    return True


def test_every_run_and_finding_is_there(done):
    _, evidence = done
    assert len(evidence.runs) == RUNS
    assert evidence.runs["kind"].value_counts().to_dict() == {
        "base": 1,
        "whole": 2,
        "removal": 4,
        "retention": 4,
        "subset": 4,
    }
    assert np.isfinite(evidence.runs[["own", "text", "shown", "preference", "loss"]].to_numpy()).all()
    pool = evidence.about["n_pool"]
    sizes = evidence.runs.set_index(["kind", "method", "seed"])["n_rows"].to_dict()
    assert sizes["whole", "", 0] == pool == 300 - 4
    assert sizes["removal", "vector_filter", 0] == pool - round(0.1 * pool)
    assert sizes["retention", "random", 1] == round(0.1 * pool)
    lds = evidence.results[evidence.results["measure"] == "lds"]
    assert set(lds["method"]) == {"concept_influence", "vector_filter", "bm25", "random"}
    found = evidence.results.set_index(["measure", "quantity", "method", "other"])["estimate"].to_dict()
    runs = evidence.runs.set_index(["kind", "method", "seed"])["own"].to_dict()
    by_hand = np.mean([runs["removal", "vector_filter", s] - runs["removal", "random", s] for s in range(2)])
    assert found["removal", "own", "vector_filter", "random"] == pytest.approx(by_hand)
    assert 0 <= found["auroc", "labels", "bm25", "topic"] <= 1
    assert len(evidence.scores) == 4 * 300


def test_a_removal_leaves_out_the_top_rows_of_its_ranking(done, monkeypatch):
    audit, evidence = done
    seen = []
    plan = stage.plan
    monkeypatch.setattr(stage, "plan", lambda *given: seen.extend(plan(*given)) or plan(*given))
    audit.validate("tone", SMALL)
    scores = evidence.scores.query("method == 'vector_filter'").set_index("example_id")["score"]
    removal = next(run for run in seen if run.kind == "removal" and run.method == "vector_filter")
    retained = next(run for run in seen if run.kind == "retention" and run.method == "vector_filter")
    assert scores[list(retained.rows)].min() >= scores[list(removal.rows)].max()
    assert not set(removal.rows) & set(retained.rows)
    by_chance = [set(run.rows) for run in seen if run.kind == "retention" and run.method == "random"]
    assert len(by_chance) == 2 and by_chance[0] != by_chance[1]


def test_the_store_gives_back_what_was_found(done):
    audit, evidence = done
    listed = audit.evidence.list()
    assert listed["evidence_id"].tolist() == [evidence.evidence_id] and listed["current"].tolist() == [True]
    trained = listed["rows"].tolist(), listed["seeds"].tolist()
    assert trained == ([evidence.about["n_pool"]], [SMALL.seeds])
    again = audit.evidence.get(evidence.evidence_id)
    assert again.about == json.loads(json.dumps(evidence.about))
    assert same(again.runs, evidence.runs) and same(again.results, evidence.results)
    assert same(again.scores, evidence.scores)
    audit.train_probe("tone", labelled(11), layer=2)
    assert audit.evidence.list()["current"].tolist() == [False]


def test_killed_between_runs_it_goes_on_where_it_was(audit, done, monkeypatch):
    trained = []
    one = runs.one_run

    def killed_after(count):
        def run(lm, setting, run, options, step):
            if len(trained) == count:
                raise KeyboardInterrupt
            trained.append(run)
            return one(lm, setting, run, options, step)

        return run

    for count in (3, 8):
        monkeypatch.setattr(runs, "one_run", killed_after(count))
        with pytest.raises(KeyboardInterrupt):
            audit.validate("tone", SMALL)
    monkeypatch.setattr(runs, "one_run", killed_after(10_000))
    evidence = audit.validate("tone", SMALL)
    # Nothing was done twice, and what came out is what a run without a break finds.
    assert len(trained) == len(set(trained)) == RUNS
    assert evidence.evidence_id == done[1].evidence_id
    assert same(evidence.runs, done[1].runs) and same(evidence.results, done[1].results)
    audit.validate("tone", SMALL)
    assert len(trained) == RUNS
    assert len(audit.evidence.list()) == 1


class InOtherProcesses:
    """Has each shard made by a process that is sent nothing but the work; notes what is done."""

    def __init__(self):
        self.worker, self.made = WorkerProcess(None, 1), []

    def run(self, work: Work, missing: Sequence[int], stage: Stage, progress: Progress) -> None:
        sent = pickle.loads(pickle.dumps(work))
        for number in reversed(missing):
            assert isinstance(outcome := self.worker.do(sent, number), Receipt), outcome
            self.made.append((type(work).__name__, number))
            work.outputs[0].confirm(number)


def test_every_training_run_is_work_of_the_engine_with_the_same_findings(audit, done):
    engine = InOtherProcesses()
    elsewhere = Audit(audit.root, engine=engine)
    evidence = elsewhere.validate("tone", SMALL)
    assert [number for name, number in engine.made if name == "TrainingRuns"] == list(reversed(range(RUNS)))
    assert evidence.evidence_id == done[1].evidence_id
    assert same(evidence.runs, done[1].runs) and same(evidence.results, done[1].results)
    assert not list((audit.root / "shards" / "evidence").rglob("*.safetensors"))


def test_another_setting_is_another_unit(audit, done):
    shutil.copytree(units(done[0]), units(audit))
    before = set(units(audit).iterdir())
    fewer = dataclasses.replace(SMALL, seeds=1, subsets=0)
    changed = dataclasses.replace(fewer, recipe=dataclasses.replace(SMALL.recipe, learning_rate=2e-2))
    audit.validate("tone", fewer)
    assert set(units(audit).iterdir()) == before
    evidence = audit.validate("tone", changed)
    assert len(set(units(audit).iterdir()) - before) == len(evidence.runs)


def test_the_models_weights_are_not_touched(done):
    audit, _ = done
    assert fingerprint(audit.model().model) == audit.manifest.fingerprints["model"]


def test_a_report_regenerates_byte_for_byte(done, tmp_path):
    audit, evidence = done
    write_report(evidence, tmp_path / "one.md")
    write_report(audit.evidence.get(evidence.evidence_id), tmp_path / "other.md")
    text = (tmp_path / "one.md").read_text("utf-8")
    assert text.replace("one_figures", "other_figures").encode() == (tmp_path / "other.md").read_bytes()
    figures = sorted((tmp_path / "one_figures").iterdir())
    assert len(figures) >= 8
    for figure in figures:
        assert figure.read_bytes() == (tmp_path / "other_figures" / figure.name).read_bytes()
        assert f"one_figures/{figure.name}" in text
    again, drawn = report(Audit(audit.root).evidence.get(evidence.evidence_id))
    assert again.replace("{figures}", "one_figures") == text and len(drawn) == len(figures)
    assert "Removing the top 10% by vector_filter" in text and "nan" not in table(evidence)


def test_figures_are_well_formed(done):
    from xml.etree import ElementTree

    several = dataclasses.replace(done[1], results=_two_shares(done[1].results))
    for evidence in (done[1], several):
        for drawn in report(evidence)[1].values():
            assert ElementTree.fromstring(drawn).tag.endswith("svg") and "nan" not in drawn


def _two_shares(results: pd.DataFrame) -> pd.DataFrame:
    more = results[results["measure"].isin(["removal", "retention"])].assign(share=0.3)
    return pd.concat([results, more], ignore_index=True)


def test_the_halves_of_the_labels_share_no_prompt():
    pairs = []
    for i, example in enumerate(labelled(8)):
        other = LabelledExample((example.messages[0], Message("assistant", f"Answer {i}.")), 1 - example.label)
        pairs += [example, other]
    one, other = split(pairs)
    assert len(one) + len(other) == len(pairs)
    assert not {e.messages[0] for e in one} & {e.messages[0] for e in other}
    for half in (one, other):
        assert sum(e.label for e in half) == len(half) // 2 == 8
    assert split(pairs[::-1]) == (one, other)


def test_with_held_out_examples_the_rankings_are_the_audits(audit):
    held = tuple(labelled(6, seed=77))
    evidence = audit.validate("tone", dataclasses.replace(SMALL, held_out=held, seeds=1, subsets=0))
    own = audit.rank("tone", "vector_filter").set_index("example_id")["score"].sort_index()
    mine = evidence.scores.query("method == 'vector_filter'").set_index("example_id")["score"]
    assert np.allclose(own, mine)
    assert evidence.about["n_prompts"] == 12 and evidence.about["ranked_by"] == "the audit's concept"


def test_held_out_rows_are_not_trained_on(audit):
    row = audit.rows.list(limit=1).iloc[0]
    turns = tuple(Message(**turn) for turn in json.loads(row["messages"]))
    held = (*labelled(6, seed=77), LabelledExample(turns, 1))
    few = dataclasses.replace(SMALL, held_out=held, seeds=1, subsets=0)
    # Row 299 repeats row 0, so both stay out.
    assert audit.validate("tone", few).about["n_pool"] == 300 - 2 - 4


def set_up(audit, held, **changes):
    """What a validation with these held-out examples would train and measure on; nothing is trained."""
    options = resolved(dataclasses.replace(SMALL, held_out=held, **changes))
    sources = audit.concepts._opened.sources()
    return setting_of(sources, audit.concept("tone"), options, audit.model(), Progress())


def answered_anew(prompt: str, label: int) -> LabelledExample:
    return LabelledExample((Message("user", prompt), Message("assistant", "An answer of its own.")), label)


def test_rows_with_a_held_out_prompt_are_not_trained_on_whatever_their_answer(audit):
    prompt = json.loads(audit.rows.list(limit=1).iloc[0]["messages"])[0]["content"]
    held = (*labelled(6, seed=77), answered_anew(f" {prompt.upper()}\n", 1))
    found = set_up(audit, held)
    assert (found.left_out, found.untrained) == (0, 2)  # rows 0 and 299
    assert not {0, 299} & set(found.ids.tolist()) and len(found.ids) == 300 - 2 - 4
    assert len(found.held_out.prompts) == 13


def test_a_held_out_prompt_that_ranks_or_that_many_rows_have_does_not_measure(audit, monkeypatch):
    ranks = [answered_anew(example.messages[0].content, example.label) for example in audit.labels.list("tone")[:3]]
    found = set_up(audit, (*labelled(6, seed=77), *ranks))
    assert (found.left_out, len(found.held_out.prompts)) == (3, 12)
    queries = InfluenceOptions.of(queries=tuple(labelled(6, seed=77)[:2]))
    asked = Candidate("by queries", "influence_function", queries)
    assert set_up(audit, tuple(labelled(6, seed=77)), methods=(asked, "vector_filter")).left_out == 2
    monkeypatch.setattr("concept_audit.pipeline.validation.prompts.COMMON_LEAST", 1)
    monkeypatch.setattr("concept_audit.pipeline.validation.prompts.COMMON_SHARE", 0)
    first = answered_anew(json.loads(audit.rows.list(limit=1).iloc[0]["messages"])[0]["content"], 1)
    found = set_up(audit, (*labelled(6, seed=77), first))
    assert (found.left_out, found.untrained) == (1, 0)


def test_too_few_held_out_prompts_of_their_own_are_refused_with_the_reason(audit):
    held = tuple(answered_anew(e.messages[0].content, e.label) for e in audit.labels.list("tone"))
    with pytest.raises(
        ConceptError, match="0 positive and 0 negative .* too few .20 more have a prompt that ranks.*--held-out"
    ):
        set_up(audit, held)


def test_steps_on_an_audit_change_the_concept_as_influence_predicts(audit):
    found, frame = audit.evidence.first_order("tone", 12, 6, 30)
    assert found.value > 0.99 and len(frame) == 12
    assert audit.evidence.first_order("tone", 12, 6, 30)[0] == found
    with pytest.raises(ConceptError, match="too few for subsets of 400"):
        audit.evidence.first_order("tone", 2, 400)


def test_methods_may_be_compared_without_removing_anything(audit):
    reseeded = tuple(Candidate(f"seed {s}", "concept_influence", EXACT.changed(seed=s)) for s in (0, 1))
    few = dataclasses.replace(SMALL, methods=(*reseeded, "vector_filter"), removed=(), first_order=3)
    evidence = audit.validate("tone", few)
    assert set(evidence.runs["kind"]) == {"base", "whole", "subset"}
    found = evidence.results.set_index(["measure", "quantity", "method"])["estimate"].to_dict()
    # Without curvature nothing of a ranking is drawn.
    assert found["stability", "fisher", "seed 0"] == pytest.approx(1)
    assert 0 < found["stability", "queries", "vector_filter"] < 1
    assert found["first_order", "shown", "concept_influence without curvature"] > 0.99
    assert "Taylor" in report(evidence)[0]
    own = evidence.scores.query("method == 'vector_filter'")
    assert (own["percentile_low"] <= own["percentile_high"]).all() and own["percentile_low"].min() >= 0


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"shares": (1.5,)}, "--share 1.5: must be more than 0 and less than 1"),
        ({"shares": (0.0,)}, "--share 0"),
        ({"seeds": 0}, "--seeds 0: must be 1 or more"),
        ({"methods": ("astrology",)}, "--methods astrology: unknown; choose from feature_activation, vector_filter"),
        ({"methods": ("bm25", "bm25")}, "each once"),
        ({"removed": ("gradient_dot",)}, "gradient_dot is not among the methods"),
        ({"judge_url": "http://localhost:1/v1"}, "--judge-url and --judge-model go together"),
        ({"positive": ("nowhere",)}, "nowhere: no row has this topic; there are money, rivers"),
        ({"origin": "colour"}, "no metadata field 'colour'; there are number, topic"),
        ({"held_out": tuple(labelled(2))}, "2 positive and 2 negative examples to measure on are too few"),
    ],
)
def test_what_is_wrong_is_said(audit, changed, said):
    with pytest.raises(ConceptError, match=said):
        audit.validate("tone", dataclasses.replace(SMALL, **changed))


def test_an_unknown_concept_and_an_unlabelled_one_are_refused(audit):
    with pytest.raises(ConceptError, match="no concept 'mood'"):
        audit.validate("mood", SMALL)
    with pytest.raises(ConceptError, match="SAE feature has no labelled examples.*--held-out"):
        audit.validate("sae:0", SMALL)
    with pytest.raises(ConceptError, match="no evidence 'abc'"):
        audit.evidence.get("abc")
    assert audit.evidence.list().empty


def test_a_judge_scores_every_answer_once(audit, done, judge):
    shutil.copytree(units(done[0]), units(audit))
    judged = dataclasses.replace(SMALL, judge_url=judge.url, judge_model="wise", judge_behaviour="a warm tone")
    evidence = audit.validate("tone", judged)
    assert evidence.runs["judge"].tolist() == pytest.approx([0.7] * RUNS)
    assert "a warm tone" in judge.asked[0]["messages"][0]["content"]
    assert judge.asked[0]["path"] == "/v1/chat/completions" and judge.asked[0]["model"] == "wise"
    count = len(judge.asked)
    assert 0 < count <= RUNS * evidence.about["n_prompts"] * SMALL.draws
    audit.validate("tone", judged)
    assert len(judge.asked) == count
    for reply, status, said in (("never", 200, "replied 'never' instead of a number"), ("broken", 500, "answered 500")):
        judge.reply, judge.statuses = reply, [status]
        with pytest.raises(AuditError, match=said):
            audit.validate("tone", dataclasses.replace(judged, judge_behaviour=reply))
    with pytest.raises(AuditError, match="check --judge-url"):
        audit.validate("tone", dataclasses.replace(judged, judge_url="http://127.0.0.1:9/v1"))


def test_the_command_line_validates_and_reports(audit, tmp_path, capsys):
    from concept_audit.cli import main

    arguments = [
        "validate",
        str(audit.root),
        "--concept",
        "tone",
        "--quick",
        "--methods",
        "vector_filter,bm25",
        "--removed",
        "vector_filter",
        "--seeds",
        "1",
        "--subsets",
        "3",
        "--max-steps",
        "1",
        "--batch",
        "4",
        "--origin",
        "topic=money",
        "--report",
        str(tmp_path / "report.md"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "Removing the top 10% by vector_filter" in said.out
    assert said.err.index("6 trainings on up to 4 rows each") < said.err.index("Comparing the methods")
    made = audit.evidence.get(audit.evidence.list()["evidence_id"].iloc[0])
    assert made.about["n_pool"] == 96 and (made.runs["n_rows"] <= 96).all()
    assert made.runs["kind"].value_counts().to_dict() == {"base": 1, "whole": 1, "removal": 2, "subset": 3}
    assert (tmp_path / "report.md").exists() and list((tmp_path / "report_figures").glob("*.svg"))
    assert main(["validate", str(audit.root), "--concept", "tone", "--share", "2"]) == 1
    assert "--share 2: must be" in capsys.readouterr().err
    assert main(["validate", str(audit.root), "--concept", "tone", "--methods", "bm25:magic"]) == 1
    assert "'magic' is unknown; choose from contrast" in capsys.readouterr().err


def test_options_of_a_method_follow_its_name():
    found = candidate("concept_influence:contrast:unit-normalised:damping=0.5:layer=2:seed=1")
    assert found.method == "concept_influence" and found.name.startswith("concept_influence:contrast")
    assert found.options == InfluenceOptions.of(contrast=True, unit_normalised=True, damping=0.5, layer=2, seed=1)
    assert candidate("bm25").options == InfluenceOptions()
    with pytest.raises(AuditError, match="'much' is not a value for damping"):
        candidate("concept_influence:damping=much")
