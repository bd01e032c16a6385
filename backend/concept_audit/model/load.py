"""Loading a causal language model, its tokenizer and, where there is one, its adapter.

The only part of the project that knows Hugging Face's loaders. Weights are read
from safetensors, or from older files with ``weights_only=True`` (Transformers'
default); code that comes with a model runs only if the user says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from concept_audit.errors import ModelError, first_line
from concept_audit.model.builtin import BUILTIN_MODELS, builtin_directory, builtin_is_here
from concept_audit.model.memory import give_back
from concept_audit.model.options import ModelOptions
from concept_audit.model.precision import converted, is_uniform, main_dtype, native_bfloat16
from concept_audit.model.quantised import numbers, quantisation, quantised_modules
from concept_audit.model.split import SPLIT, home, is_split, placement, weights
from concept_audit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with its blocks found.

    Attributes:
        blocks: the transformer blocks in the order in which they run.
        d_model: width of the residual stream.
        context: the longest row in tokens that the model takes.
        positions: how many positions it was made for, at most; None where its configuration does not say.
        fingerprint: tells models with different weights apart (see `fingerprint`).
        lock: held while hooks are on the model, since threads share it.
        copies: what `in_dtype` has made.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    blocks: nn.ModuleList
    d_model: int
    context: int
    fingerprint: str
    positions: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)
    copies: dict[torch.dtype, LanguageModel] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of the base's, where an adapter has another."""
        return main_dtype(self.model)

    @property
    def dtype_name(self) -> str:
        """As it is asked for: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def wide_dtype(self) -> torch.dtype:
        """In which sums over tokens or rows are taken: float32, or the model's own if that is wider."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return home(self.model)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def in_dtype(self, dtype: torch.dtype) -> LanguageModel:
        """The model with every weight in one precision: a copy, made once, unless it is so already.

        Quantised weights stay what they are; see `concept_audit.model.precision.converted`.
        """
        if is_uniform(self.model, dtype):
            return self
        if dtype in self.copies:
            return self.copies[dtype]
        # While another thread runs the model its weights may be dual; and one copy is enough.
        with self.lock:
            if dtype not in self.copies:
                model = converted(self.model, dtype)
                made = replace(self, model=model, blocks=find_blocks(model), lock=threading.RLock(), copies={})
                self.copies[dtype] = made
            return self.copies[dtype]

    def differentiable(self) -> LanguageModel:
        """The model in a precision that gradients survive: itself, or a wider copy of a float16 model.

        Gradients of single tokens underflow in float16 (Micikevicius et al. 2018, arXiv 1710.03740).
        """
        if self.dtype != torch.float16:
            return self
        return self.in_dtype(torch.bfloat16 if native_bfloat16(self.device) else torch.float32)

    def check_layers(self, layers: tuple[int, ...]) -> None:
        """Raise ModelError unless each layer counts between 1 and all of the blocks."""
        wrong = [layer for layer in layers if not 1 <= layer <= self.n_layers]
        if wrong:
            raise ModelError(
                f"--layers {','.join(map(str, wrong))}: {self.name} has {self.n_layers} blocks; "
                f"a layer counts the blocks that have run, so choose from 1 to {self.n_layers}"
            )

    def check_length(self, max_tokens: int | None) -> None:
        """Raise ModelError where rows would be cut at more tokens than the model has positions for."""
        if max_tokens and self.positions and max_tokens > self.positions:
            raise ModelError(
                f"--max-tokens {max_tokens}: {self.name} was made for {self.positions:,} positions, and beyond them its "
                "numbers mean nothing; give at most that many, or leave the option out"
            )


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Three layers in the second quarter to the middle, where concepts are most linear: 8, 12, 16 of 30."""
    return tuple(sorted({max(1, round(n_layers * share)) for share in (0.27, 0.40, 0.53)}))


def load_model(options: ModelOptions, cache: Path, progress: Progress) -> LanguageModel:
    """Load the model and tokenizer that `options` name.

    Raises:
        ModelError: the name is unknown, the files are incomplete, the device is
            absent, the tokenizer cannot tell character offsets, or no blocks are found.
    """
    device, dtype = find_device(options.device), None
    dtype = _dtype(options.dtype, device)
    location = _locate(options.name, cache, progress)
    with progress.stage(f"Loading {options.name}"):
        give_back(device)
        adapter = _adapter_config(location, options)
        if adapter is not None:
            base = adapter.base_model_name_or_path
            if not base:
                raise ModelError(
                    f"{options.name}: adapter_config.json names no base model; "
                    'set "base_model_name_or_path" in it to a directory, hub or built-in name'
                )
            model = _load_causal(_locate(base, cache, progress), dtype, options, device)
            model = _put_adapter(model, location, options.name)
            tokenizer = _load_tokenizer((location, _locate(base, cache, progress)), options)
        else:
            model = _load_causal(location, dtype, options, device)
            tokenizer = _load_tokenizer((location,), options)
        model.eval().requires_grad_(False)
        if quantisation(model) is None and not is_split(model):
            cast("nn.Module", model).to(device)
    return as_language_model(options.name, model, tokenizer)


def is_here(name: str, cache: Path) -> bool:
    """Whether the files of a model are on this machine, so that loading it downloads nothing."""
    if name in BUILTIN_MODELS:
        return builtin_is_here(BUILTIN_MODELS[name], cache)
    path = Path(name).expanduser()
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            return isinstance(try_to_load_from_cache(name, "config.json"), str)
        except HFValidationError:
            return False
    adapter = path / "adapter_config.json"
    base = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path") if adapter.exists() else None
    return base is None or is_here(base, cache)


def load_tokenizer(options: ModelOptions, cache: Path, progress: Progress) -> Any:
    """The tokenizer that `load_model` would load, without the model.

    Raises:
        ModelError: as `load_model`, as far as the tokenizer goes.
    """
    location = _locate(options.name, cache, progress)
    adapter = _adapter_config(location, options)
    base = adapter.base_model_name_or_path if adapter is not None else None
    return _load_tokenizer((location, _locate(base, cache, progress)) if base else (location,), options)


def as_language_model(name: str, model: PreTrainedModel, tokenizer: Any) -> LanguageModel:
    """Wrap a model that is already in memory.

    Raises:
        ModelError: no blocks are found, or the tokenizer cannot tell character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) gives no character offsets, which the "
            "response mask needs; convert it to a fast tokenizer (tokenizer.json)"
        )
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return LanguageModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        blocks=find_blocks(model),
        d_model=config.hidden_size,
        context=int(min(context, tokenizer.model_max_length, 1 << 20)),
        fingerprint=fingerprint(model),
        positions=getattr(config, "max_position_embeddings", None) or None,
    )


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of any causal model, without knowing its architecture.

    They are the outermost list of modules that is as long as the configuration
    says the model is deep; of several (an encoder beside a decoder), the one with
    the most parameters.

    Raises:
        ModelError: there is no such list.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ModelError(
            f"{type(model).__name__}: found no list of {depth} blocks "
            "(its configuration's num_hidden_layers); this architecture is not supported"
        )
    # max keeps the first of equals, and modules() walks from the outside in.
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def fingerprint(model: nn.Module) -> str:
    """Hash of every weight's name, shape and 64 of its values: tells fine-tunes of one model apart.

    Returns:
        16 hexadecimal digits. The dtype counts, since it changes every score slightly.
    """
    digest = hashlib.blake2b(digest_size=8)
    # Some libraries keep quantised weights in buffers.
    coded = [(f"{path}.{name}", b) for path, m in quantised_modules(model) for name, b in m.named_buffers(path)]
    for name, parameter in chain(weights(model), coded):
        flat = numbers(parameter).reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _locate(name: str, cache: Path, progress: Progress) -> str:
    """A directory, or a name to look for on the hub."""
    if name in BUILTIN_MODELS:
        return str(builtin_directory(BUILTIN_MODELS[name], cache, progress))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or path.is_absolute() or name.count("/") > 1
    if path.exists() or looks_local:
        kind = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"--model {name}: {kind}; give the directory that holds config.json, a name on the "
            f"Hugging Face hub (owner/name), or one of: {', '.join(BUILTIN_MODELS)}"
        )
    return name


