"""Integers of a few bits each, packed into bytes: first those of 8 bits, then those of 4, then those of 2.

A byte holds one number of 8 bits, two of 4, or four of 2. Numbers of a width lie in planes: of n bytes, the
first n numbers are the lowest bits of each byte, the next n the bits above them. So a plane is had by
one shift of the bytes, and the numbers come out in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

WIDTHS = (8, 4, 2)
"""Bits that a number may take, in the order in which they lie."""


@dataclass(frozen=True)
class Packing:
    """How many numbers of each width a row has.

    Attributes:
        counts: of each of `WIDTHS`; of 4 bits a multiple of 2, and of 2 bits of 4.
    """

    counts: tuple[int, int, int]

    @property
    def numbers(self) -> int:
        """Of all widths together."""
        return sum(self.counts)

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return sum(count * width for count, width in zip(self.counts, WIDTHS, strict=True)) // 8

    def planes(self) -> Iterator[tuple[int, int, slice, slice]]:
        """Of each plane with numbers its width, how far its bits are from the lowest, its bytes and its numbers."""
        byte = number = 0
        for width, count in zip(WIDTHS, self.counts, strict=True):
            length = count * width // 8
            for place in range(8 // width if length else 0):
                yield width, place * width, slice(byte, byte + length), slice(number, number + length)
                number += length
            byte += length

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Bytes of rows: int8 [rows, row_bytes].

        Args:
            values: int8 [rows, numbers]; those of 8 bits may have a sign, others are from 0 to 2^width − 1.
        """
        packed = np.zeros((len(values), self.row_bytes), np.uint8)
        for _, shift, in_bytes, numbers in self.planes():
            packed[:, in_bytes] |= values[:, numbers].view(np.uint8) << np.uint8(shift)
        return packed.view(np.int8)

    def unpack(self, packed: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """The values of rows, written into `room` in its dtype: [rows, numbers].

        Args:
            packed: int8 [rows, row_bytes].
            room: [at least as many rows, numbers].
        """
        found = room[: len(packed)]
        for width, shift, in_bytes, numbers in self.planes():
            plane = packed[:, in_bytes]
            if width < 8:
                # The shift brings copies of the sign along; the mask takes them off.
                plane = (plane >> shift if shift else plane) & (2**width - 1)
            found[:, numbers].copy_(plane)
        return found
