"""Which model this is, by the names that it and its files go by."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from concept_audit.model.load import LanguageModel

CENTRED = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "phi"})
"""Architectures whose norms all subtract the mean, and in which no norm writes to the residual stream."""
BASE_OF_CARD = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w./-]+)", re.MULTILINE)


def known_names(lm: LanguageModel) -> tuple[str, ...]:
    """Names of the model and of what it was made from, what the user called it first.

    They come from the user, Transformers' configuration, and, of a directory, its config.json
    (``_name_or_path``), the ``base_model`` of its model card and the base of its adapter.
    """
    names = [lm.name, str(getattr(lm.model.config, "_name_or_path", "") or "")]
    adapters = getattr(lm.model, "peft_config", None) or {}
    names += [str(adapter.base_model_name_or_path or "") for adapter in adapters.values()]
    for name in tuple(names):
        if name and (directory := Path(name).expanduser()).is_dir():
            names += _names_inside(directory)
    return tuple(dict.fromkeys(name for name in names if name))


def public_name(lm: LanguageModel) -> str:
    """The name to leave in a file that is handed on: one without this machine's directories."""
    elsewhere = [name for name in known_names(lm) if not Path(name).is_absolute() and not name.startswith((".", "~"))]
    return elsewhere[0] if elsewhere else Path(lm.name).name


def centres_writes(lm: LanguageModel) -> bool | None:
    """Whether centring what is written to the residual stream subtracts each token's mean, and nothing else.

    Where every reader of the stream is a LayerNorm, the mean over dimensions is never read, so
    weights can be centred (TransformerLens' ``center_writing_weights``): the stream h is then
    h − mean(h), and the model computes the same. With RMS norms TransformerLens leaves the weights
    as they are.

    Returns:
        True and False for these two; None for an architecture of which neither is known.
    """
    norms = {type(module).__name__ for module in lm.model.modules() if "norm" in type(module).__name__.lower()}
    if norms and all(name.endswith("RMSNorm") for name in norms):
        return False
    plain = all(isinstance(m, nn.LayerNorm) for m in lm.model.modules() if type(m).__name__ in norms)
    return True if norms and plain and lm.model.config.get_text_config().model_type in CENTRED else None


def _names_inside(directory: Path) -> list[str]:
    names = []
    for file, entry in (("config.json", "_name_or_path"), ("adapter_config.json", "base_model_name_or_path")):
        try:
            found = json.loads((directory / file).read_text("utf-8")).get(entry)
        except (OSError, ValueError, AttributeError):
            continue
        names.append(str(found or ""))
    try:
        card = (directory / "README.md").read_text("utf-8", "replace")
    except OSError:
        return names
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    return names + BASE_OF_CARD.findall(head)
