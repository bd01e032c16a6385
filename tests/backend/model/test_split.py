"""A model that no device holds: some blocks on disk, and the same activations, rankings and answers as in one piece."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from concept_audit import Audit, BuildOptions, ModelError, ModelOptions, build
from concept_audit.model import load, split
from concept_audit.model.load import load_model
from concept_audit.progress import Progress
from tests.conftest import SMALL_SAE


@pytest.fixture
def little_memory(monkeypatch):
    """Accelerate is told to keep the embeddings and the first block in memory, and all else on disk."""
    held = {"model.embed_tokens": "cpu", "model.layers.0": "cpu"}
    on_disk = {f"model.layers.{i}": "disk" for i in (1, 2, 3)} | {"model.norm": "disk", "lm_head": "disk"}

    def placement():
        folder = TemporaryDirectory()
        return {"device_map": held | on_disk | {"model.rotary_emb": "cpu"}, "offload_folder": folder.name}, folder

    monkeypatch.setattr(load, "placement", placement)


def test_a_model_with_blocks_on_disk_is_the_same_model(little_memory, model_directory, tmp_path):
    whole = load_model(ModelOptions(str(model_directory), device="cpu", dtype="float32"), tmp_path, Progress())
    parts = load_model(ModelOptions(str(model_directory), device=split.SPLIT, dtype="float32"), tmp_path, Progress())
    assert not split.is_split(whole.model) and split.is_split(parts.model)
    assert next(parts.blocks[2].parameters()).is_meta
    assert parts.fingerprint == whole.fingerprint
    assert parts.device == whole.device


@pytest.mark.skipif(torch.cuda.is_available(), reason="the audit to compare with is computed on an accelerator here")
def test_an_audit_of_such_a_model_has_the_numbers_of_one_in_memory(
    little_memory, audit_directory, data_file, model_directory, tmp_path
):
    out = build(
        BuildOptions(
            data=str(data_file),
            out=tmp_path / "split",
            model=ModelOptions(str(model_directory), device=split.SPLIT),
            layers=(1, 2, 3),
            sae_training=SMALL_SAE,
        )
    )
    audits = [Audit(audit_directory), Audit(out)]
    assert split.is_split(audits[1].model().model)
    one, other = (audit.query("SELECT * FROM sae_features ORDER BY feature_id") for audit in audits)
    assert len(one) and one.equals(other)
    one, other = (audit.rows.own_answers([0, 1]) for audit in audits)
    assert one == other
    one, other = (audit.rank("sae:0") for audit in audits)
    assert (one["example_id"] == other["example_id"]).all()
    np.testing.assert_allclose(one["score"], other["score"], rtol=1e-6)


def test_what_needs_gradients_is_refused_in_words(little_memory, audit_directory):
    audit = Audit(audit_directory, device=split.SPLIT)
    with pytest.raises(ModelError, match="shared out over several devices.*vector_filter"):
        audit.rank("sae:0", "concept_influence")
