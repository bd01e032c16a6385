"""What every training run of a validation shares, in one file that workers read: a work itself stays small."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from concept_audit.evidence.measures import HeldOut
from concept_audit.evidence.steering import Steering
from concept_audit.influence.queries import Rows
from concept_audit.pipeline.validation.setting import Setting
from concept_audit.store.shard_store import ShardStore, read_about, read_tensors

READ = ("shown", "plain", "natural")
Row = tuple[np.ndarray, np.ndarray]
"""Token ids and response mask of a row: int32 and bool [tokens]."""


@dataclass(frozen=True)
class Arms:
    """What some runs do besides leaving rows out.

    Attributes:
        rewritten: rows with another response, by their places.
        steering: what is added to the residual stream in training; None where no run does.
    """

    rewritten: dict[int, Row] = field(default_factory=dict)
    steering: Steering | None = None


@dataclass(frozen=True)
class Shared:
    """What a run trains and measures on.

    Attributes:
        rows: every row of the audit by its place, as tokens; empty where no run trains on it.
        held_out: what is measured on.
        arms: of runs that rewrite rows or steer.
    """

    rows: Rows
    held_out: HeldOut
    arms: Arms = field(default_factory=Arms)


def write_shared(
    store: ShardStore, path: Path, setting: Setting, wanted: Collection[int], arms: Arms | None = None
) -> None:
    """Commit it.

    Args:
        wanted: places of the rows that runs train on.
    """
    arms = arms or Arms()
    held, nothing = setting.held_out, np.zeros(0)
    rows = Rows(
        [ids if i in wanted else nothing.astype(ids.dtype) for i, ids in enumerate(setting.rows.ids)],
        [mask if i in wanted else nothing.astype(bool) for i, mask in enumerate(setting.rows.response)],
    )
    tensors = joined("prompts", held.prompts) | {"direction": torch.from_numpy(np.asarray(held.direction))}
    for name, part in {"rows": rows, **{name: getattr(held, name) for name in READ}}.items():
        tensors |= joined(f"{name}.ids", part.ids) | joined(f"{name}.response", part.response)
    places = list(arms.rewritten)
    tensors |= {"rewritten": torch.tensor(places, dtype=torch.int64)}
    for name, number in (("rewritten.ids", 0), ("rewritten.response", 1)):
        tensors |= joined(name, [arms.rewritten[place][number] for place in places])
    about: dict[str, float] = {"layer": held.layer}
    if arms.steering is not None:
        tensors |= {"steering": torch.from_numpy(np.asarray(arms.steering.direction))}
        about |= {"spread": arms.steering.spread}
    store.write_tensors(path, tensors, about)


def read_shared(path: Path) -> Shared:
    """What `write_shared` wrote.

    Raises:
        StoreError: it is absent or damaged.
    """
    tensors, about = read_tensors(path), read_about(path)
    parts = {
        name: Rows(parted(tensors, f"{name}.ids"), parted(tensors, f"{name}.response")) for name in ("rows", *READ)
    }
    held = HeldOut(
        layer=int(about["layer"]),
        direction=tensors["direction"].numpy(),
        prompts=parted(tensors, "prompts"),
        **{name: parts[name] for name in READ},
    )
    columns = (parted(tensors, f"rewritten.{part}") for part in ("ids", "response"))
    rewritten = dict(zip(tensors["rewritten"].tolist(), zip(*columns, strict=True), strict=True))
    steering = Steering(tensors["steering"].numpy(), about["spread"]) if "steering" in tensors else None
    return Shared(parts["rows"], held, Arms(rewritten, steering))


def joined(name: str, arrays: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays one after the other, and how long each is."""
    lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
    joined = np.concatenate([np.asarray(array) for array in arrays]) if arrays else np.zeros(0, np.int64)
    return {name: torch.from_numpy(joined), f"{name}.lengths": lengths}


def parted(tensors: dict[str, torch.Tensor], name: str) -> list[np.ndarray]:
    """The arrays that `joined` put one after the other."""
    parts = torch.split(tensors[name], tensors[f"{name}.lengths"].tolist())
    return [part.numpy() for part in parts][: len(tensors[f"{name}.lengths"])]
