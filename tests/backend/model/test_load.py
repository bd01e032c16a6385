"""Loading models: any architecture, adapters, and errors that say what to do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from concept_audit.errors import ModelError
from concept_audit.model.activations import response_activations
from concept_audit.model.load import as_language_model, default_layers, find_blocks, fingerprint, is_here, load_model
from concept_audit.model.options import ModelOptions
from concept_audit.progress import Progress
from tests.conftest import small_model, small_tokenizer

IDS = [np.arange(5, 25, dtype=np.int32)]


def load(name, tmp_path, **options):
    return load_model(ModelOptions(str(name), **options), tmp_path, Progress())


def mean_activation(lm, layer=3):
    (batch,) = response_activations(lm, IDS, [np.ones(20, bool)], [layer])
    return batch[0].mean[layer]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox"])
def test_blocks_are_found_without_knowing_the_architecture(architecture):
    model = small_model(architecture)
    blocks = find_blocks(model)
    assert len(blocks) == 4
    assert all(any(True for _ in block.parameters()) for block in blocks)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_on_disk_runs_as_the_one_in_memory(architecture, tmp_path):
    model = small_model(architecture)
    model.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    lm = load(tmp_path / "model", tmp_path, device="cpu")
    assert (lm.n_layers, lm.d_model, lm.context) == (4, 32, 256)
    held = as_language_model("held", model, small_tokenizer())
    np.testing.assert_allclose(mean_activation(lm), mean_activation(held), rtol=1e-5)
    assert lm.fingerprint == held.fingerprint


def test_layers_out_of_range_are_refused_with_the_range(model_directory, tmp_path):
    lm = load(model_directory, tmp_path)
    with pytest.raises(ModelError, match="--layers 0,9: .* has 4 blocks.* from 1 to 4"):
        lm.check_layers((0, 2, 9))


def test_default_layers_lie_before_and_about_the_middle():
    assert default_layers(30) == (8, 12, 16)
    assert default_layers(2) == (1,)


def test_the_fingerprint_follows_the_weights():
    first, second = small_model("llama"), small_model("llama")
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        next(second.model.layers[2].parameters()).add_(0.1)
    assert fingerprint(first) != fingerprint(second)


def test_an_adapter_is_put_on_its_base(model_directory, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = small_model("llama")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(model_directory)
    adapted.save_pretrained(tmp_path / "adapter")
    lm = load(tmp_path / "adapter", tmp_path, device="cpu")
    reference = as_language_model("held", adapted.eval(), small_tokenizer())
    np.testing.assert_allclose(mean_activation(lm), mean_activation(reference), rtol=1e-5)
    bare = load(model_directory, tmp_path, device="cpu")
    assert not np.allclose(mean_activation(lm), mean_activation(bare))
    assert lm.fingerprint != bare.fingerprint


def test_an_adapter_without_base_is_refused(model_directory, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="names no base model"):
        load(tmp_path / "adapter", tmp_path)


def test_what_loads_without_a_download_is_told_apart(model_directory, tmp_path, monkeypatch):
    assert is_here(str(model_directory), tmp_path)
    for name in ("smollm2-135m-instruct", "nobody/nothing", "no name at all", str(tmp_path / "absent")):
        assert not is_here(name, tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cached/{file}")
    assert is_here("nobody/nothing", tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, here in ((str(model_directory), True), ("smollm2-135m-instruct", False)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert is_here(str(adapter), tmp_path) is here
    (tmp_path / "models/smollm2-135m-instruct").mkdir(parents=True)
    (tmp_path / "models/smollm2-135m-instruct/config.json").touch()
    assert is_here("smollm2-135m-instruct", tmp_path)


def test_a_path_that_is_not_there_is_never_sought_on_the_hub(tmp_path):
    with pytest.raises(ModelError, match="does not exist; give the directory"):
        load(tmp_path / "absent", tmp_path)


def test_a_file_is_refused_as_a_model(tmp_path):
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "file.bin", tmp_path)


def test_a_directory_without_weights_is_refused(model_directory, tmp_path):
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load it"):
        load(broken, tmp_path)


def test_unknown_device_and_dtype_are_refused(model_directory, tmp_path):
    with pytest.raises(ModelError, match="--device warp"):
        load(model_directory, tmp_path, device="warp")
    with pytest.raises(ModelError, match="--dtype int3.*choose from"):
        load(model_directory, tmp_path, dtype="int3")


def test_code_that_comes_with_a_model_does_not_run_unasked(model_directory, tmp_path):
    foreign = shutil.copytree(model_directory, tmp_path / "foreign")
    (foreign / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((foreign / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
    }
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load(foreign, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="character offsets"):
        as_language_model("slow", small_model("llama"), Slow())
