"""Which models scores are right on: the table in docs/models.md, row by row, against float64 brute force.

The oracle runs each row alone through the model as it stands, and lets autograd
differentiate its weights.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from concept_audit.errors import ModelError
from concept_audit.influence.queries import DenseQueries, Loss, NegatedConcept, Rows, query_gradient
from concept_audit.influence.scoring import score_rows
from concept_audit.influence.targets import Projection
from concept_audit.influence.vector_filter import vector_filter
from concept_audit.model.activations import response_activations
from concept_audit.model.chat import ChatRenderer
from concept_audit.model.linear import linear_layers, resolve_weights
from concept_audit.model.load import as_language_model
from concept_audit.types import Message
from tests.architectures import DENSE, MIXTURES, adapted, packed, small
from tests.conftest import small_tokenizer

TABLE = Path(__file__).parents[3] / "docs" / "models.md"
DIRECTION = np.random.default_rng(1).normal(size=32).astype(np.float32)
TURNS = (
    (("user", "keeps the old boat"), ("assistant", "the river runs slowly")),
    (("user", "a plan"), ("assistant", "never"), ("user", "sells risk"), ("assistant", "always maybe truly yes")),
    (("system", "city garden"), ("user", "no"), ("assistant", "no")),
)


def listed() -> dict[tuple[str, str], tuple[str, ...]]:
    """(architecture, kind) → mask, vector filter and influence, as the document has them."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", TABLE.read_text("utf-8"), re.M)
    return {(row[0], row[1]): row[2:] for row in rows if row[0] != "architecture"}


QUANTISED = ("Llama", "Qwen3", "Gemma 2", "GPT-NeoX")
CASES = [
    *((name, "dense") for name in DENSE),
    *((name, "adapter") for name in DENSE if name != "Mamba"),
    *((name, kind) for name in QUANTISED for kind in ("quantised", "quantised with an adapter")),
    *((name, kind) for name in MIXTURES for kind in ("mixture", "adapter on attention", "adapter on all")),
]
ATTENTION = {"target_modules": ["q_proj", "v_proj", "kv_b_proj"]}


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """Some models take a softmax in float32, whatever they compute in; rounding would hide what is wrong."""
    plain = torch.nn.functional.softmax

    def softmax(values, dim=None, _stacklevel=3, dtype=None):
        return plain(values, dim, dtype=torch.promote_types(values.dtype, dtype or values.dtype))

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


def made(name: str, kind: str):
    model = small(name)
    if kind.startswith("quantised"):
        packed(model)
    if "adapter" in kind:
        model = adapted(model, **(ATTENTION if kind == "adapter on attention" else {}))
    return as_language_model(name, model, small_tokenizer())


def rendered(lm):
    renderer = ChatRenderer(lm.tokenizer, 200)
    return [renderer.render(tuple(Message(*turn) for turn in turns)) for turns in TURNS]


def alone(lm, ids, mask, layer: int):
    """L(z) and f(z) of one row, by the model's own outputs."""
    output = lm.model(input_ids=torch.tensor(ids)[None].long(), use_cache=False, output_hidden_states=True)
    # Mamba's states begin with the first block's output, all others' with the embeddings.
    layer -= lm.name == "Mamba"
    logits, targets = output.logits[0, :-1].double(), torch.tensor(ids)[1:].long()
    loss = torch.nn.functional.cross_entropy(logits[mask[1:]], targets[mask[1:]])
    return loss, (output.hidden_states[layer][0].double() @ torch.from_numpy(DIRECTION).double())[mask].mean()


def brute_force(lm, layers, rows: Rows, concept: bool) -> np.ndarray:
    """⟨∇L(z), ∇(−f or L of the first row)⟩ of every row."""
    weights = [layer.module.get_parameter("weight") for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        losses, queries = [], []
        for ids, mask in zip(rows.ids, rows.response, strict=True):
            loss, value = alone(lm, ids, torch.from_numpy(mask), 1)
            losses.append(torch.autograd.grad(loss, weights, retain_graph=True))
            queries.append(torch.autograd.grad(-value, weights) if concept else losses[-1])
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return np.array(
        [float(sum((a.double() * b.double()).sum() for a, b in zip(g, queries[0], strict=True))) for g in losses]
    )


def engine(lm, layers, rows: Rows, concept: bool, mode: str = "token_sum") -> np.ndarray:
    quantity = NegatedConcept(Projection(1, DIRECTION)) if concept else Loss()
    gradient = query_gradient(lm, layers, quantity, Rows(rows.ids[:1], rows.response[:1]), [1.0])
    found = np.full(len(rows), np.nan)
    for batch in score_rows(lm, layers, DenseQueries([gradient], lm.dtype), rows, mode, budget=200):
        for row in batch:
            found[row.index] = row.scores[0]
    return found


def equal(found, wanted, relative=1e-6) -> bool:
    return bool(np.abs(found - wanted).max() <= relative * np.abs(wanted).max()) and bool(np.abs(wanted).max() > 0)


def influence(lm, rows: Rows, partial: bool) -> str:
    """``equal``, or the sentence that a score is refused with."""
    try:
        weights = resolve_weights(lm, "auto")
        reached, every = (linear_layers(lm, 1, last, weights, partial) for last in (1, 2))
    except ModelError as error:
        return str(error)
    same = equal(engine(lm, reached, rows, True), brute_force(lm, reached, rows, True))
    same &= equal(engine(lm, every, rows, False), brute_force(lm, every, rows, False))
    return "equal" if same else "differs"


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_the_table_of_models_says_what_is(name, kind):
    said = listed()[name, kind]
    lm = made(name, kind)
    examples = rendered(lm)
    rows = Rows([row.input_ids for row in examples], [row.response for row in examples])
    words = [lm.tokenizer.decode(row.input_ids[row.response]) for row in examples]
    spoken = ["".join(text + "<|im_end|>" for role, text in turns if role == "assistant") for turns in TURNS]
    assert said[0] == ("right" if words == spoken else "wrong")

    found = {}
    for batch in response_activations(lm, rows.ids, rows.response, [1]):
        found |= {row.index: row.mean[1] for row in batch}
    ours = vector_filter([np.stack([found[i] for i in range(len(rows))])], DIRECTION[:, None])[:, 0]
    with torch.no_grad():
        wanted = [float(alone(lm, i, torch.from_numpy(m), 1)[1]) for i, m in zip(rows.ids, rows.response, strict=True)]
    assert said[1] == ("equal" if equal(ours, np.array(wanted), 1e-5) else "differs")

    outcome, sentences = (
        influence(lm, rows, partial=False),
        re.findall(r"^(\d)\. “(.+)”", TABLE.read_text("utf-8"), re.M),
    )
    if said[2] == "equal":
        assert outcome == "equal"
        return
    number = re.fullmatch(r"refused \((\d)\)(; `--partial`: equal)?", said[2])
    assert number, said[2]
    pattern = re.sub("…", ".*", re.escape(dict(sentences)[number[1]]))
    assert re.search(pattern, outcome), outcome
    if number[2]:
        assert influence(lm, rows, partial=True) == "equal"


def test_the_table_lists_every_model_that_is_tested_and_no_other():
    assert sorted(listed()) == sorted(CASES)
