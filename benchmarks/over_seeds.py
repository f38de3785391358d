"""Means over seeds with their intervals, as the other scripts here print them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap


def interval(values: Sequence[float], digits: str) -> str:
    """Mean and 95 % percentile bootstrap interval: `1.2 (0.9 to 1.4)`.

    Args:
        values: one a seed.
        digits: format of a number, such as `.1f` or `.0%`.
    """
    mean = f"{np.mean(values):{digits}}"
    if len(values) < 2 or np.ptp(values) == 0:
        return mean
    drawn = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = drawn.confidence_interval
    return f"{mean} ({low:{digits}} to {high:{digits}})"
