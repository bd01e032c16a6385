"""Quantised weights, recognised without the libraries that make them.

A quantised weight is a code: it has no gradient, and converting its numbers to another
precision would make nonsense of it. Activations and their gradients do pass through
quantised layers, so adapters on them can be attributed to (as QLoRA trains them,
Dettmers et al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from concept_audit.errors import ModelError

LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "auto_gptq": "GPTQ",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "torchao": "torchao",
    "quanto": "quanto",
    "compressed_tensors": "compressed-tensors",
}
"""Packages whose layers and weights are quantised, and what they are called."""
_CODES = ("qweight", "W_q", "weight_packed", "_packed_params")
"""Names under which layers keep codes that are no parameters."""


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's own weights are codes: integers or 8-bit floats, packed, or kept by a library's own class."""
    if any(weight is not None and is_code(weight) for weight in module._parameters.values()):
        return True
    kept = {**module._buffers, **module._modules, **vars(module)}
    if any(kept.get(name) is not None for name in _CODES):
        return True
    return bool(getattr(module, "in_features", None)) and _library(type(module)) is not None


def quantised_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every module with quantised weights."""
    return [(name, module) for name, module in model.named_modules() if is_quantised(module)]


def quantisation(model: nn.Module) -> str | None:
    """What a model is quantised with, as far as it says; None where no weight is."""
    found = quantised_modules(model)
    if not found:
        return None
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    module = found[0][1]
    known = [_library(type(module)), *(_library(type(weight)) for weight in module._parameters.values())]
    return next((name for name in known if name), type(module).__name__)


def passes_gradients(name: str, path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    """A forward hook on a quantised layer: some kernels know no derivative, and end a backward pass without a word.

    Args:
        name: of the model, for the error.
        path: of the layer.

    Raises:
        ModelError: (the hook) the layer's input has a gradient to come, and its output none.
    """

    def forward(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and arguments[0].requires_grad and not output.requires_grad:
            raise ModelError(
                f"{name}: the quantised layer {path} ({type(module).__name__}) passes no gradient on, so influence "
                "through it would be left out; load it with another kernel, or rank with vector_filter or "
                "projection_difference"
            )

    return forward


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """A weight as a plain tensor, whatever keeps it."""
    packed = _library(type(weight)) is not None and weight.is_floating_point()
    return (weight.dequantize() if packed else weight).detach()


def is_code(weight: torch.Tensor) -> bool:
    """Whether a weight is no number that a gradient could change."""
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    # torchao's and quanto's tensors call themselves bfloat16 and are packed within.
    return _library(type(weight)) is not None or _library(type(weight.data)) is not None


def _library(kind: type) -> str | None:
    parts = kind.__module__.split(".")
    return next((LIBRARIES[part] for part in parts if part in LIBRARIES), None)
