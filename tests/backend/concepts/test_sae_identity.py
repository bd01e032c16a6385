"""An SAE is read where, on whose model and as it was trained, or refused with the reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from concept_audit.concepts.sae import SaeSource, load_sae
from concept_audit.concepts.sae_identity import check_model, layer_of, words_of
from concept_audit.errors import ConceptError
from concept_audit.influence.targets import FeatureActivation
from concept_audit.model.activations import response_activations
from concept_audit.model.identity import centres_writes, known_names
from concept_audit.model.load import as_language_model
from tests.conftest import small_model, small_tokenizer

CPU = torch.device("cpu")
WIDTH = 32


def save_sae(place, architecture="standard", **changes):
    """A random SAE in SAELens' format; what is no part of its configuration goes into its metadata."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    kinds = {
        "standard": (StandardSAE, StandardSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
        "topk": (TopKSAE, TopKSAEConfig),
    }
    kind, configuration = kinds[architecture]
    settings = {
        name: changes.pop(name) for name in ("normalize_activations", "apply_b_dec_to_input") if name in changes
    }
    if architecture == "topk":
        settings["k"] = 5
    metadata = {"hook_name": "blocks.1.hook_resid_post", **changes}
    torch.manual_seed(0)
    sae = kind(configuration(d_in=WIDTH, d_sae=48, metadata=SAEMetadata(**metadata), **settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if architecture == "jumprelu":
            sae.threshold.abs_()
    sae.save_model(place)
    return str(place)


def hooked(tmp_path, hook):
    return load_sae(save_sae(tmp_path / "sae", hook_name=hook), CPU)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.5.hook_resid_post", 6),
        ("blocks.5.hook_resid_pre", 5),
        ("model.layers.5", 6),
        ("model.language_model.layers.5", 6),
        ("transformer.h.5", 6),
        ("gpt_neox.layers.5", 6),
        ("somewhere", None),
    ],
)
def test_the_layer_counts_the_blocks_that_have_run(tmp_path, hook, layer):
    assert hooked(tmp_path, hook).layer == layer


@pytest.mark.parametrize(
    "hook",
    [
        "model.layers.5.mlp",
        "model.layers.5.self_attn",
        "model.layers.5.input_layernorm",
        "transformer.h.5.attn",
        "blocks.5.hook_mlp_out",
        "blocks.5.attn.hook_z",
        "blocks.5.hook_resid_mid",
        "blocks.5.ln2.hook_normalized",
        "hook_embed",
    ],
)
def test_an_sae_of_another_place_than_the_residual_stream_is_refused(tmp_path, hook):
    with pytest.raises(ConceptError, match=f"it reads {hook.replace('.', '[.]')}, .*concepts are directions"):
        hooked(tmp_path, hook)


def test_an_sae_whose_input_scale_is_not_known_is_refused(tmp_path):
    with pytest.raises(ConceptError, match="expected_average_only_in.* fold_activation_norm_scaling_factor"):
        load_sae(save_sae(tmp_path, normalize_activations="expected_average_only_in"), CPU)


def test_a_transcoder_is_refused(tmp_path):
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    Transcoder(TranscoderConfig(d_in=WIDTH, d_out=WIDTH, d_sae=48, apply_b_dec_to_input=False)).save_model(tmp_path)
    with pytest.raises(ConceptError, match="a transcoder's features write elsewhere"):
        load_sae(str(tmp_path), CPU)


@pytest.mark.parametrize(
    ("sae", "model"),
    [
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-2-2b", "google/gemma-2-2b-it"),
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
        ("gpt2-small", "gpt2"),
        ("gpt2-small", "openai-community/gpt2"),
        ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"),
        ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-1.7B"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m-instruct"),
        ("gemma-2-2b", "/models/gemma-2-2b/"),
        ("gemma-2-2b", "/hub/models--google--gemma-2-2b/snapshots/0f1e2d"),
    ],
)
def test_names_of_one_model_match(sae, model):
    assert words_of(sae) == words_of(model)


@pytest.mark.parametrize(
    ("sae", "model"),
    [
        ("gemma-2b", "google/gemma-2-2b"),
        ("gemma-2-2b", "google/gemma-2-9b"),
        ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("pythia-70m", "EleutherAI/pythia-70m-deduped"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-8B"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Coder-7B"),
    ],
)
def test_names_of_two_models_do_not(sae, model):
    assert words_of(sae) != words_of(model)


def test_an_sae_of_another_model_of_the_same_width_is_refused_with_both_names(tmp_path):
    module = load_sae(save_sae(tmp_path, model_name="gemma-2b", model_fingerprint="one"), CPU).module
    with pytest.raises(ConceptError, match="trained on gemma-2b, and the model is ours .known as google/gemma-2-2b.*"):
        check_model(module, "path", ("ours", "google/gemma-2-2b"), "other")
    assert check_model(module, "path", ("ours", "google/gemma-2b-it"), "other") == "gemma-2b"
    # One that was trained here names the weights, whatever they are called now.
    assert check_model(module, "path", ("renamed",), "one") == "gemma-2b"


def test_a_directory_is_known_by_what_its_files_say_that_it_was_made_from(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    lm = as_language_model("mine", small_model("llama"), small_tokenizer())
    lm.model.config._name_or_path = str(tmp_path)
    configuration = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**configuration, "_name_or_path": "google/gemma-2-2b"}))
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\nbase_model: owner/Base-7B\n---\nbase_model: x/y\n")
    assert known_names(lm) == ("mine", str(tmp_path), "google/gemma-2-2b", "owner/Base-7B")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))


