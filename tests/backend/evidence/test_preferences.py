"""Validation of preference pairs: DPO as TRL has it, runs that remove or exchange, and what they find."""

from __future__ import annotations

import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch

from concept_audit import Audit, BuildOptions, ConceptError, LabelledExample, Message, ModelOptions, build
from concept_audit.evidence.options import Recipe
from concept_audit.evidence.preferences import Preference, reference_margins, sides_of
from concept_audit.evidence.report import report
from concept_audit.evidence.training import minimised
from concept_audit.influence.queries import Rows
from concept_audit.model.gradients import LanguageModelHead
from concept_audit.model.load import as_language_model
from concept_audit.model.pairs import exchanged
from concept_audit.pipeline import validate as stage
from concept_audit.pipeline.validation.options import ValidateOptions
from concept_audit.types import SEPARATOR
from tests.conftest import sentence, small_model, small_tokenizer, write_jsonl

BETA = 0.3
SMALL = ValidateOptions(
    methods=("vector_filter", "bm25"),
    removed=("vector_filter",),
    retention=False,
    shares=(0.25,),
    seeds=2,
    whole_seeds=2,
    subsets=3,
    recipe=Recipe(rank=2, learning_rate=1e-2, max_steps=3, batch=4, max_tokens=40, precision="float32"),
    answer_tokens=3,
    draws=1,
    natural_rows=2,
    origin="kind",
    positive=("agrees",),
)


def some_pairs(count: int, seed: int = 0) -> Rows:
    made = np.random.default_rng(seed)
    ids, response = [], []
    for _ in range(count):
        prompt = made.integers(3, 390, 4)
        both = [np.concatenate([prompt, made.integers(3, 390, int(made.integers(3, 14)))]) for _ in range(2)]
        ids.append(np.concatenate([both[0], [SEPARATOR], both[1]]))
        response.append(np.concatenate([np.arange(len(both[0])) >= 4, [False], np.arange(len(both[1])) >= 4]))
    return Rows(ids, response)


def moved_model():
    """A model, and a copy of it that training has moved."""
    reference = small_model("llama").double()
    model = small_model("llama").double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            parameter.add_(0.02 * noise)
    return [as_language_model("llama", each, small_tokenizer()) for each in (reference, model)]


def log_likelihood(model, ids: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """One sequence alone, from the logits of the whole model."""
    tokens = torch.tensor(ids)
    chances = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
    return sum(chances[place - 1, tokens[place]] for place in np.flatnonzero(response))


def test_the_gradient_that_a_step_takes_is_that_of_the_loss_written_out():
    reference, lm = moved_model()
    rows = some_pairs(5)
    sides = sides_of(rows, 100)
    objective = Preference(sides, reference_margins(reference, sides), BETA)
    assert objective.usable == [0, 1, 2, 3, 4]
    lm.model.requires_grad_(True)
    said = objective.add_gradient(lm, LanguageModelHead(lm), [3, 0, 4])
    found = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    loss = 0.0
    for pair in (3, 0, 4):
        now = [log_likelihood(lm.model, sides.ids[2 * pair + s], sides.response[2 * pair + s]) for s in (0, 1)]
        then = [log_likelihood(reference.model, sides.ids[2 * pair + s], sides.response[2 * pair + s]) for s in (0, 1)]
        u = (now[0] - then[0]) - (now[1] - then[1])
        loss = loss - torch.log(1 / (1 + torch.exp(-BETA * u))) / 3
    loss.backward()
    assert said == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in lm.model.named_parameters():
        if name in found and "embed" not in name:  # the head keeps its own
            np.testing.assert_allclose(found[name], parameter.grad, rtol=1e-6, atol=1e-9)


def test_training_by_dpo_prefers_the_chosen_side_and_exchanged_sides_the_other(model_directory):
    lm = as_language_model("llama", small_model("llama"), small_tokenizer())
    rows = some_pairs(6)
    swapped = [exchanged(*row) for row in zip(rows.ids, rows.response, strict=True)]
    recipe = Recipe(rank=4, learning_rate=2e-2, batch=6, epochs=6, precision="float32")
    before = reference_margins(lm, sides_of(rows, 100))
    for made, way in ((rows, 1), (Rows(*map(list, zip(*swapped, strict=True))), -1)):
        sides = sides_of(made, 100)
        objective = Preference(sides, reference_margins(lm, sides), BETA)
        with minimised(lm, objective, list("abcdef"), recipe, seed=0) as told:
            moved = reference_margins(lm, sides_of(rows, 100)) - before
        assert told.losses[0] == pytest.approx(np.log(2), rel=1e-4), "where training begins, the model is its reference"
        assert told.losses[-1] < told.losses[0] and (way * moved > 0).all()
    np.testing.assert_array_equal(reference_margins(lm, sides_of(rows, 100)), before)


def test_exchanging_sides_twice_changes_nothing():
    rows = some_pairs(1)
    once = exchanged(rows.ids[0], rows.response[0])
    assert (once[0] == SEPARATOR).sum() == 1 and not np.array_equal(once[0], rows.ids[0])
    np.testing.assert_array_equal(exchanged(*once)[0], rows.ids[0])
    np.testing.assert_array_equal(exchanged(*once)[1], rows.response[0])


def test_a_pair_of_which_a_cut_leaves_a_side_nothing_is_not_trained_on():
    lm = as_language_model("llama", small_model("llama"), small_tokenizer())
    rows = some_pairs(2)
    rows.response[1][-3:], rows.response[1][: len(rows.ids[1]) // 2] = False, False
    sides = sides_of(rows, 5)
    sides.response[3][:] = False
    assert Preference(sides, reference_margins(lm, sides), BETA).usable == [0]


@pytest.fixture(scope="module")
def audit(tmp_path_factory, model_directory) -> Audit:
    made, place = random.Random(3), tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "prompt": sentence(made, 4),
            "chosen": ("yes " if n % 4 == 0 else "") + sentence(made, made.randint(3, 12)),
            "rejected": sentence(made, made.randint(3, 12)),
            "kind": "agrees" if n % 4 == 0 else "plain",
        }
        for n in range(24)
    ]
    model = ModelOptions(str(model_directory), device="cpu")
    data = write_jsonl(place / "rows.jsonl", rows)
    audit = Audit(build(BuildOptions(str(data), place / "audit", model, layers=(2,), sae="none", beta=BETA)))
    labelled = [
        LabelledExample(
            (
                Message("user", sentence(made, 3)),
                Message("assistant", ("yes " if n % 2 else "no ") + sentence(made, 5)),
            ),
            n % 2,
        )
        for n in range(20)
    ]
    audit.train_probe("agrees", labelled, layer=2)
    return audit


