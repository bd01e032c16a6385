"""Numbers of a row in few bits each: more for those that say more of scores.

What is lost of a score when number x, of variance σ², is coded with b bits is E[y²] E[(x − x̂)²] = E[y²] σ² D(b), where
D(b) is the distortion of the best uniform quantiser of a normal variable (Max 1960, "Quantizing for minimum
distortion", table II). To spend a number of bits so that least is lost in all, every number takes the b that
minimises E[x²] E[y²] D(b) + θ b, with θ such that the bits are used up: reverse water-filling (Cover & Thomas,
"Elements of information theory", section 10.3.3), with real quantisers in the place of ideal ones.
"""

from __future__ import annotations

import numpy as np
import torch

from concept_audit.store.packing import WIDTHS, Packing

DISTORTION = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 1e-4}
"""Bits → mean squared error of a normal variable of variance 1; with 0 bits it counts as 0."""
STEP = {2: 0.9957, 4: 0.3352, 8: 8 / 127}
"""Bits → distance of two values of the quantiser, in standard deviations."""
HALVINGS = 60


def allocate(importance: torch.Tensor, bits: int) -> torch.Tensor:
    """Bits of each number: int64 [numbers], each 0, 2, 4 or 8, and together at most `bits`.

    Args:
        importance: E[x²] E[y²] of each number, [numbers].
        bits: of all numbers together.
    """
    share = importance.double() / importance.max().double().clamp(min=torch.finfo(torch.float64).tiny)
    widths = torch.tensor(sorted(DISTORTION))
    lost = torch.tensor([DISTORTION[int(width)] for width in widths], dtype=torch.float64)

    def chosen(price: float) -> torch.Tensor:
        found = torch.zeros(len(share), dtype=torch.int64)
        least = share.clone()
        for width, part in zip(widths[1:], lost[1:], strict=True):
            cost = share * part + price * width
            found[cost < least] = width
            least = torch.minimum(least, cost)
        return found

    # Between a price at which all take the most bits, and one at which none takes any.
    low, high = -60.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if int(chosen(10.0**middle).sum()) > bits else (low, middle)
    return chosen(10.0**high)


def order_and_packing(bits: torch.Tensor) -> tuple[torch.Tensor, Packing]:
    """In which order numbers are packed, and into how many of each width.

    Args:
        bits: of each number, 0 for those that are left out.

    Returns:
        int64 [packed numbers], places among all numbers: those of 8 bits first, each width in the order of the
        numbers. What would not fill a byte is left out.
    """
    places, counts = [], []
    for width in WIDTHS:
        mine = (bits == width).nonzero()[:, 0]
        whole = len(mine) - len(mine) % (8 // width)
        places.append(mine[:whole])
        counts.append(whole)
    return torch.cat(places), Packing((counts[0], counts[1], counts[2]))


def steps_and_centres(packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Of each packed number the step of its quantiser and the value that stands for 0: x ≈ (value − centre) × step."""
    widths = np.repeat(WIDTHS, packing.counts)
    steps = np.array([STEP[int(width)] for width in WIDTHS], np.float32).repeat(packing.counts)
    centres = np.where(widths == 8, 0.0, 2.0 ** (widths - 1) - 0.5).astype(np.float32)
    return steps, centres


def quantise(numbers: np.ndarray, spread: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Values of rows, ready to be packed.

    Args:
        numbers: float32 [rows, packed numbers], in the order of the packing.
        spread: float32 [packed numbers], the root mean square of each over rows.

    Returns:
        int8 [rows, packed numbers] and float32 [rows], the scale of each row, with numbers ≈
        (value − centre) × step × spread × scale; the scale of a row with numbers that are not finite is NaN.
    """
    even = numbers / spread
    scale = np.sqrt(np.mean(np.square(even, dtype=np.float64), axis=1))
    safe = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    steps, centres = steps_and_centres(packing)
    values = np.rint(even / (safe[:, None] * steps) + centres)
    most = np.where(centres > 0, 2 * centres, 127)
    least = np.where(centres > 0, 0, -127)
    values = np.nan_to_num(np.clip(values, least, most)).astype(np.int8)
    return values, np.where(np.isfinite(scale), scale, np.nan).astype(np.float32)
