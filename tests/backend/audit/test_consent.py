"""Code that comes with a model runs by consent of whoever opens an audit, not of whoever made it."""

from __future__ import annotations

import json
import shutil

import pytest

from concept_audit import Audit, ModelError


@pytest.fixture
def audit_of_a_stranger(audit_directory, model_directory, tmp_path):
    """An audit whose manifest trusts a model that brings code of its own; the code says that it ran."""
    model = shutil.copytree(model_directory, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.Theirs"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaForCausalLM\n"
        # A class of its own: Transformers marks the class as a stranger's for the rest of the process.
        "class Theirs(LlamaForCausalLM): pass\n"
    )
    manifest = json.loads((audit_directory / "manifest.json").read_text())
    manifest["configuration"] |= {"model": str(model), "trust_remote_code": True}
    (audit_directory / "manifest.json").write_text(json.dumps(manifest))
    return audit_directory


def test_an_audit_does_not_consent_for_those_who_open_it(audit_of_a_stranger, tmp_path):
    with pytest.raises(ModelError, match="code that comes with the model.*--trust-remote-code"):
        Audit(audit_of_a_stranger).opened.model()
    assert not (tmp_path / "ran").exists()


def test_whoever_consents_runs_it(audit_of_a_stranger, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    Audit(audit_of_a_stranger, trust_remote_code=True).opened.model()
    assert (tmp_path / "ran").exists()
