"""A build with an SAE that was made elsewhere: refused on another model, read as it was trained on its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from concept_audit import Audit, BuildOptions, ConceptError, ModelOptions, build
from concept_audit.concepts.sae import load_sae
from concept_audit.model.chat import CONTENT
from concept_audit.model.load import load_model
from concept_audit.pipeline.loaded_sae import loaded_sae
from concept_audit.progress import Progress
from concept_audit.store.examples import read_tokens
from concept_audit.store.manifest import read_manifest
from tests.backend.concepts.test_sae_identity import save_sae
from tests.conftest import chat_rows, shards, small_model, small_tokenizer, write_jsonl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory) -> Path:
    """A small GPT-2 whose residual stream has a mean."""
    directory = tmp_path_factory.mktemp("model") / "gpt2-small"
    model = small_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight += 0.5
    model.save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def options(tmp_path, gpt2_directory) -> BuildOptions:
    return BuildOptions(
        data=str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(12))),
        out=tmp_path / "audit",
        model=ModelOptions(str(gpt2_directory), device="cpu"),
        layers=(2,),
        cache=tmp_path / "cache",
    )


def with_sae(options: BuildOptions, place: Path, **changes) -> BuildOptions:
    return dataclasses.replace(options, sae=save_sae(place / "sae", **changes))


def test_an_sae_of_another_model_needs_the_flag_and_the_manifest_keeps_it(options, tmp_path):
    given = with_sae(options, tmp_path, model_name="EleutherAI/pythia-70m")
    with pytest.raises(ConceptError, match="trained on EleutherAI/pythia-70m, .*gpt2-small.* --sae-from-other-model"):
        build(given)
    assert not given.out.exists()
    root = build(dataclasses.replace(given, sae_from_other_model=True))
    manifest = read_manifest(root / "manifest.json")
    assert manifest.configuration["sae_from_other_model"] is True
    assert manifest.report("features")["trained_on"] == "EleutherAI/pythia-70m"


def test_features_of_an_sae_of_centred_weights_are_those_of_the_stream_less_its_mean(options, tmp_path):
    changed = {"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    audit = Audit(build(with_sae(options, tmp_path, **changed)))
    source = audit.concepts._opened.sources().sae_source  # what rankings on demand load
    assert source.centred and source.layer == 2
    plain, lm = load_sae(source.source, CPU), audit.model()
    tokens = shards(audit.root, "tokens")
    con = duckdb.connect(str(audit.root / "audit.duckdb"), read_only=True)
    means = []
    for row in read_tokens(tokens, 0):
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            stream = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            inside = stream[torch.tensor(row.parts == CONTENT)]
            dense = plain.module.encode(inside - inside.mean(-1, keepdim=True)).numpy()
            uncentred = plain.module.encode(inside).numpy()
        means.append(dense.max(0))
        stored = con.execute(
            "SELECT feature_id, max_activation FROM feature_activations WHERE example_id = ?", [row.example_id]
        ).fetchall()
        assert {feature for feature, _ in stored} == set(np.flatnonzero(dense.max(0)))
        np.testing.assert_allclose([v for _, v in stored], dense.max(0)[[f for f, _ in stored]], rtol=1e-3, atol=1e-3)
        assert np.abs(dense.max(0) - uncentred.max(0)).max() > 0.1
    direction = np.array(con.execute("SELECT direction FROM concepts WHERE kind = 'sae_feature'").fetchone()[0])
    assert abs(direction.sum()) < 1e-5 and np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "changed", [{"checkpoint_value": 1000}, {"revision": "step3000"}, {"fold_something_new": True}]
)
def test_weights_changed_in_ways_that_are_not_done_here_are_refused(options, tmp_path, changed):
    given = with_sae(options, tmp_path, model_name="gpt2", model_from_pretrained_kwargs=changed)
    lm = load_model(options.model, options.cache, Progress())
    with pytest.raises(ConceptError, match=f"loaded with {next(iter(changed))}=.* changes the residual stream"):
        loaded_sae(given, lm, Progress())
    assert not loaded_sae(dataclasses.replace(given, sae_from_other_model=True), lm, Progress()).centred


def test_foldings_that_leave_the_stream_as_it_is_are_read_as_they_are(options, tmp_path):
    folded = {"fold_ln": True, "center_unembed": True, "fold_value_biases": True, "center_writing_weights": False}
    given = with_sae(options, tmp_path, model_name="gpt2", model_from_pretrained_kwargs=folded)
    found = loaded_sae(given, load_model(options.model, options.cache, Progress()), Progress())
    assert (found.layer, found.centred) == (2, False)


def test_another_layer_than_the_saes_own_is_refused(options, tmp_path):
    given = dataclasses.replace(with_sae(options, tmp_path), sae_layer=3)
    lm = load_model(options.model, options.cache, Progress())
    with pytest.raises(ConceptError, match="--sae-layer 3: .* was trained on layer 2"):
        loaded_sae(given, lm, Progress())
    assert loaded_sae(dataclasses.replace(given, sae_from_other_model=True), lm, Progress()).layer == 3


def test_the_sae_that_a_build_trained_is_known_as_its_models(built, model_directory, options, tmp_path):
    moved = model_directory.rename(model_directory.with_name("moved"))
    try:
        given = dataclasses.replace(options, sae=str(built / "sae"), model=ModelOptions(str(moved), device="cpu"))
        found = loaded_sae(given, load_model(given.model, options.cache, Progress()), Progress())
    finally:
        moved.rename(model_directory)
    assert found.layer == 2 and found.module.cfg.metadata.model_name == "small-llama"
    other = load_model(options.model, options.cache, Progress())
    with pytest.raises(ConceptError, match="it was trained on small-llama, and the model is .*gpt2-small"):
        loaded_sae(dataclasses.replace(options, sae=str(built / "sae")), other, Progress())
