"""How sure a forecast is: an interval over rows and prompts, and what rows without a common push would give.

The rows lie in groups that a hash of their content decides. Of a group k with n_k rows, F_kp is the sum over its rows
of what they do to a concept on prompt p. The forecast is for the mean of the rows,

    F = Σ_k Σ_p F_kp / (P Σ_k n_k).

**Interval.** Groups and prompts are drawn anew with replacement, apart from one another (the pigeonhole bootstrap of
Owen 2007, Annals of Applied Statistics 1, 386), and F is computed with how often each was drawn; the middle 95% of the
draws are the interval. It holds the fitted curvature, the SAE and the probes for given, and rests on as many independent pieces
as there are groups: with `GROUPS` of them it is some per cent too narrow; with fewer than `LEAST_GROUPS` none is told.

**Null.** Random signs for the rows' gradients leave what chance leaves of their sum. Half of the groups get a plus and
half a minus, drawn anew each time, on R_k = Σ_p (F_kp − n_k F_p)/P, whose sum is 0, with F_p the forecast on prompt p:
so the rows' common push cancels whatever sizes the groups have. Two factors cancel too: that R_k is measured from the mean makes its
variance (K − 1)/K of what it is, and that the signs are balanced makes that of the sum K/(K − 1) times larger. The middle 95% of
Σ_k s_k R_k / Σ_k n_k are the band.

Both cost products of [draws, K × P] with [K × P, concepts], and no run of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GROUPS = 16
LEAST_GROUPS = 4
DRAWS = 1000
NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class GroupForecasts:
    """What groups of rows do to concepts.

    Attributes:
        sums: float32 [groups, prompts, concepts], F_kp: sums over the rows of each group.
        rows: float64 [groups], n_k.
    """

    sums: np.ndarray
    rows: np.ndarray

    def means(self) -> np.ndarray:
        """F of each concept: float64 [concepts]."""
        return self.sums.sum(0, dtype=np.float64).mean(0) / self.rows.sum()

    def less(self, part: GroupForecasts) -> GroupForecasts:
        """Of the rows that are not in `part`, whose groups are the same ones: the difference of the sums."""
        return GroupForecasts(self.sums - part.sums, self.rows - part.rows)

    def kept(self) -> GroupForecasts:
        """Without the groups that have no row."""
        there = self.rows > 0
        return GroupForecasts(self.sums[there], self.rows[there])


@dataclass(frozen=True)
class Intervals:
    """Forecasts of all concepts, float64 [concepts] each; ends are NaN where there are too few groups.

    Attributes:
        forecast: F.
        low, high: ends of its 95% interval.
        null_low, null_high: ends of the band in which 95% of the forecasts of randomly signed gradients lie.
    """

    forecast: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray


def intervals(terms: Sequence[tuple[float, GroupForecasts]], seed: int = 0) -> Intervals:
    """Forecasts with intervals and null bands: of some rows, or of a difference between parts of the rows.

    Args:
        terms: factors and what they are of: (1, A) for A alone, (1, A) and (−1, B) for A less B. The prompts are the
            same and are drawn together; the groups of different terms are drawn apart.
        seed: of the draws.
    """
    parts = [(factor, part.kept()) for factor, part in terms]
    forecast = sum(factor * part.means() for factor, part in parts)
    assert isinstance(forecast, np.ndarray)
    concepts = len(forecast)
    if any(len(part.rows) < LEAST_GROUPS for _, part in parts):
        unknown = np.full(concepts, np.nan)
        return Intervals(forecast, unknown, unknown, unknown, unknown)
    random = np.random.default_rng(seed)
    prompts = parts[0][1].sums.shape[1]
    of_prompts = random.multinomial(prompts, np.full(prompts, 1 / prompts), DRAWS) / prompts
    weights, signs = [], []
    for factor, part in parts:
        k = len(part.rows)
        of_groups = random.multinomial(k, np.full(k, 1 / k), DRAWS).astype(float)
        of_groups *= factor / (of_groups @ part.rows)[:, None]
        weights.append((of_groups[:, :, None] * of_prompts[:, None, :]).reshape(DRAWS, -1).astype(np.float32))
        balanced = np.where(np.arange(k) % 2, -1.0, 1.0)
        signs.append(random.permuted(np.tile(balanced, (DRAWS, 1)), axis=1) * factor / part.rows.sum())
    low, high, null_low, null_high = (np.empty(concepts) for _ in range(4))
    step = max(1, NUMBERS_AT_ONCE // (DRAWS + sum(part.sums[:, :, 0].size for _, part in parts)))
    for start in range(0, concepts, step):
        some = slice(start, start + step)
        drawn, shuffled = np.zeros((2, DRAWS, len(forecast[some])))
        for (_, part), weight, sign in zip(parts, weights, signs, strict=True):
            sums = part.sums[:, :, some]
            drawn += weight @ sums.reshape(-1, sums.shape[2])
            groups = sums.mean(1, dtype=np.float64)
            shuffled += sign @ (groups - part.rows[:, None] * (groups.sum(0) / part.rows.sum()))
        low[some], high[some] = np.percentile(drawn, [2.5, 97.5], axis=0)
        null_low[some], null_high[some] = np.percentile(shuffled, [2.5, 97.5], axis=0)
    return Intervals(forecast, low, high, null_low, null_high)
