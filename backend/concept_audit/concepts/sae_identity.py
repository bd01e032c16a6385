"""Where an SAE reads, and of which model: what its metadata say, held against the model at hand.

An SAE's weights fit any residual stream of their width. Only SAELens' metadata tell
whose they are (``model_name``), at which place (``hook_name``), and how the model's
weights were changed before the SAE was trained (``model_from_pretrained_kwargs``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from concept_audit.errors import ConceptError

OVERRIDE = "--sae-from-other-model"
STREAM = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
BLOCK = r"(?:(?:base_model|model|transformer|gpt_neox|decoder|language_model|backbone)\.)*(?:layers|blocks|h)\.(\d+)"
WHOLE_BLOCK, IN_BLOCK = re.compile(BLOCK), re.compile(rf"{BLOCK}\..+|hook_\w+|.*\bembed\w*")
SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
VARIANTS = frozenset("it instruct chat base pt hf sft dpo bnb 4bit 8bit awq gptq int4 int8 fp8 fp16 bf16 gguf".split())
"""Words by which tuned, quantised and original weights of one model differ in name."""
UNCHANGED = frozenset(
    # Foldings that change what reads the stream, not the stream (TransformerLens, HookedTransformer.from_pretrained);
    # and where and in which precision the model runs.
    "fold_ln center_unembed fold_value_biases refactor_factored_attn_matrices "
    "default_prepend_bos default_padding_side move_to_device device device_map n_devices dtype torch_dtype n_ctx "
    "first_n_layers trust_remote_code local_files_only cache_dir token attn_implementation low_cpu_mem_usage".split()
)
UNFOLDED = ("expected_average_only_in", "covariance_whitening")


def layer_of(module: Any, name: str = "") -> int | None:
    """The layer that an SAE's metadata name, counted as blocks run: ``blocks.11.hook_resid_post`` is 12.

    Args:
        name: what the user called the SAE.

    Returns:
        None if the metadata name no place, or one of which it is not known where it is.

    Raises:
        ConceptError: the place is not the residual stream before or after a block.
    """
    metadata = module.cfg.metadata
    hook = str(getattr(metadata, "hook_name", "") or getattr(metadata, "hf_hook_name", "") or "")
    if found := STREAM.fullmatch(hook):
        return int(found[1]) + (found[2] == "post")
    if found := WHOLE_BLOCK.fullmatch(hook):
        return int(found[1]) + 1
    if IN_BLOCK.fullmatch(hook):
        raise ConceptError(
            f"--sae {name}: it reads {hook}, {_place(hook)}, and concepts are directions of the residual stream "
            "between blocks; choose an SAE of blocks.N.hook_resid_post or blocks.N.hook_resid_pre, or --sae train"
        )
    return None


def check_readable(module: Any, name: str) -> None:
    """Refuse an SAE that does not encode single tokens of the residual stream as they are.

    Raises:
        ConceptError: it is a transcoder, reads sequences, or lacks the scale of its inputs.
    """
    cfg = module.cfg
    if hasattr(cfg, "d_out"):
        raise ConceptError(
            f"--sae {name}: a transcoder's features write elsewhere than they read, so they have no direction "
            "where they read; choose an SAE of the residual stream, or --sae train"
        )
    if cfg.architecture() == "temporal":
        raise ConceptError(
            f"--sae {name}: a temporal SAE reads a token together with those before it, and tokens are read one "
            "by one here; choose another architecture, or --sae train"
        )
    if cfg.normalize_activations in UNFOLDED:
        raise ConceptError(
            f"--sae {name}: its inputs are to be normalised ({cfg.normalize_activations}) by numbers that it does "
            "not hold; save it with them folded into its weights (SAELens: fold_activation_norm_scaling_factor or "
            "fold_activation_whitening)"
        )


def reads_centred(module: Any, name: str, centres_writes: bool | None, other_model: bool) -> bool:
    """Whether the SAE reads the residual stream less each token's mean over dimensions.

    Args:
        centres_writes: see `concept_audit.model.identity.centres_writes`.
        other_model: read the SAE although the model's weights were changed in a way that is not known here.

    Raises:
        ConceptError: its model's weights were changed before it was trained, in a way that changes the
            residual stream and that cannot be done here.
    """
    given = dict(getattr(module.cfg.metadata, "model_from_pretrained_kwargs", None) or {})
    centred = bool(given.pop("center_writing_weights", False))
    unknown = {k: v for k, v in given.items() if k not in UNCHANGED and v not in (None, False, "main")}
    if centred and centres_writes is None:
        unknown["center_writing_weights"] = True
    if unknown and not other_model:
        changes = ", ".join(f"{k}={v!r}" for k, v in sorted(unknown.items()))
        raise ConceptError(
            f"--sae {name}: it was trained on a model that was loaded with {changes}, which changes the residual "
            f"stream in a way that is not done here; choose another SAE, --sae train, or {OVERRIDE} to read it on "
            "the model as it is"
        )
    return centred and bool(centres_writes)


def check_model(module: Any, name: str, names: Sequence[str], fingerprint: str) -> str | None:
    """Refuse an SAE whose metadata name another model.

    Args:
        names: what the model at hand, and what it was made from, is called; the user's name first.
        fingerprint: of the model's weights; an SAE that was trained here names it.

    Returns:
        the model that the metadata name; None if they name none.

    Raises:
        ConceptError: the names differ by more than the owner, the spelling or a tuned variant.
    """
    metadata = module.cfg.metadata
    trained_on = getattr(metadata, "model_name", None)
    if not trained_on or getattr(metadata, "model_fingerprint", None) == fingerprint:
        return trained_on or None
    if words_of(trained_on) not in {words_of(each) for each in names}:
        known = names[0] + (f" (known as {', '.join(names[1:])})" if len(names) > 1 else "")
        raise ConceptError(
            f"--sae {name}: it was trained on {trained_on}, and the model is {known}; choose an SAE of this model, "
            f"--sae train, or, if the model was made from {trained_on}, {OVERRIDE}"
        )
    return str(trained_on)


def words_of(name: str) -> tuple[str, ...]:
    """A model's name without owner, spelling and variant: ``google/gemma-2-2b-it`` is (gemma, 2, 2b).

    TransformerLens' short names, which SAELens' metadata use, stand for the models that they are short for.
    """
    snapshot = SNAPSHOT.search(name + "/")
    short = snapshot[2] if snapshot else name.rstrip("/").rsplit("/", 1)[-1]
    words = re.split(r"[-_\s]+", _official(short).rsplit("/", 1)[-1].lower())
    kept = tuple(word for word in words if word not in VARIANTS and word)
    return kept[1:] if kept[:2] == ("meta", "llama") else kept


def _official(short: str) -> str:
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(short))
    except ValueError:
        return short


def _place(hook: str) -> str:
    for part, words in (
        ("resid_mid", "the stream between a block's attention and its MLP"),
        ("attn", "a part of a block's attention"),
        ("mlp", "a part of a block's MLP"),
        ("embed", "the embeddings"),
    ):
        if part in hook:
            return words
    return "a place inside a block"
