"""An audit of a mixture of experts: what needs no gradients works, influence says what it would leave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from concept_audit import Audit, InfluenceOptions, LabelledExample, Message, ModelError
from concept_audit.influence.options import CurvatureOptions, IndexOptions
from concept_audit.model.options import ModelOptions
from concept_audit.pipeline.build import build
from concept_audit.pipeline.options import BuildOptions
from tests.architectures import small
from tests.conftest import chat_rows, small_tokenizer, write_jsonl

EXACT = InfluenceOptions.of(precision="float32", curvature_tokens=500, engine="exact")
REFUSED = r"leave out 67% of the weights of blocks 1 to 1 \(model.layers.\*.mlp.experts.gate_up_proj.*--partial"


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    small("Qwen3-MoE", torch.float32).save_pretrained(root / "model")
    small_tokenizer().save_pretrained(root / "model")
    data = write_jsonl(root / "rows.jsonl", chat_rows(20))
    model = ModelOptions(str(root / "model"), device="cpu")
    audit = Audit(build(BuildOptions(data=str(data), out=root / "audit", model=model, layers=(1,), sae="none")))
    turns = [tuple(Message(**turn) for turn in row["messages"]) for row in chat_rows(12, seed=5)]
    audit.train_probe("tone", [LabelledExample(messages, i % 2) for i, messages in enumerate(turns)], layer=1)
    return audit


def parameters(audit) -> list[dict]:
    found = audit.query("SELECT parameters FROM scores WHERE method = 'concept_influence' AND rank = 1")
    return [json.loads(text) for text in found["parameters"]]


@pytest.mark.parametrize("method", ["vector_filter", "projection_difference"])
def test_methods_without_gradients_rank_a_mixture(audit, method):
    assert np.isfinite(audit.rank("tone", method)["score"]).all()


def test_influence_by_part_of_a_mixture_is_refused_unless_it_is_asked_for_and_then_says_so(audit):
    with pytest.raises(ModelError, match=REFUSED):
        audit.rank("tone", "concept_influence", options=EXACT)
    assert not audit.rankings.has("tone", "concept_influence", EXACT)
    partial = EXACT.changed(partial=True)
    assert np.isfinite(audit.rank("tone", "concept_influence", options=partial)["score"]).all()
    assert audit.rankings.has("tone", "concept_influence", partial)
    assert not audit.rankings.has("tone", "concept_influence", EXACT)
    assert [made["partial"] for made in parameters(audit)] == [True]


def test_an_index_of_part_of_a_mixture_is_refused_unless_it_is_asked_for_and_then_says_so(audit):
    options = {"row_bytes": 256, "samples": 32, "curvature": CurvatureOptions(curvature_tokens=500)}
    with pytest.raises(ModelError, match=REFUSED):
        audit.build_index(IndexOptions(**options))
    assert audit.build_index(IndexOptions(**options, partial=True))["partial"]
    by_index = InfluenceOptions.of(engine="index")
    assert np.isfinite(audit.rank("tone", "concept_influence", options=by_index)["score"]).all()
    made = [made for made in parameters(audit) if made.get("engine") == "index"]
    assert [each["partial"] for each in made] == [True]
