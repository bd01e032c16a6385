"""Sparse autoencoders: loading with SAELens, directions, and sparse encoding of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from concept_audit.concepts.sae_identity import check_readable, layer_of
from concept_audit.errors import ConceptError, first_line

CELLS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class SparseAutoencoder:
    """An SAE and where it reads.

    Attributes:
        module: the SAELens module, ready for inference.
        layer: how many blocks have run where it reads the residual stream; None if its metadata do not say.
        name: what the user called it.
        centred: whether it reads the stream less each token's mean over dimensions (see `read_centred`).
    """

    module: Any
    layer: int | None
    name: str
    centred: bool = False

    @property
    def d_model(self) -> int:
        return int(self.module.cfg.d_in)

    @property
    def n_features(self) -> int:
        return int(self.module.cfg.d_sae)

    def directions(self) -> np.ndarray:
        """Unit decoder directions: float32 [features, d_model]; a decoder row of zeros stays zero.

        Where the SAE reads Ph, P = I − 11ᵀ/d_model, they are those of W_dec P: ⟨Ph, d⟩ = ⟨h, Pd⟩, so a
        projection of the stream as it is leaves the mean out that the SAE has never seen.
        """
        decoder = self.module.W_dec.detach().float().cpu()
        if self.centred:
            decoder = decoder - decoder.mean(1, keepdim=True)
        return torch.nn.functional.normalize(decoder, dim=1).numpy()

    def encode(self, activations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The features that fire at each token.

        Args:
            activations: residual stream, float32 [tokens, d_model].

        Returns:
            token int64 [firings] (index into `activations`), feature int32 [firings] and
            activation float32 [firings], in the order of tokens, then features.
        """
        tokens, features, values = [], [], []
        device, dtype = self.module.W_dec.device, self.module.W_dec.dtype
        step = max(1, CELLS_AT_ONCE // self.n_features)
        with torch.inference_mode():
            for start in range(0, len(activations), step):
                block = torch.from_numpy(activations[start : start + step]).to(device, dtype)
                encoded = self.module.encode(block)
                token, feature = encoded.nonzero(as_tuple=True)
                tokens.append((token + start).cpu().numpy())
                features.append(feature.int().cpu().numpy())
                values.append(encoded[token, feature].float().cpu().numpy())
        if not tokens:
            return np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
        return np.concatenate(tokens), np.concatenate(features), np.concatenate(values)


@dataclass(frozen=True)
class SaeSource:
    """Where any process gets an SAE from.

    Attributes:
        source: a directory, or ``RELEASE:ID``; see `load_sae`.
        layer: where it reads.
        centred: as `SparseAutoencoder.centred`.
    """

    source: str
    layer: int
    centred: bool = False

    def load(self, device: torch.device) -> SparseAutoencoder:
        """The SAE, on a device; raises as `load_sae`."""
        sae = replace(load_sae(self.source, device), layer=self.layer)
        return read_centred(sae) if self.centred else sae


def load_sae(source: str, device: torch.device) -> SparseAutoencoder:
    """Load an SAE from a directory in SAELens' format, or ``RELEASE:ID`` from the hub.

    Raises:
        ConceptError: it is not there, damaged, cannot be reached, or does not read single tokens of the
            residual stream (see `check_readable` and `layer_of`).
    """
    from sae_lens import SAE

    if (path := Path(source).expanduser()).is_dir():
        try:
            module = SAE.load_from_disk(path, device=str(device))
        except Exception as error:  # SAELens raises whatever its parts do
            raise ConceptError(
                f"--sae {source}: not an SAE that SAELens reads ({first_line(error)}); "
                "the directory must hold cfg.json and sae_weights.safetensors"
            ) from error
    else:
        release, colon, sae_id = source.partition(":")
        if not colon or not release or not sae_id:
            raise ConceptError(
                f"--sae {source}: no such directory; give train, none, the directory of an SAE, "
                "or RELEASE:ID for one that SAELens knows on the hub"
            )
        try:
            module = SAE.from_pretrained(release, sae_id, device=str(device))
        except Exception as error:
            raise ConceptError(
                f"--sae {source}: cannot be loaded from the hub ({first_line(error)}); check release and "
                "id in SAELens' list and the network connection, or give a directory"
            ) from error
    check_readable(module, source)
    module.eval().requires_grad_(False)
    return SparseAutoencoder(module, layer_of(module, source), source)


def read_centred(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The SAE with each token's mean over dimensions taken off before it encodes.

    So reads an SAE that was trained on a model with centred weights (TransformerLens'
    ``center_writing_weights``) the stream of the model as it is. The SAE's module is changed, so whatever
    encodes with it, gradients included, reads the same.
    """
    if not sae.centred:
        sae.module.hook_sae_input.add_hook(
            lambda stream, hook: stream - stream.mean(-1, keepdim=True), is_permanent=True
        )
    return replace(sae, centred=True)


def is_readable(directory: Path) -> bool:
    """Whether the files of an SAE are there, of their full length, and can be read."""
    try:
        json.loads((directory / "cfg.json").read_text("utf-8"))
        with safe_open(directory / "sae_weights.safetensors", "pt") as file:
            return bool(file.keys())
    except (OSError, ValueError, SafetensorError):
        return False


def check_fits(sae: SparseAutoencoder, model_name: str, d_model: int, n_layers: int) -> None:
    """Refuse an SAE of another model.

    Raises:
        ConceptError: its width or layer is not one that the model has; both are named.
    """
    if sae.d_model != d_model:
        raise ConceptError(
            f"--sae {sae.name}: it reads a residual stream of width {sae.d_model}, but {model_name} has "
            f"width {d_model}; choose an SAE that was trained on this model, or --sae train"
        )
    if sae.layer is not None and not 1 <= sae.layer <= n_layers:
        raise ConceptError(
            f"--sae {sae.name}: it reads layer {sae.layer}, but {model_name} has {n_layers} blocks; "
            "choose an SAE that was trained on this model, or --sae train"
        )
