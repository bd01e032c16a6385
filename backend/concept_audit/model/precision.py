"""The precision that a model runs in, and copies of models in another one."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from concept_audit.errors import ModelError
from concept_audit.model.hooks import without_hooks
from concept_audit.model.quantised import is_code, quantised_modules

Model = TypeVar("Model", bound=nn.Module)


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first weight that is a number and no code: for a model with an adapter, the base's."""
    return next(weight.dtype for weight in model.parameters() if not is_code(weight))


def is_uniform(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every weight that is a number has a dtype; PEFT keeps adapters in float32 on narrower bases."""
    coded = _codes(model)
    return all(p.dtype == dtype for p in model.parameters() if id(p) not in coded)


def converted(model: Model, dtype: torch.dtype, private: bool = False) -> Model:
    """A copy of a model whose weights have a dtype.

    Weights alone are converted: buffers, such as the frequencies of rotary positions, keep their
    precision, as they do when a model is loaded in `dtype`. Quantised weights are shared with the
    model, as they are codes and nothing changes them.

    Args:
        private: copy also the weights that have the dtype already, so that they may be changed.
    """
    coded = _codes(model)
    # What stands in the memo is taken instead of copied, so no second copy in the old precision is made.
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to(dtype, copy=private), requires_grad=False)
        for weight in model.parameters()
        if id(weight) not in coded
    }
    memo |= coded
    copied = copy.deepcopy(model, memo)
    without_hooks(copied)
    return copied


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cuda":
        # PyTorch answers for the current device, which need not be this one.
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(precision: str, own: torch.dtype, device: torch.device) -> str:
    """The precision that ``auto`` stands for: bfloat16 where the processor computes in it, else the model's own.

    Never float16, in which the gradients of single tokens underflow: a float16 model is differentiated
    in bfloat16 where the processor computes in it, else in float32.

    Args:
        own: the dtype of the model's weights.
    """
    if precision != "auto":
        return precision
    if own in (torch.float32, torch.float16):
        return "bfloat16" if native_bfloat16(device) else "float32"
    return str(own).removeprefix("torch.")


def check_precision(name: str, model: nn.Module) -> None:
    """Refuse to differentiate in float16.

    Args:
        name: of the model, for the error.

    Raises:
        ModelError: weights or quantised layers compute in float16.
    """
    if any(weight.dtype == torch.float16 for weight in model.parameters() if not is_code(weight)):
        raise ModelError(
            f"{name}: runs in float16, in which gradients underflow; load it with --dtype bfloat16 or float32 "
            "(in Python: lm.differentiable())"
        )
    for path, module in quantised_modules(model):
        scales = {
            key: tensor for key, tensor in (*module.named_parameters("", False), *module.named_buffers("", False))
        }
        halves = [key for key, tensor in scales.items() if tensor.dtype == torch.float16 and key != "bias"]
        if halves or getattr(module, "compute_dtype", None) == torch.float16:
            raise ModelError(
                f"{name}: its quantised layers compute in float16 ({path}), in which gradients underflow; load it "
                "with --dtype bfloat16 (bitsandbytes: with bnb_4bit_compute_dtype bfloat16 too)"
            )


def wide_product(left: torch.Tensor, right: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """left @ right of two matrices, summed and given in a wider dtype than theirs."""
    # Only CUDA's own kernels give a product of narrow matrices in float32.
    if left.is_cuda and torch.version.hip is None and left.dtype != wide and wide == torch.float32:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def _codes(model: nn.Module) -> dict[int, object]:
    """Quantised weights and the buffers that belong to them, by id."""
    return {
        id(tensor): tensor
        for _, module in quantised_modules(model)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
