"""Files of the influence engine: curvature factors, prepared queries, and scores on their way.

All are safetensors in float32 or wider, each complete or absent::

    shards/curvature/<key>/curvature.json      what the factors are of
                          /basis-0007.safetensors   eigenvectors of block 7's covariances
                          /block-0007.safetensors   with the eigenvalues: the finished factors
                          /pass.safetensors         sums of a pass that is under way
    shards/influence/<ranking>/query.safetensors    the query as rows were scored with it
                              /000003.safetensors   scores of shard 3's rows, with token influences
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from concept_audit.errors import StoreError
from concept_audit.store.layout import Layout, whole


@dataclass(frozen=True)
class CurvatureFiles:
    """The factors of one fit.

    Attributes:
        root: their directory.
    """

    root: Path

    @property
    def description(self) -> Path:
        """What the factors are of, as JSON."""
        return self.root / "curvature.json"

    @property
    def under_way(self) -> Path:
        """Sums of a pass that is under way."""
        return self.root / "pass.safetensors"

    def basis(self, block: int) -> Path:
        """Eigenvectors of a block's covariances."""
        return self.root / f"basis-{block:04}.safetensors"

    def block(self, block: int) -> Path:
        """Finished factors of a block."""
        return self.root / f"block-{block:04}.safetensors"


def curvature_files(layout: Layout, key: str, made_of: Mapping[str, Any]) -> CurvatureFiles:
    """The directory of a fit, made if it is not there.

    Args:
        key: names the directory.
        made_of: fingerprints of ``model`` and ``data``, and the settings of the fit.

    Raises:
        StoreError: the directory holds factors of something else; both are named.
    """
    files = CurvatureFiles(layout.shards("curvature") / key)
    wanted = json.loads(json.dumps(dict(made_of)))
    if not files.description.exists():
        with whole(files.description) as partial:
            partial.write_text(json.dumps(wanted, indent=2) + "\n", "utf-8")
        return files
    try:
        found = json.loads(files.description.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{files.description}: damaged ({error}); delete {files.root}") from error
    other = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if other:
        told = "; ".join(f"{n} {found.get(n)}, but this audit has {wanted.get(n)}" for n in sorted(other))
        raise StoreError(
            f"{files.root}: curvature factors of another model or data set ({told}); delete that directory "
            "to have them fitted again"
        )
    return files


def influence_directory(layout: Layout, ranking: int) -> Path:
    """Where a ranking's query and scores lie."""
    return layout.shards("influence") / f"{ranking:016x}"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, and a few JSON values about them, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as partial:
        save_file(contiguous, partial, {"about": json.dumps(dict(about or {}))})


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote."""
    return load_file(path, device=str(device))


def read_about(path: Path) -> dict[str, Any]:
    """The values that were written with tensors."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("about", "{}"))


def write_scores(path: Path, scores: np.ndarray, unscored: list[int], tokens: Mapping[int, np.ndarray]) -> None:
    """Write the scores of one shard's rows.

    Args:
        scores: float64 [rows].
        unscored: ids of rows that should have a score and have none.
        tokens: example id → float32 [tokens], of the rows whose token influences are kept.
    """
    tensors = {f"tokens.{example}": torch.from_numpy(values) for example, values in tokens.items()}
    write_tensors(path, {"scores": torch.from_numpy(scores), **tensors}, {"unscored": unscored})


def read_scores(path: Path) -> np.ndarray:
    """The scores of one shard's rows: float64 [rows]."""
    with safe_open(path, "numpy") as file:
        return file.get_tensor("scores")


def read_token_influence(path: Path, example_ids: list[int]) -> dict[int, np.ndarray]:
    """Token influences kept in one shard, of those of the rows that have them: float32 [tokens]."""
    if not path.exists():
        return {}
    with safe_open(path, "numpy") as file:
        names = set(file.keys())
        return {i: file.get_tensor(f"tokens.{i}") for i in example_ids if f"tokens.{i}" in names}


def remove_tree(path: Path) -> None:
    """Delete a directory and what it holds."""
    shutil.rmtree(path, ignore_errors=True)