def _adapter_config(location: str, options: ModelOptions) -> Any | None:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(location).is_dir():
        found = (Path(location) / "adapter_config.json").exists()
    else:
        try:
            found = file_exists(location, "adapter_config.json")
        except HFValidationError as error:
            raise _unknown_model(options.name, error) from error
        except (HfHubHTTPError, OSError, RuntimeError):
            # Unreachable or private: the loader that comes next says so in full,
            # or finds the model in the hub's cache on this machine.
            return None
    if not found:
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(location)


def _load_causal(location: str, dtype: torch.dtype, options: ModelOptions, device: torch.device) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {"trust_remote_code": options.trust_remote_code}
    try:
        quantised = getattr(AutoConfig.from_pretrained(location, **known), "quantization_config", None) is not None
        # What is quantised is put on its device as it is read, and never moved.
        placed, folder = ({"device_map": {"": device}} if quantised else {}), None
        if options.device == SPLIT:
            placed, folder = placement()
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, **known, **placed)
        if folder is not None:
            vars(model)["_offloaded"] = folder
        return model
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise _unknown_model(options.name, error) from error


def _load_tokenizer(locations: tuple[str, ...], options: ModelOptions) -> Any:
    """From the first place that has one: an adapter often comes without its own."""
    from transformers import AutoTokenizer

    for location in locations:
        try:
            return AutoTokenizer.from_pretrained(location, trust_remote_code=options.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            last = error
    raise ModelError(
        f"--model {options.name}: it has no tokenizer that loads ({first_line(last)}); "
        "put its tokenizer.json and tokenizer_config.json beside the weights"
    ) from last


def _put_adapter(model: PreTrainedModel, location: str, name: str) -> PreTrainedModel:
    from peft import PeftModel

    try:
        made = PeftModel.from_pretrained(model, location)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"--model {name}: the adapter does not fit its base model ({first_line(error)})") from error
    if made.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"--model {name}: its adapter ({made.active_peft_config.peft_type.value}) puts virtual tokens before every "
            "row, which no mask or position here knows of; audit the base model, or an adapter of weights such as LoRA"
        )
    # A PEFT model answers for the one that it wraps, attribute by attribute.
    return cast("PreTrainedModel", made)


def _unknown_model(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"--model {name}: cannot load it ({first_line(error)}). Give a directory with config.json and "
        "weights, a name on the Hugging Face hub (needs a network connection the first time), "
        f"or a built-in name: {', '.join(BUILTIN_MODELS)}"
    )


def find_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the fastest that there is, and ``split`` begins there.

    Raises:
        ModelError: PyTorch cannot use it here.
    """
    if name in ("auto", SPLIT):
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        _put_something(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"--device {name}: PyTorch cannot use it here ({first_line(error)}); "
            "leave it out to choose by itself, or use cpu"
        ) from error
    return device


def _put_something(device: torch.device) -> None:
    """Raise what PyTorch raises where a device cannot be used."""
    if device.type == "meta":
        raise RuntimeError("it holds shapes without numbers")
    torch.empty(1, device=device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"--dtype {name}: unknown; choose from auto, {', '.join(known)}")
    return known[name]
