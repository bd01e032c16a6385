"""Models that no single device holds: shared out by Accelerate over GPUs, memory and disk.

Each block's weights lie on one GPU, or are brought there from memory or disk while it runs. What reads activations
works; what needs gradients of weights would need them all at once, and is refused (`check_whole`).
"""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from concept_audit.errors import ModelError

SPLIT = "split"
"""In place of a device's name: over all that there are (Transformers' ``device_map="auto"``)."""


def placement() -> tuple[dict[str, Any], TemporaryDirectory[str]]:
    """What Transformers' loader is told, and the folder for weights that no memory holds: keep it beside the model."""
    folder = TemporaryDirectory(prefix="concept-audit-weights-")
    return {"device_map": "auto", "offload_folder": folder.name}, folder


def is_split(model: nn.Module) -> bool:
    """Whether some weights are elsewhere than others, or are fetched when they are needed."""
    places = getattr(model, "hf_device_map", None) or {}
    return len(set(map(str, places.values()))) > 1 or any(_fetches(module) for module in model.modules())


def home(model: nn.Module) -> torch.device:
    """Where input ids go: the device on which the model's first weights are used."""
    here = next(model.parameters()).device
    if here.type != "meta":
        return here
    hooks = (hook for module in model.modules() if (hook := _fetches(module)))
    return next((torch.device(hook.execution_device) for hook in hooks), here)


def weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter with its name, one at a time, fetched if it is not in memory."""
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        yield name, at_hand(owners[id(parameter)], name.rpartition(".")[2])


def at_hand(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """A parameter of this very module, fetched if it is not in memory."""
    parameter, hook = module.get_parameter(name), _fetches(module)
    return hook.weights_map[name] if parameter.is_meta and hook else parameter


def check_whole(name: str, model: nn.Module) -> None:
    """Raise ModelError where gradients of weights are wanted of a model that is shared out."""
    if is_split(model):
        raise ModelError(
            f"{name}: it is shared out over several devices (--device {SPLIT}), where weights are not all at hand for "
            "gradients; influence, the index, the forecast and fine-tuning need it on one (--device cuda). "
            "vector_filter, projection_difference and SAE features do without"
        )


def _fetches(module: nn.Module) -> Any | None:
    """Accelerate's hook that brings a module's weights to where it runs; None where they stay."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)), None)
