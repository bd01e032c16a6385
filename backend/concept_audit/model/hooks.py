"""Hooks that look at a model while it runs, or change what it computes, for a while.

They belong to the module that they were put on: a copy of the model, which another thread may make meanwhile, does
not take them along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class _ForAWhile:
    """A hook that is told apart from those that a model came with."""

    def __init__(self, hook: Callable[..., Any]):
        self._hook = hook

    def __call__(self, *arguments: Any) -> Any:
        return self._hook(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _ForAWhile:
        return self  # what it holds is its pass's own


def hook_outputs(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """As `Module.register_forward_hook`."""
    return module.register_forward_hook(_ForAWhile(hook))


def hook_inputs(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """As `Module.register_forward_pre_hook`."""
    return module.register_forward_pre_hook(_ForAWhile(hook))


def without_hooks(model: nn.Module) -> None:
    """Take such hooks off every module of a model that was copied while they were on it."""
    for module in model.modules():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for number in [number for number, hook in table.items() if isinstance(hook, _ForAWhile)]:
                del table[number]
