"""Layers in groups of whole blocks: what is held of each layer is held of one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from concept_audit.model.linear import LinearLayer

Value = TypeVar("Value")


@dataclass(frozen=True)
class BlockGroup:
    """Some consecutive blocks of a list of layers.

    Attributes:
        start: place of the first of its layers in the whole list.
        layers: as a list of their own, with `source` counted within it.
    """

    start: int
    layers: list[LinearLayer]

    def within(self, of_all: Callable[[int], Value]) -> Callable[[int], Value]:
        """What is asked for by a layer's place in the whole list, by its place in the group."""
        return lambda index: of_all(self.start + index)


def block_groups(layers: Sequence[LinearLayer], size: Callable[[LinearLayer], int], room: int) -> Iterator[BlockGroup]:
    """Consecutive blocks, as many at a time as have room together; a block that has none by itself is a group.

    Args:
        layers: in the order of their blocks.
        size: bytes that are held of a layer.
        room: bytes.
    """
    start, used = 0, 0
    for at, end in _blocks(layers):
        need = sum(map(size, layers[at:end]))
        if at > start and used + need > room:
            yield _group(layers, start, at)
            start, used = at, 0
        used += need
    if layers:
        yield _group(layers, start, len(layers))


def _blocks(layers: Sequence[LinearLayer]) -> Iterator[tuple[int, int]]:
    """Where each block begins and ends."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer.block != layers[i - 1].block]
    yield from zip(starts, [*starts[1:], len(layers)], strict=True)


def _group(layers: Sequence[LinearLayer], start: int, end: int) -> BlockGroup:
    # Blocks read tensors of their own: no source lies before the group.
    return BlockGroup(start, [replace(layer, source=layer.source - start) for layer in layers[start:end]])