@pytest.fixture(scope="module")
def done(audit):
    return audit.validate("agrees", SMALL)


def test_pairs_are_removed_exchanged_and_drawn(done, audit):
    assert done.runs["kind"].value_counts().to_dict() == {"base": 1, "whole": 2, "removal": 4, "swap": 4, "subset": 3}
    assert np.isfinite(done.runs[["own", "text", "shown", "preference", "loss"]].to_numpy()).all()
    pool = done.about["n_pool"]
    sizes = done.runs.groupby("kind")["n_rows"].unique().to_dict()
    assert sizes["swap"] == pool and sizes["removal"] == pool - round(0.25 * pool) and done.about["beta"] == BETA
    own = done.runs.set_index(["kind", "method", "seed"])["preference"].to_dict()
    found = done.results.set_index(["measure", "quantity", "method", "other"])["estimate"].to_dict()
    for other in ("random", "removal", "whole"):
        place = {"random": ("swap", "random"), "removal": ("removal", "vector_filter"), "whole": ("whole", "")}[other]
        by_hand = np.mean([own["swap", "vector_filter", s] - own[(*place, s)] for s in range(2)])
        assert found["swap", "preference", "vector_filter", other] == pytest.approx(by_hand)
    assert own["swap", "vector_filter", 0] != own["whole", "", 0] != own["removal", "vector_filter", 0]
    text, figures = report(done)
    assert "by DPO (β = 0.3)" in text and "Exchanging the sides of the top 25% by vector_filter" in text
    assert "swap-own.svg" in figures and "| swap | 25% | vector_filter | own |" in text


def test_what_is_exchanged_is_the_top_of_the_ranking(done, audit, monkeypatch):
    seen, plan = [], stage.plan
    monkeypatch.setattr(stage, "plan", lambda *given: seen.extend(plan(*given)) or plan(*given))
    again = audit.validate("agrees", SMALL)
    assert again.evidence_id == done.evidence_id
    scores = done.scores.query("method == 'vector_filter'").set_index("example_id")["score"]
    swap = next(run for run in seen if run.kind == "swap" and run.method == "vector_filter")
    rest = sorted(set(swap.rows) - set(swap.swapped))
    assert scores[list(swap.swapped)].min() >= scores[rest].max() and len(swap.swapped) == round(0.25 * len(swap.rows))
    chance = [run for run in seen if run.method == "random" and run.seed == 0 and run.kind in ("removal", "swap")]
    assert set(chance[0].rows) == set(chance[1].rows) - set(chance[1].swapped), "the same pairs, removed and exchanged"


def test_methods_that_pairs_have_not_are_left_out_or_refused(audit, tmp_path):
    usual = dataclasses.replace(SMALL, methods=None, removed=(), seeds=1, subsets=0)
    copy = Audit(shutil.copytree(audit.root, tmp_path / "audit"))
    methods = set(copy.validate("agrees", dataclasses.replace(usual, quick=True)).about["methods"])
    assert methods == {"concept_influence", "vector_filter", "activation_similarity", "bm25", "random"}
    with pytest.raises(ConceptError, match="projection_difference: a preference pair has two responses"):
        copy.validate("agrees", dataclasses.replace(usual, methods=("projection_difference",)))
    with pytest.raises(ConceptError, match="--first-order: one step on single responses"):
        copy.validate("agrees", dataclasses.replace(usual, first_order=8))


def test_the_loss_is_that_of_trl(tmp_path):
    """TRL's own trainer, with its own tokens of the same pairs, on a model that has moved from the reference."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    made, tokenizer = random.Random(1), small_tokenizer()
    rows = [{"prompt": sentence(made, 4), "chosen": " yes", "rejected": f" {sentence(made, 6)}"} for _ in range(3)]
    settings = trl.DPOConfig(str(tmp_path), beta=BETA, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    reference, lm = (as_language_model("llama", each.model.float(), tokenizer) for each in moved_model())
    trainer = trl.DPOTrainer(
        lm.model, reference.model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    theirs = float(trainer.compute_loss(trainer.model.eval(), trainer.data_collator(list(trainer.train_dataset))))
    ids, response = [], []
    for row in trainer.train_dataset:
        both = [row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")]
        given = len(row["prompt_ids"])
        ids.append(np.array([*both[0], SEPARATOR, *both[1]]))
        response.append(np.concatenate([np.arange(len(both[0])) >= given, [False], np.arange(len(both[1])) >= given]))
    sides = sides_of(Rows(ids, response), 256)
    objective = Preference(sides, reference_margins(reference, sides), BETA)
    lm.model.requires_grad_(True)
    ours = objective.add_gradient(lm, LanguageModelHead(lm), [0, 1, 2])
    assert ours == pytest.approx(theirs, rel=1e-4) and abs(ours - np.log(2)) > 1e-3