def centre_writes(model):
    """A model's weights as TransformerLens centres them: what writes to the stream has mean 0 over dimensions.

    Written for these architectures alone, by the names of their layers.
    """
    embeddings = ("wte", "wpe", "embed_in", "embed_tokens")
    written = ("c_proj", "attention.dense", "dense_4h_to_h", "out_proj", "fc_out", "self_attn.dense", "fc2")
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # it only reads, though it may share its weights
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(embeddings):
                module.weight -= module.weight.mean(-1, keepdim=True)
            elif name.endswith(written):
                if type(module).__name__ == "Conv1D":
                    module.weight -= module.weight.mean(1, keepdim=True)
                else:
                    module.weight -= module.weight.mean(0, keepdim=True)
                if module.bias is not None:
                    module.bias -= module.bias.mean()
    return model


def layer_norm_model(architecture):
    import transformers as hf

    sizes = dict(vocab_size=400, hidden_size=WIDTH, num_attention_heads=4)
    configurations = {
        "gptj": lambda: hf.GPTJConfig(vocab_size=400, n_embd=WIDTH, n_layer=3, n_head=4, rotary_dim=4),
        "gpt_neo": lambda: hf.GPTNeoConfig(
            **{k: v for k, v in sizes.items() if k != "num_attention_heads"},
            num_heads=4,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
        ),
        "phi": lambda: hf.PhiConfig(**sizes, num_hidden_layers=3, intermediate_size=64),
    }
    torch.manual_seed(0)
    if architecture in configurations:
        model = hf.AutoModelForCausalLM.from_config(configurations[architecture](), dtype=torch.float32).eval()
    else:
        model = small_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) + 0.05
    return model


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neo", "gpt_neox", "gptj", "phi"])
def test_with_centred_weights_the_stream_is_less_its_mean_and_the_model_says_the_same(architecture, ids):
    model = layer_norm_model(architecture)
    with torch.inference_mode():
        plain = model(ids, output_hidden_states=True)
        streams = [h.clone() for h in plain.hidden_states[:-1]]
        found = centre_writes(model)(ids, output_hidden_states=True)
    assert max(float(h.mean(-1).abs().max()) for h in streams) > 0.1
    for before, centred in zip(streams, found.hidden_states[:-1], strict=True):
        torch.testing.assert_close(centred, before - before.mean(-1, keepdim=True), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits, plain.logits, atol=2e-3, rtol=1e-3)
    assert centres_writes(as_language_model("x", model, small_tokenizer())) is True


def test_only_rms_norms_leave_weights_uncentred_and_others_are_unknown():
    assert centres_writes(as_language_model("x", small_model("llama"), small_tokenizer())) is False
    assert centres_writes(as_language_model("x", small_model("gemma"), small_tokenizer())) is False
    unlike = small_model("gpt2")
    unlike.config.model_type = "bloom"  # its embeddings pass a norm that writes to the stream
    assert centres_writes(as_language_model("x", unlike, small_tokenizer())) is None


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("settings", [{}, {"normalize_activations": "layer_norm"}, {"apply_b_dec_to_input": False}])
def test_a_centred_sae_fires_on_the_plain_model_as_on_the_one_it_was_trained_on(tmp_path, ids, architecture, settings):
    source = save_sae(tmp_path, architecture, **settings)
    row, response = [ids[0].numpy()], [np.ones(12, bool)]

    def stream_of(model):
        lm = as_language_model("x", model, small_tokenizer())
        return next(iter(response_activations(lm, row, response, (), (2,))))[0].streams[2]

    plain, centred = stream_of(layer_norm_model("gpt2")), stream_of(centre_writes(layer_norm_model("gpt2")))
    as_trained, here = load_sae(source, CPU), SaeSource(source, 2, centred=True).load(CPU)
    expected = as_trained.module.encode(torch.from_numpy(centred))
    torch.testing.assert_close(here.module.encode(torch.from_numpy(plain)), expected, atol=1e-3, rtol=1e-3)
    if "normalize_activations" not in settings:  # a LayerNorm takes the mean off by itself
        assert not torch.allclose(as_trained.module.encode(torch.from_numpy(plain)), expected, atol=0.1)
    token, feature, _ = here.encode(plain)
    assert set(zip(token.tolist(), feature.tolist(), strict=True)) == {tuple(p) for p in expected.nonzero().tolist()}
    # The direction reads of the plain stream what the decoder reads of the centred one.
    decoder = as_trained.module.W_dec.detach().numpy()
    ratio = (plain @ here.directions().T) / (centred @ decoder.T)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio.mean(0), ratio.shape), rtol=1e-2)
    # A gradient through the encoder has no part along the mean.
    stream = torch.from_numpy(plain).requires_grad_()
    FeatureActivation(2, here.module, int(feature[0]))(stream).sum().backward()
    assert stream.grad.abs().max() > 0 and stream.grad.sum(-1).abs().max() < 1e-4


def test_layers_of_an_sae_without_a_hook_name_are_not_guessed(tmp_path):
    assert layer_of(load_sae(save_sae(tmp_path, hook_name=""), CPU).module) is None
