"""Two stages of a ranking: approximate scores of every row recall, exact scores of the first rows decide.

The first stage gives x_i of every row; the second an exact y_i of the rows with the largest x and of a control,
drawn at random from the rest. All other rows keep their order by x, on the scale of y:

    ŷ_i = a + b x_i,  b > 0 the median slope over pairs of control rows (Theil 1950; Sen 1968).

The rows that were selected for their x do not enter a and b: they say nothing of the scale where the rest lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from concept_audit.metrics import Estimate, percentile_interval

LEAST_CONTROL = 8
"""Of fewer control rows nothing is calibrated or estimated."""
LEAST_SLOPE = 1e-6
"""In standard deviations of y over those of x: where x says nothing of y, its order is kept, and nothing else."""
PAIRED = 500
"""Control rows whose pairs give the slope."""
NEIGHBOURS = 25
"""Rows with exact scores that tell how exact scores lie about the approximation at a place."""
PLACES, LEVELS, RESIDUALS, RESAMPLES = 64, 24, 200, 100
"""Of the estimate of recall: places along x, thresholds of y, residuals that make a tail, and bootstrap samples."""


@dataclass(frozen=True)
class Calibration:
    """ŷ = intercept + slope × x, strictly rising."""

    intercept: float
    slope: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """ŷ of approximate scores, float64 of their shape."""
        return self.intercept + self.slope * x


def calibration(x: np.ndarray, y: np.ndarray) -> Calibration:
    """The line above through the control.

    Args:
        x, y: approximate and exact scores of control rows, [control]; pairs with a NaN are left out.

    Returns:
        the identity for fewer than `LEAST_CONTROL` pairs, or where x is constant.
    """
    x, y = _known(x, y)
    if len(x) < LEAST_CONTROL or not x.std():
        return Calibration(0.0, 1.0)
    # The control comes in the order in which it was drawn: the first of it are as random as all.
    slope = float(stats.theilslopes(y[:PAIRED], x[:PAIRED])[0])
    least = LEAST_SLOPE * (float(y.std()) or 1.0) / float(x.std())
    slope = max(slope, least)
    return Calibration(float(np.median(y) - slope * np.median(x)), slope)


def merged(
    approximate: np.ndarray, exact: np.ndarray, control: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, Calibration]:
    """Scores of every row: exact where there is one, calibrated elsewhere.

    Args:
        approximate: float64 [rows]; NaN where a row has no score.
        exact: float64 [rows]; NaN where there is none.
        control: the control rows; those without an exact score yet do not count.

    Returns:
        float64 [rows], NaN where `approximate` is, and the calibration.
    """
    places = np.asarray(control, np.int64)
    line = calibration(approximate[places], exact[places])
    found = np.where(np.isnan(exact), line(approximate), exact)
    found[np.isnan(approximate)] = np.nan
    return found, line


def recall(approximate: np.ndarray, exact: np.ndarray, top: int, seed: int = 0) -> Estimate:
    """How many of the `top` rows with the largest y have been scored exactly, with a 95% interval.

    Of the rows without y it is unknown how many exceed a threshold t. With m(x) and s(x) the mean and the deviation
    of y about its trend among the `NEIGHBOURS` scored rows next to x, and F̄ the upper tail of the standardised
    residuals of all scored rows, smoothed by a normal kernel (Silverman 1986, equation 3.31), their expected number is

        M(t) = Σ_{i without y} F̄((t − m(x_i)) / s(x_i)).

    That rows were chosen by x does no harm: m, s and F̄ are of y given x. What is found of the true top is #{y ≥ t}
    at the t where #{y ≥ t} + M(t) = top. The interval is a bootstrap over the scored rows, with a Poisson draw of the
    number that exceeds.

    Args:
        approximate, exact: as for `merged`.
        top: at most as many as there are rows with y; a larger one is undefined.

    Returns:
        value and interval in rows, at most `top`; NaN where undefined.
    """
    scored = ~np.isnan(exact) & ~np.isnan(approximate)
    rest = np.sort(approximate[np.isnan(exact) & ~np.isnan(approximate)])
    x, y = approximate[scored], exact[scored]
    if top > len(y) or len(y) < 2 * LEAST_CONTROL:
        return Estimate(float("nan"), n=len(y))
    if not len(rest):
        return Estimate(float(top), float(top), float(top), len(y))
    ranks = np.unique(np.linspace(1, top, LEVELS).astype(int))
    levels = -np.sort(-y)[ranks - 1]
    # Most of the rest lies far below: places are denser where it comes near to the scored rows.
    shares = 1 - np.geomspace(1, 1 / (len(rest) + 1), PLACES)
    places = np.quantile(rest, shares)
    owners = np.clip(np.searchsorted(places, rest), 0, PLACES - 1)
    weights = np.bincount(owners, minlength=PLACES).astype(float)
    best = _found(ranks, _exceeding(x, y, places, weights, levels), top)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        sample = rng.integers(0, len(y), len(y))
        expected = _exceeding(x[sample], y[sample], places, weights, levels)
        # One draw for all thresholds: what exceeds a higher one exceeds a lower one too.
        luck = rng.uniform()
        drawn.append(_found(ranks, stats.poisson.ppf(luck, expected), top))
    low, high = percentile_interval(np.array(drawn))
    return Estimate(best, min(low, best), max(high, best), len(y))


def _exceeding(x: np.ndarray, y: np.ndarray, places: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """M(t) of the formula in `recall`: float64 [levels], falling with t."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    trend = np.polyfit(x, y, 1) if x.std() else np.array([0.0, y.mean()])
    residuals = y - np.polyval(trend, x)
    k = min(NEIGHBOURS, len(x))
    windows = np.lib.stride_tricks.sliding_window_view(residuals, k)
    centres = np.lib.stride_tricks.sliding_window_view(x, k).mean(1)
    floor = 1e-6 * (residuals.std() or 1.0) + np.finfo(float).tiny
    means, spreads = windows.mean(1), np.maximum(windows.std(1, ddof=1), floor)
    standard = (residuals - np.interp(x, centres, means)) / np.interp(x, centres, spreads)
    if len(standard) > RESIDUALS:
        standard = np.quantile(standard, np.linspace(0, 1, RESIDUALS))
    # The tail on a grid, wide enough for the farthest residual with its kernel.
    width = 0.9 * min(standard.std() or 1.0, 1.0) * len(x) ** -0.2
    reach = float(np.abs(standard).max()) + 4 * width
    grid = np.linspace(-reach, reach, 128)
    tail = special.ndtr((standard - grid[:, None]) / width).mean(1)
    m = np.polyval(trend, places) + np.interp(places, centres, means)
    s = np.interp(places, centres, spreads)
    # A grid is read in rising order; beyond it all rows exceed, or none.
    above = np.interp((levels[:, None] - m) / s, grid, tail, left=1.0, right=0.0)
    return above @ weights


def _found(ranks: np.ndarray, missed: np.ndarray, top: int) -> float:
    """#{y ≥ t} at the t where #{y ≥ t} + M(t) = top.

    Args:
        ranks: #{y ≥ t} of each threshold, rising.
        missed: M(t) of each.
    """
    total = np.maximum.accumulate(ranks + missed)
    if total[0] >= top:
        return float(max(top - missed[0], 0.0))
    return float(np.interp(top, total, ranks))


def _known(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]
