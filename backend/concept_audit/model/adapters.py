"""Adapters that PEFT has put on a model: which of their weights there are, and which are in use."""

from __future__ import annotations

from typing import Any

from torch import nn

LORA = ("lora_A", "lora_B")
ADAPTER_ADVICE = (
    "attribute to a LoRA adapter on the same base (--model of the adapter, --weights lora), audit the model "
    "unquantised, or rank with vector_filter or projection_difference, which need no gradients"
)


def is_lora(name: str) -> bool:
    """Whether a module's path leads to a low-rank matrix of LoRA (Hu et al. 2021, arXiv 2106.09685)."""
    return any(part in LORA for part in name.split("."))


def adapter_kind(model: Any) -> str | None:
    """What kind of adapter PEFT has put on the model, such as ``IA3``; None where it has put none."""
    settings = getattr(model, "peft_config", None)
    if not isinstance(settings, dict) or not settings:
        return None
    return str(getattr(next(iter(settings.values())).peft_type, "value", "unknown"))


def is_inactive(root: nn.Module, name: str) -> bool:
    """Whether a path leads into an adapter that is loaded and not in use, or the original of a trained copy."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        parent = root.get_submodule(".".join(parts[:place]))
        if part == "original_module" and hasattr(parent, "modules_to_save"):
            return True
        if part in (*LORA, "modules_to_save") and place + 1 < len(parts):
            return parts[place + 1] not in _active(parent)
    return False


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight of the adapters in use, by its path; empty for a model without."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            for name, parameter in module.named_parameters():
                parts = name.split(".")
                own = parts[0] not in ("base_layer", "original_module")
                if own and set(parts) & set(_active(module)):
                    found[f"{path}.{name}"] = parameter
    return found


def _active(wrapper: nn.Module) -> list[str]:
    active = getattr(wrapper, "active_adapters", None) or getattr(wrapper, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)
