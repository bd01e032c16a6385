"""Models of many families, random, two blocks deep and 32 wide; and ways to change them that people bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

COMMON = dict(vocab_size=400, num_hidden_layers=2, max_position_embeddings=256, pad_token_id=0)
WIDE = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, **COMMON)
GROUPED = dict(num_key_value_heads=2, **WIDE)
HEADS = dict(head_dim=8, **GROUPED)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

DENSE: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaConfig(**HEADS),
    "Mistral": lambda: hf.MistralConfig(**HEADS),
    "Qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "Qwen3": lambda: hf.Qwen3Config(**HEADS),
    "Gemma": lambda: hf.GemmaConfig(**HEADS),
    "Gemma 2": lambda: hf.Gemma2Config(**HEADS),
    "Gemma 3": lambda: hf.Gemma3TextConfig(**HEADS),
    "Phi": lambda: hf.PhiConfig(**WIDE),
    "Phi-3": lambda: hf.Phi3Config(**GROUPED),
    "OLMo 2": lambda: hf.Olmo2Config(**GROUPED),
    "Granite": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "Cohere": lambda: hf.CohereConfig(**GROUPED),
    "GPT-2": lambda: hf.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**WIDE),
    "OPT": lambda: hf.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **WIDE),
    "BLOOM": lambda: hf.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
    "Falcon": lambda: hf.FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "Mamba": lambda: hf.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4),
}
MIXTURES: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: hf.MixtralConfig(num_local_experts=4, **HEADS),
    "Qwen2-MoE": lambda: hf.Qwen2MoeConfig(shared_expert_intermediate_size=32, **GROUPED, **EXPERTS),
    "Qwen3-MoE": lambda: hf.Qwen3MoeConfig(**HEADS, **EXPERTS),
    "OLMoE": lambda: hf.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **GROUPED),
    "Granite-MoE": lambda: hf.GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "DeepSeek-V3": lambda: hf.DeepseekV3Config(
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        **GROUPED,
    ),
    "GPT-OSS": lambda: hf.GptOssConfig(
        num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2, **HEADS
    ),
}


def small(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model of a family; its weights are large enough for every block to matter."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config({**DENSE, **MIXTURES}[name](), dtype=torch.float32)
    with torch.no_grad():
        for name_, weight in model.named_parameters():
            if weight.ndim > 1 and "A_log" not in name_:
                weight.mul_(2)
    # The kernels that multiply all experts at once know no float64.
    model.config._experts_implementation = "eager"
    return model.to(dtype).eval().requires_grad_(False)


def adapted(model: Any, fresh: bool = False, **settings: Any) -> Any:
    """The model with a LoRA adapter of rank 2, random or as training begins with it (B = 0)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "init_lora_weights": fresh, "task_type": "CAUSAL_LM", **settings}
    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings))
    return made.eval().requires_grad_(False)


class PackedLinear(nn.Linear):
    """A linear layer with codes for weights, as bitsandbytes keeps them: uint8, decoded at every use."""

    def __init__(self, layer: nn.Linear, derivative: bool = True):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        scale = layer.weight.abs().amax() / 127
        codes = (layer.weight / scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        self.register_buffer("scale", scale.detach())
        self._derivative = derivative

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight.to(x.dtype) - 128).view(self.out_features, -1) * self.scale.to(x.dtype)
        if self._derivative:
            return nn.functional.linear(x, weight, self.bias)
        with torch.no_grad():
            return nn.functional.linear(x, weight, self.bias)


def packed(model: Any, derivative: bool = True) -> Any:
    """The model with the linear layers of its blocks quantised."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(module, derivative))
    return model
