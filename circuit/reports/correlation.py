"""Correlations over the intervals of a run, and how large they get by chance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from circuit.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHANCE = 0.05
"""Probability of `chance_level`."""


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of every column of x with every column of y.

    Args:
        x, y: `[interval, ...]`.

    Returns:
        `[...x, ...y]`; NaN where there are fewer than two intervals, or no variance beyond
        rounding, or a number is not finite.
    """
    shape = (*x.shape[1:], *y.shape[1:])
    if len(x) < 2:
        return np.full(shape, np.nan)

    def standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = values.reshape(len(values), -1)
        centred = flat - flat.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        still = norm <= 1e-12 * np.linalg.norm(flat, axis=0)
        return np.asarray(centred / np.where(still, np.nan, norm))

    with np.errstate(invalid="ignore"):
        found = np.clip(standard(x).T @ standard(y), -1, 1)
    return np.asarray(found).reshape(shape)


def chance_level(correlations: int, intervals: int) -> float | None:
    """The |r| that any of so many correlations exceeds with probability at most 0.05 by chance.

    Bonferroni over a two-sided t-test with `intervals - 2` degrees of freedom; None below three
    intervals. It takes intervals as independent, which neighbours in training are not.
    """
    freedom = intervals - 2
    if freedom < 1 or correlations < 1:
        return None
    from scipy import stats

    t = float(stats.t.isf(CHANCE / 2 / correlations, freedom))
    return t / math.sqrt(freedom + t * t)
