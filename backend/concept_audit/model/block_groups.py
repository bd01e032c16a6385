"""Some layers of a list: groups of whole blocks, of which one is held at a time, and layers that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from concept_audit.model.linear import LinearLayer

Value = TypeVar("Value")


@dataclass(frozen=True)
class LayerGroup:
    """Some layers of a list, as a list of their own.

    Attributes:
        places: of each its place in the whole list, rising.
        layers: with `source` counted within the group.
    """

    places: Sequence[int]
    layers: list[LinearLayer]

    @classmethod
    def of(cls, layers: Sequence[LinearLayer], places: Sequence[int]) -> LayerGroup:
        """The layers at some places, rising; the first of those that read the same input becomes their source."""
        first: dict[int, int] = {}
        for own, place in enumerate(places):
            first.setdefault(layers[place].source, own)
        return cls(places, [replace(layers[place], source=first[layers[place].source]) for place in places])

    def within(self, of_all: Callable[[int], Value]) -> Callable[[int], Value]:
        """What is asked for by a layer's place in the whole list, by its place in the group."""
        return lambda index: of_all(self.places[index])


def block_groups(layers: Sequence[LinearLayer], size: Callable[[LinearLayer], int], room: int) -> Iterator[LayerGroup]:
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
            yield LayerGroup.of(layers, range(start, at))
            start, used = at, 0
        used += need
    if layers:
        yield LayerGroup.of(layers, range(start, len(layers)))


def _blocks(layers: Sequence[LinearLayer]) -> Iterator[tuple[int, int]]:
    """Where each block begins and ends."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer.block != layers[i - 1].block]
    yield from zip(starts, [*starts[1:], len(layers)], strict=True)
