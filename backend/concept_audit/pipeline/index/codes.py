"""How the numbers of an index's rows are coded, as its files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from concept_audit.influence.coding import quantise, steps_and_centres
from concept_audit.influence.learning import LOSS, KeptNumbers
from concept_audit.store.index import IndexFiles
from concept_audit.store.packing import Packing
from concept_audit.store.shard_store import open_tensors, read_tensors

CODING = "2 to 8 bits by importance"
"""What an index says of its codes; earlier ones had 8 bits for every number."""


@dataclass(frozen=True)
class Codes:
    """The coding of an index.

    Attributes:
        spread: float32 [numbers of all layers], the root mean square of each over rows.
        order: int64 [packed numbers], which number stands where.
        packing: in how many bits.
    """

    spread: np.ndarray
    order: np.ndarray
    packing: Packing

    @classmethod
    def read(cls, files: IndexFiles) -> Codes:
        """From the files of an index."""
        tensors = read_tensors(files.sides)
        eight, four, two = tensors["counts"].tolist()
        return cls(tensors["spread"].numpy(), tensors["order"].numpy(), Packing((eight, four, two)))

    def encode(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Packed codes int8 [rows, bytes] and scales float32 [rows] of rows: float32 [rows, numbers of all layers]."""
        values, scales = quantise(numbers[:, self.order], self.spread[self.order], self.packing)
        return self.packing.pack(values), scales

    def queries(self, columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What a row's packed values count for several queries.

        Args:
            columns: float32, of each query the numbers of the layers that it reaches, the first ones.

        Returns:
            float32 [packed numbers, queries] and what is to be added, float64 [queries].
        """
        whole = np.zeros((len(self.spread), len(columns)), np.float32)
        for place, column in enumerate(columns):
            whole[: len(column), place] = column * self.spread[: len(column)]
        steps, centres = steps_and_centres(self.packing)
        packed = whole[self.order] * steps[:, None]
        return packed, -(centres.astype(np.float64) @ packed)


def kept_layers(files: IndexFiles, tracked: int) -> list[int]:
    """Which of so many tracked layers an index keeps numbers of: all, in one that was built before layers were chosen."""
    found = _some(files, "layers")
    return found["layers"].tolist() if found else list(range(tracked))


def kind_factors(files: IndexFiles) -> dict[int, float]:
    """What scores of the kept layers are multiplied with, for those that are left out, by the kind of concept."""
    found = _some(files, "kinds", "factors")
    return dict(zip(found["kinds"].tolist(), found["factors"].tolist(), strict=True)) if found else {}


def factor_at(factors: Mapping[int, float], layer: int | None) -> float:
    """The factor of a concept.

    Args:
        factors: as `kind_factors` gives them.
        layer: where the concept lives, which may lie between those that the index was made for; None for a loss.
    """
    if layer is None:
        return factors.get(LOSS, 1.0)
    layers = sorted(kind for kind in factors if kind != LOSS)
    return float(np.interp(layer, layers, [factors[kind] for kind in layers])) if layers else 1.0


def _some(files: IndexFiles, *names: str) -> dict[str, torch.Tensor]:
    """Some tensors of the sides; none where the first is not there."""
    with open_tensors(files.sides, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names} if names[0] in set(tensors.keys()) else {}


def tensors_of(kept: KeptNumbers) -> dict[str, torch.Tensor]:
    """What `Codes.read` and `kept_layers` read, what each number says of scores, and where each layer's numbers end."""
    return {
        "layers": torch.tensor(kept.choice.places),
        "kinds": torch.tensor([*kept.choice.factors], dtype=torch.int64),
        "factors": torch.tensor([*kept.choice.factors.values()], dtype=torch.float64),
        "spread": kept.spread,
        "importance": kept.importance,
        "order": kept.order,
        "counts": torch.tensor(kept.packing.counts),
        "ends": kept.ends,
    }
