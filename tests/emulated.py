"""A device without float64, such as Apple's MPS, emulated on the CPU.

Tensors that are "there" claim to be on PyTorch's ``meta`` device and hold their numbers in a tensor
on the CPU. What MPS refuses is refused: float64, matrix decompositions, and meeting a tensor that
is elsewhere. What it computes is computed on the CPU, so the results can be compared with the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from concept_audit.model import exact

DEVICE = torch.device("meta")
MISSING = ("linalg_eigh", "linalg_qr", "linalg_svd", "geqrf", "searchsorted")
ELSEWHERE = ("_to_copy", "copy_")
"""Operations that take tensors from one device to another."""


class There(torch.Tensor):
    """A tensor on the emulated device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a tensor to float64: the emulated device has no float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the emulated device to numpy; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        # In inference mode operations arrive before they are taken apart.
        with _Dispatch():
            return function.decompose(*args, **kwargs)
    name = function._schema.name.removeprefix("aten::")
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, There) for x in given)
    device = kwargs.get("device")
    wanted = torch.device(device) if device is not None else None
    lands = there if wanted is None else wanted.type == DEVICE.type
    if there and name.removeprefix("_") in MISSING:
        raise NotImplementedError(f"{name}: not on the emulated device")
    if there and not name.startswith(ELSEWHERE):
        apart = [x for x in given if not isinstance(x, There) and x.dim()]
        # What is there may be indexed from here, as on CUDA and MPS; not the other way round.
        indexed_from_here = name.startswith(("index", "_index", "_unsafe_index")) and isinstance(args[0], There)
        if apart and not indexed_from_here:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, kwargs))
    if wanted is not None and lands:
        plain_kwargs["device"] = torch.device("cpu")
    if name == "_efficientzerotensor":
        function = torch.ops.aten.zeros.default  # forward mode's zeros that take no memory
    out = function(*plain_args, **plain_kwargs)
    if function._schema.is_mutable and name.endswith("_"):
        return args[0]
    if not lands or name == "_local_scalar_dense":
        return out
    if name == "copy_":
        return args[0]
    return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            # PyTorch makes an empty tensor at once where it is told "meta".
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


@contextmanager
def device_without_float64(monkeypatch: Any) -> Iterator[torch.device]:
    """The emulated device, for as long as the body runs."""
    monkeypatch.setattr(exact, "WITHOUT_FLOAT64", exact.WITHOUT_FLOAT64 | {DEVICE.type})
    with _Function(), _Dispatch():
        yield DEVICE


def put_there(model: nn.Module) -> nn.Module:
    """Move a model's parameters and buffers; `nn.Module.to` would let PyTorch take the place literally."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(There(parameter.detach()), parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model
