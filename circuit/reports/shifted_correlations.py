"""Correlations over intervals beside those of shifted intervals (`circuit.scalars.nulls`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from circuit.lazy import np
from circuit.scalars.least_squares import Array
from circuit.scalars.nulls import LEAST_INTERVALS, SEED, beside, shifted


def hold_against_shifts(
    known: Sequence[dict[str, Any]],
    place: Sequence[int],
    x: Array,
    y: Array,
    correlate: Callable[[Array, Array], Array],
    draws: int,
) -> dict[str, Any]:
    """Give each correlation its null, and say what the largest of them is beside.

    Args:
        known: rows with a `pearson`; they get `shifted_mean`, `_low`, `_high` and `_p`, the share
            of the shifts whose |r| reaches its own.
        place: of each in what `correlate` gives, flattened.
        x, y: `[interval, ...]`.

    Returns:
        Number of shifts, seed, and the null of the largest |r| among all; null with too few
        intervals, or where there is no correlation.
    """
    told: dict[str, Any] = {"draws": 0, "seed": SEED, "largest": None}
    found = shifted(x, y, correlate, draws)
    if found is None:
        return told
    told["draws"] = len(found)
    if not known:
        return told
    null = found.reshape(len(found), -1)[:, list(place)]
    actual = np.array([row["pearson"] for row in known])
    size = beside(np.abs(null), np.abs(actual))
    of_each = {**beside(null, actual), "p": size["p"]}
    for i, row in enumerate(known):
        row.update({f"shifted_{name}": values[i] for name, values in of_each.items()})
    largest = float(np.abs(actual).max())
    beside_it = beside(np.abs(null).max(1), largest)
    return told | {"largest": {"actual": largest, **beside_it}}


def shifts_note(told: Mapping[str, Any]) -> str:
    """The largest correlation beside those of shifted intervals."""
    largest = told["largest"]
    if largest is None and told["draws"]:
        return "No shifted intervals: there is no correlation to hold against them."
    if largest is None:
        return f"No shifted intervals: fewer than {LEAST_INTERVALS} have too few offsets."
    return (
        f"With the intervals of the writes shifted against those of the answers, cyclically, by"
        f" {told['draws']} offsets, the largest |r| is {largest['mean']:.2f} in the mean, 95 %"
        f" {largest['low']:.2f} to {largest['high']:.2f}; it reaches {largest['actual']:.2f} with"
        f" p = {largest['p']:.3f}, (1 + those) / (1 + offsets), which is at least"
        f" {1 / (1 + told['draws']):.3f}. `p` of a correlation: the same of its own |r|."
    )
