"""Nulls of fits and correlations over intervals of training: the same numbers, unpaired.

*Permuted records*: the pairs of every record get the predictors of another record's, in all
intervals and on both sides: the course of training, which all pairs share, stays, and which pair
moved when is lost. *Shifted intervals*: the predictors' intervals are shifted cyclically against
the target's, by one offset for all pairs: the course is lost (definitions.md section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from circuit.lazy import np
from circuit.scalars.least_squares import RESOLUTION, Array, Indices, dealt

SEED = 17
"""Of all draws here."""
LEAST_INTERVALS = 4
"""Fewer have too few offsets for a range."""
TIE = 1e-9
"""What rounding may take from a draw that equals the actual number."""


def beside(
    draws: Array, actual: float | Array, *, least: bool = False, tie: float = TIE
) -> dict[str, Any]:
    """Mean and 2.5 to 97.5 percentile of draws, and how many of them reach the actual number.

    Args:
        draws: `[draw, ...]`.
        actual: `[...]`.
        least: whether reaching it is to be as small; else as large.

    Returns:
        `mean`, `low`, `high` and `p`, each `[...]` as JSON. p is the share of draws that reach it,
        the actual one counted among them, so that it is never 0: (1 + those) / (1 + draws).
    """
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    reach = draws <= actual + tie if least else draws >= actual - tie
    p = (1 + reach.sum(0)) / (1 + len(draws))
    numbers = {"mean": draws.mean(0), "low": low, "high": high, "p": p}
    return {name: np.asarray(value).tolist() for name, value in numbers.items()}


def permuted_records(records: Sequence[str], kinds: Sequence[str], draws: int) -> Indices | None:
    """For each pair one of another record, `[draw, pair]`: the records of a kind are permuted.

    Pair `j` of a record gets pair `j mod n` of one that has `n`. A record may get itself.

    Args:
        records, kinds: of each pair.

    Returns:
        None where no kind has two records.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for pair, (record, kind) in enumerate(zip(records, kinds, strict=True)):
        groups.setdefault(kind, {}).setdefault(record, []).append(pair)
    if all(len(of_kind) < 2 for of_kind in groups.values()):
        return None
    generator = np.random.default_rng(SEED)
    partners = np.empty((draws, len(records)), dtype=np.int64)
    for of_draw in partners:
        for of_kind in groups.values():
            by_record = list(of_kind.values())
            order = generator.permutation(len(by_record))
            for pairs, number in zip(by_record, order, strict=True):
                other = by_record[number]
                of_draw[pairs] = [other[j % len(other)] for j in range(len(pairs))]
    return partners


def offsets(intervals: int, draws: int) -> Indices | None:
    """Cyclic shifts of so many intervals, each once: `draws` of them, or all that there are.

    Returns:
        None below `LEAST_INTERVALS`.
    """
    if intervals < LEAST_INTERVALS:
        return None
    every = np.random.default_rng(SEED).permutation(np.arange(1, intervals))
    return np.sort(every[:draws])


def shifted(
    x: Array, y: Array, statistic: Callable[[Array, Array], Array], draws: int
) -> Array | None:
    """A statistic where the intervals of `x` are shifted against those of `y`, `[draw, ...]`.

    Args:
        x, y: `[interval, ...]`.

    Returns:
        None with too few intervals; see `offsets`.
    """
    by = offsets(len(x), draws)
    return None if by is None else np.stack([statistic(np.roll(x, -n, 0), y) for n in by])


def r_squared_of_designs(
    x: Array, y: Array, *, fit_intercept: bool, groups: Sequence[str]
) -> tuple[Array, Array | None]:
    """R² and held-out R² of `least_squares` for many designs at once, by their Gram matrices.

    Args:
        x: `[design, row, column]`.
        y: `[row]`, which varies.
        groups: one a row.

    Returns:
        `[design]` each; the latter None where there are too few groups.
    """
    total = float(((y - y.mean()) ** 2).sum())

    def predicted(fitted: Any, at: Any) -> Array:
        """Values at some rows by a fit of others, `[design, row]`."""
        some, target = x[:, fitted], y[fitted]
        x_mean, y_mean = np.zeros((len(x), 1, x.shape[2])), 0.0
        if fit_intercept:
            x_mean, y_mean = some.mean(1, keepdims=True), float(target.mean())
        centred = some - x_mean
        values, vectors = np.linalg.eigh(centred.mT @ centred)
        # squares of singular values; those that `least_squares` takes for none
        is_there = values > RESOLUTION**2 * values[:, -1:]
        inverse = np.where(is_there, 1 / np.where(is_there, values, 1.0), 0.0)[:, :, None]
        moment = (centred.mT @ (target - y_mean))[:, :, None]
        coefficients = vectors @ (inverse * (vectors.mT @ moment))
        values_there: Array = ((x[:, at] - x_mean) @ coefficients)[:, :, 0] + y_mean
        return values_there

    def share(values: Array) -> Array:
        unexplained: Array = ((y - values) ** 2).sum(1)
        return 1 - unexplained / total

    whole = share(predicted(slice(None), slice(None)))
    folds = dealt(groups)
    if folds is None:
        return whole, None
    held_out = np.empty((len(x), len(y)))
    for fitted, left_out in folds:
        held_out[:, left_out] = predicted(fitted, left_out)
    return whole, share(held_out)
