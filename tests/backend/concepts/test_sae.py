"""SAE training: what it reaches, what it feeds on, and going on after a kill."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from concept_audit.concepts import sae_training
from concept_audit.concepts.options import SaeTraining
from concept_audit.concepts.sae import SparseAutoencoder, check_fits, layer_of, load_sae
from concept_audit.concepts.sae_training import HELD_OUT, TokenFeed, train_sae
from concept_audit.errors import ConceptError
from concept_audit.progress import Stage

WIDTH = 16
SETTINGS = SaeTraining(expansion=2, k=3, batch=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Tokens that are sums of three out of 24 directions."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(24, WIDTH))
    codes = np.zeros((3000, 24))
    for row in codes:
        row[rng.choice(24, 3, replace=False)] = rng.uniform(1, 3, 3)
    return (codes @ atoms).astype(np.float32)


def feed_of(tokens: np.ndarray, blocks: int = 6, seed: int = 0) -> TokenFeed:
    return TokenFeed([(len(b), lambda b=b: b) for b in np.array_split(tokens, blocks)], 64, seed)


def train(tokens, tmp_path, steps=200, stage=None, **more):
    stage = stage or Stage("", steps, "steps")
    place = (tmp_path / "checkpoints", tmp_path / "sae")
    return train_sae(feed_of(tokens), steps, WIDTH, 5, SETTINGS, CPU, *place, stage, **more)


def test_training_explains_sparse_data_at_the_sparsity_asked_for(tokens, tmp_path):
    quality = train(tokens, tmp_path, 1200)
    assert quality.explained_variance > 0.8
    assert 1 < quality.l0 < 9
    assert quality.n_tokens == sum(len(b) // HELD_OUT for b in np.array_split(tokens, 6))
    sae = load_sae(str(tmp_path / "sae"), CPU)
    assert (sae.d_model, sae.n_features, sae.layer) == (WIDTH, 2 * WIDTH, 5)
    assert not (tmp_path / "checkpoints").exists()


class Killed(Exception):
    pass


class Fuse(Stage):
    """Ends a training after its fiftieth step."""

    def advance(self, units=1, detail=None):
        super().advance(units, detail)
        if self.done == 50:
            raise Killed


def weights(place) -> dict[str, torch.Tensor]:
    return load_file(place / "sae" / "sae_weights.safetensors")


def test_a_killed_training_goes_on_to_the_same_weights(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(sae_training, "CHECKPOINT_EVERY", 20)
    train(tokens, tmp_path / "whole", 90)
    with pytest.raises(Killed):
        train(tokens, tmp_path / "killed", 90, Fuse("", 90, "steps"))
    again = Stage("", 90, "steps")
    train(tokens, tmp_path / "killed", 90, again)
    assert again.skipped == 40
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("damaged", ["trainer_state.pt", "sae_weights.safetensors"])
def test_a_training_whose_kept_state_is_damaged_begins_anew(tokens, tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(sae_training, "CHECKPOINT_EVERY", 20)
    train(tokens, tmp_path / "whole", 90)
    with pytest.raises(Killed):
        train(tokens, tmp_path / "killed", 90, Fuse("", 90, "steps"))
    [file] = (tmp_path / "killed" / "checkpoints").rglob(damaged)
    file.write_bytes(file.read_bytes()[:100])
    again, said = Stage("", 90, "steps"), []
    train(tokens, tmp_path / "killed", 90, again, say=said.append)
    assert again.skipped == 0 and len(said) == 1 and "begins anew" in said[0]
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_an_epoch_holds_each_training_token_once_but_for_the_remainder(tokens):
    feed = feed_of(tokens)
    epoch = np.concatenate(list(feed._epoch(0)))
    assert len(epoch) == feed.batches_per_epoch * 64
    held_out = {token.tobytes() for block in feed.held_out() for token in block}
    seen = [token.tobytes() for token in epoch]
    assert len(set(seen)) == len(seen)
    assert not held_out & set(seen)


@pytest.mark.parametrize("buffer", [200, 1000, 100_000])
def test_the_order_depends_on_seed_and_step_alone(tokens, monkeypatch, buffer):
    monkeypatch.setattr(sae_training, "BUFFER_TOKENS", buffer)
    start, later = feed_of(tokens).from_step(0), feed_of(tokens).from_step(70)
    from_start = [next(start) for _ in range(75)]
    for batch in from_start[70:]:
        assert (next(later) == batch).all()
    other = feed_of(tokens, seed=1).from_step(0)
    assert not (next(other) == from_start[0]).all()
    assert feed_of(tokens).batches_per_epoch == sum(1 for _ in feed_of(tokens)._epoch(3))


def test_sparse_encoding_equals_the_dense_one_for_any_block_size(tokens, tmp_path, monkeypatch):
    train(tokens, tmp_path, 60)
    sae = load_sae(str(tmp_path / "sae"), CPU)
    dense = sae.module.encode(torch.from_numpy(tokens[:100])).detach().numpy()
    for cells in (1, 500, 1 << 25):
        monkeypatch.setattr("concept_audit.concepts.sae.CELLS_AT_ONCE", cells)
        token, feature, value = sae.encode(tokens[:100])
        found = np.zeros_like(dense)
        found[token, feature] = value
        np.testing.assert_allclose(found, dense, atol=1e-6)
    assert [len(part) for part in sae.encode(tokens[:0])] == [0, 0, 0]


def test_directions_are_unit_decoder_rows(tokens, tmp_path):
    train(tokens, tmp_path, 20)
    sae = load_sae(str(tmp_path / "sae"), CPU)
    directions = sae.directions()
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
    row = sae.module.W_dec[3].detach().numpy()
    np.testing.assert_allclose(directions[3], row / np.linalg.norm(row), rtol=1e-5)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.11.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 12),
        ("model.layers.11", 12),
        ("", None),
        (None, None),
    ],
)
def test_layers_are_read_from_hook_names(hook, layer):
    module = SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(hook_name=hook)))
    assert layer_of(module) == layer


def test_an_sae_of_another_model_is_refused_with_both_widths():
    module = SimpleNamespace(cfg=SimpleNamespace(d_in=64, d_sae=128))
    with pytest.raises(ConceptError, match="width 64, but small has width 32"):
        check_fits(SparseAutoencoder(module, 3, "path"), "small", 32, 4)
    with pytest.raises(ConceptError, match="reads layer 9, but small has 4 blocks"):
        check_fits(SparseAutoencoder(module, 9, "path"), "small", 64, 4)


def test_sources_that_hold_no_sae_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConceptError, match="no such directory; give train, none"):
        load_sae(str(tmp_path / "absent"), CPU)
    with pytest.raises(ConceptError, match="not an SAE that SAELens reads"):
        load_sae(str(tmp_path), CPU)

    def unreachable(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr("sae_lens.SAE.from_pretrained", unreachable)
    with pytest.raises(ConceptError, match="cannot be loaded from the hub .no network."):
        load_sae("release:id", CPU)
