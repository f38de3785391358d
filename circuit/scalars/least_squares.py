"""Least squares of a scalar's changes on route score changes, in float64.

The design is one column a route, one row an interval, pair and side. Scores come from float32
logits: a direction of the design below `RESOLUTION` of the largest is their noise, and counts as
none; the solution is then the one of least norm, and says which routes share the direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from circuit.errors import CircuitError
from circuit.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"
Indices: TypeAlias = "NDArray[np.int64]"

RESOLUTION = 1e-5
"""Singular values below this share of the largest count as zero."""

FOLDS = 5
"""Parts into which groups are dealt for the held-out R²."""


@dataclass(frozen=True)
class Fit:
    """`y ~ x @ coefficients + intercept`.

    Attributes:
        labels: of the columns.
        coefficients: one a column; of least norm where `rank` is below their number.
        intercept: 0 unless it was fitted.
        mean_contributions: coefficient times column mean; with the intercept they sum to the mean
            prediction.
        predicted: one a row.
        r_squared: 1 - residual sum of squares / that of `y` about its mean (as scikit-learn's
            score); None where `y` does not vary.
        r_squared_about_zero: the same with the sum of squares of `y` itself; None where it is 0.
        r_squared_held_out: as `r_squared`, each row predicted by a fit without its group; None
            without groups or with fewer than `FOLDS` of them.
        rank: of the design (centred if there is an intercept).
        dependent: columns of a direction that the design does not determine.
        condition: largest over smallest singular value of the design with columns scaled to equal
            norm; None where the rank is not full.
    """

    labels: tuple[str, ...]
    coefficients: Array
    intercept: float
    mean_contributions: Array
    predicted: Array
    r_squared: float | None
    r_squared_about_zero: float | None
    r_squared_held_out: float | None
    rank: int
    dependent: tuple[str, ...]
    condition: float | None

    def to_row(self) -> dict[str, Any]:
        """The fit as JSON, without its predictions."""

        def by_label(values: Array) -> dict[str, float]:
            return dict(zip(self.labels, values.tolist(), strict=True))

        return {
            "rows": len(self.predicted),
            "r_squared": self.r_squared,
            "r_squared_about_zero": self.r_squared_about_zero,
            "r_squared_held_out": self.r_squared_held_out,
            "intercept": self.intercept,
            "mean_predicted": float(self.predicted.mean()),
            "columns": len(self.labels),
            "rank": self.rank,
            "undetermined_routes": list(self.dependent),
            "condition_number": self.condition,
            "coefficients": by_label(self.coefficients),
            "mean_contributions": by_label(self.mean_contributions),
        }


def least_squares(
    x: Array,
    y: Array,
    labels: Sequence[str],
    *,
    fit_intercept: bool = False,
    groups: Sequence[str] | None = None,
) -> Fit:
    """Fit `y` by the columns of `x`.

    Args:
        x: `[row, column]`.
        y: `[row]`.
        labels: of the columns.
        groups: one a row; the held-out R² leaves whole groups out, dealt into `FOLDS` parts by
            scikit-learn's `GroupKFold`.

    Raises:
        CircuitError: there is no row or no column.
    """
    if not x.size or len(x) != len(y):
        raise CircuitError(
            f"a design of {x.shape[0]} rows and {x.shape[1]} columns for {len(y)} values",
            expected="at least one row and one column, and one value a row",
        )
    coefficients, intercept, rank = _solve(x, y, fit_intercept)
    centred = x - x.mean(0) if fit_intercept else x
    predicted = x @ coefficients + intercept
    return Fit(
        tuple(labels),
        coefficients,
        intercept,
        coefficients * x.mean(0),
        predicted,
        r_squared(y, predicted, y.mean()),
        r_squared(y, predicted, 0.0),
        None if groups is None else _held_out(x, y, fit_intercept, groups),
        rank,
        _dependent(centred, rank, labels),
        float(np.linalg.cond(centred / np.linalg.norm(centred, axis=0)))
        if rank == x.shape[1]
        else None,
    )


def r_squared(y: Array, predicted: Array, about: float) -> float | None:
    """1 - sum of squared residuals / sum of squares of `y - about`; None where the latter is 0."""
    total = float(((y - about) ** 2).sum())
    # a constant y differs from its mean by the rounding of that mean
    if total <= len(y) * (np.finfo(np.float64).eps * float(np.abs(y).max())) ** 2:
        return None
    return 1.0 - float(((y - predicted) ** 2).sum()) / total


def _solve(x: Array, y: Array, fit_intercept: bool) -> tuple[Array, float, int]:
    """Coefficients, intercept and rank; numpy's solution of least norm.

    scikit-learn's `LinearRegression` gives the same where the rank is full, but takes no cutoff.
    """
    x_mean, y_mean = (x.mean(0), float(y.mean())) if fit_intercept else (np.zeros(x.shape[1]), 0.0)
    solution, _, rank, _ = np.linalg.lstsq(x - x_mean, y - y_mean, rcond=RESOLUTION)
    coefficients = np.asarray(solution, dtype=np.float64)
    return coefficients, y_mean - float(x_mean @ coefficients), int(rank)


def _held_out(x: Array, y: Array, fit_intercept: bool, groups: Sequence[str]) -> float | None:
    folds = dealt(groups)
    if folds is None:
        return None
    predicted = np.empty_like(y)
    for fitted, left_out in folds:
        coefficients, intercept, _ = _solve(x[fitted], y[fitted], fit_intercept)
        predicted[left_out] = x[left_out] @ coefficients + intercept
    return r_squared(y, predicted, y.mean())


def dealt(groups: Sequence[str]) -> list[tuple[Indices, Indices]] | None:
    """The rows that are fitted and those that are left out, part by part; None with too few groups.

    Args:
        groups: one a row.
    """
    from sklearn.model_selection import GroupKFold

    if len(set(groups)) < FOLDS:
        return None
    # shuffled: the plain deal sorts groups by size, and its order of equals is the processor's
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(folds.split(np.zeros(len(groups)), groups=list(groups)))


def _dependent(x: Array, rank: int, labels: Sequence[str]) -> tuple[str, ...]:
    """Columns that take part in the null space."""
    if rank == x.shape[1]:
        return ()
    triangle = np.linalg.qr(x, mode="r")  # the same null space, with no more rows than columns
    null = np.linalg.svd(triangle, full_matrices=True)[2][rank:]
    part = np.linalg.norm(null, axis=0)
    return tuple(label for label, share in zip(labels, part, strict=True) if share > 1e-3)
